"""The verb `doctor`: what is installed, what excludes what, and what is missing, in words that say what to do."""

import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from typing import Literal

from patchmill.encoders import known, runtimes
from patchmill.types import many

__all__ = ["Finding", "doctor"]

SAME_MODULE = {  # module -> distributions that install it and overwrite each other's files
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml"),
    "faiss": ("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs", "faiss-gpu-cu11", "faiss-gpu-cu12"),
}
NEEDED = ("numpy", "onnx", "onnxruntime", "zarr", "dask", "distributed", "openslide-python", "numba")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `do` is empty where nothing is to be done."""

    name: str
    state: Literal["ok", "note", "wrong"]
    text: str
    do: str = ""


def doctor() -> tuple[Finding, ...]:
    """Look at everything that decides whether patchmill works here; `wrong` findings must be mended."""
    return tuple(finding for look in _LOOKS for finding in look())


def installed() -> dict[str, str]:
    """Version of each distribution that provides a module we need, by name; absent ones are left out."""
    found = {}
    for name in {*NEEDED, *(each for names in SAME_MODULE.values() for each in names)}:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _python() -> Iterator[Finding]:
    yield Finding("patchmill", "ok", version("patchmill"))
    text = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}, "
    text += many(os.cpu_count() or 1, "core")
    yield Finding("python", "ok", text)


def _packages() -> Iterator[Finding]:
    found = installed()
    for name in NEEDED:
        if name in found:
            yield Finding(name, "ok", found[name])
        elif name == "onnxruntime" and any(each in found for each in SAME_MODULE["onnxruntime"]):
            continue
        else:
            yield Finding(name, "wrong", "not installed", "pip install patchmill again")


def _exclusions() -> Iterator[Finding]:
    yield from exclusions(installed())


def exclusions(found: dict[str, str]) -> Iterator[Finding]:
    """Distributions that must not be installed together but are. found: distribution -> version."""
    for module, names in SAME_MODULE.items():
        present = [name for name in names if name in found]
        if len(present) > 1:
            both = " and ".join(present)
            yield Finding(
                module,
                "wrong",
                f"{both} install the same module {module}; which one runs is chance",
                f"pip uninstall {' '.join(present)}, then install the one you want",
            )
    owners = packages_distributions().get("patchmill", [])
    if len(set(owners)) > 1:
        yield Finding("patchmill", "wrong", f"installed by {', '.join(sorted(set(owners)))}", "uninstall all but one")


def _openslide() -> Iterator[Finding]:
    try:
        import openslide

        yield Finding("OpenSlide library", "ok", str(openslide.__library_version__))
    except (ImportError, OSError) as error:
        yield Finding(
            "OpenSlide library", "wrong", f"cannot be loaded ({type(error).__name__})", "pip install openslide-bin"
        )


def _providers() -> Iterator[Finding]:
    try:
        import onnxruntime
    except ImportError:
        return
    yield Finding("providers", "ok", ", ".join(onnxruntime.get_available_providers()))


def _gpus() -> Iterator[Finding]:
    count = runtimes.gpus()
    if not count:
        yield Finding("GPU", "ok", "the NVIDIA driver shows none")
        return
    found = runtimes.gpu()
    yield Finding("GPU", "ok", f"{count} of {found.name}, CUDA {found.cuda}")
    lacking = {runtime: runtimes.missing(runtime) for runtime in ("torch", "cuda")}
    for runtime, lack in lacking.items():
        yield Finding(f"runtime {runtime}", "ok", lack or "ready")
    if all(lacking.values()):
        yield Finding("GPU", "note", "encoders will run on the CPU", "see the README, 'GPUs'")


def _weights() -> Iterator[Finding]:
    cards = known()
    for card in cards:
        if card.weights:
            yield Finding(card.name, "ok", f"weights at {card.weights} ({card.found})")
    if missing := [card.name for card in cards if not card.weights]:
        text = f"not found for {', '.join(missing)}"
        yield Finding("weights", "note", text, "`patchmill encoders` says how to get each")


def _folders() -> Iterator[Finding]:
    free = shutil.disk_usage(tempfile.gettempdir()).free
    state: Literal["ok", "note"] = "ok" if free > 1 << 30 else "note"
    yield Finding(
        "temporary folder", state, f"{free >> 20} MiB free", "" if state == "ok" else "set TMPDIR to a larger disk"
    )


_LOOKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _python,
    _packages,
    _exclusions,
    _openslide,
    _providers,
    _gpus,
    _weights,
    _folders,
)
