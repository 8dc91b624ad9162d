"""A picture of a record of `bench encoder`: tiles per second against the work of a tile, with the machine's limit."""

from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

from patchmill.benchmarks.record import Record
from patchmill.errors import NoSpaceError, UsageError

__all__ = ["check_picture", "plot_encoders"]


def check_picture(path: Path) -> None:
    """Raise UsageError where matplotlib is missing, or for a name that is none of a PNG in a folder that is there."""
    if path.suffix.lower() != ".png":
        raise UsageError("--picture", f"{path} is no name of a PNG", "end it with .png")
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise UsageError("--picture", f"{path} cannot be written", "name a file in a folder that is there")
    if find_spec("matplotlib") is None:
        raise UsageError("--picture", "matplotlib is not installed", "pip install 'patchmill[plot]'")


def plot_encoders(record: Record, path: Path) -> None:
    """Write a PNG. Raises UsageError as `check_picture` does, and where it cannot be written; NoSpaceError too."""
    check_picture(path)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    work = {row.case.removesuffix(": a tile"): row.value for row in record.rows if row.unit == "GFLOP"}
    best = max(row.value or 0 for row in record.rows if row.unit == "GFLOP/s")
    lines: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
    for row in record.rows:
        if row.unit == "tiles/s" and row.value:
            encoder, rest = row.case.split(" ", 1)
            kind, pixels, _ = rest.split(", ")
            gflop = work[f"{encoder}, {pixels}"]
            lines[kind].append((gflop or 1, row.value, f"{encoder}, {pixels}"))
    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=120)
    for kind, points in lines.items():
        points.sort()
        axes.plot([point[0] for point in points], [point[1] for point in points], "o-", label=kind)
    named: dict[str, tuple[float, float]] = {}
    for points in lines.values():
        for gflop, rate, name in points:
            named[name] = (gflop, max(rate, named.get(name, (0, 0))[1]))
    for name, (gflop, rate) in named.items():
        axes.annotate(name, (gflop, rate), textcoords="offset points", xytext=(5, 5), fontsize=8)
    ends = [min(each for each in work.values() if each), max(each for each in work.values() if each)]
    axes.plot(ends, [best / each for each in ends], "k--", label="GEMM fp32")
    axes.set(xscale="log", yscale="log", xlabel="GFLOP per tile", ylabel="tiles/s")
    axes.set_title(f"{record.machine['cpu']}, {record.machine['cores']} cores; untrained weights", fontsize=9)
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, bbox_inches="tight")
    except OSError as error:
        if error.errno in NoSpaceError.FULL:
            raise NoSpaceError.of(str(path), error) from error
        raise UsageError("--picture", f"{path} cannot be written ({error.strerror})", "name another file") from error
    finally:
        pyplot.close(figure)
