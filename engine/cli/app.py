"""The commands: arguments in, one call of the API, printing."""

import sys
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from patchmill.cli.bench import bench_app
from patchmill.cli.common import Json, show
from patchmill.cli.options import (
    ArchivePath,
    As,
    Coords,
    Decode,
    EncoderKey,
    Every,
    Frame,
    Mask,
    MinTissue,
    Mpp,
    MppOverride,
    Output,
    Overlap,
    Planes,
    PlanKey,
    Precision,
    Reader,
    Runtime,
    Sources,
    Spacing,
    TileSide,
    Tissue,
    Voxel,
    Weights,
)
from patchmill.errors import UsageError
from patchmill.types import EncodeSettings

__all__ = ["app"]

app = typer.Typer(
    name="patchmill",
    help="Slides, volumes and images in, a searchable archive of embeddings out.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
probe_app = typer.Typer(help="Light tasks on frozen embeddings.", rich_markup_mode=None)
app.add_typer(probe_app, name="probe")
app.add_typer(bench_app, name="bench")

_encode = EncodeSettings()  # its defaults are named once
_READ_TIMEOUT = 120.0  # of patchmill.sources, which would be slow to import here; a test compares the two


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"patchmill {version('patchmill')}")
        raise typer.Exit


@app.callback()
def program(
    told: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """The program's own options; the help is that of `app`."""


@app.command(epilog="Example: patchmill embed slides/ --archive my-archive --encoder efficientnet-lite0")
def embed(
    src: Sources,
    archive: Annotated[Path, typer.Option(help="the archive's folder; made if it is not there")],
    encoder: Annotated[str, typer.Option(help="see patchmill encoders")] = _encode.encoder,
    weights: Weights = None,
    precision: Precision = "auto",
    runtime: Runtime = "auto",
    untrained: Annotated[
        int | None, typer.Option(metavar="SEED", help="random weights from this seed, for throughput only")
    ] = None,
    pixels: Annotated[
        int | None, typer.Option(help="pixels per side of the encoder's input; its own by default")
    ] = None,
    kind: As = None,
    mpp: Mpp = None,
    tile: TileSide = None,
    overlap: Overlap = None,
    tissue: Tissue = None,
    min_tissue: MinTissue = None,
    mask: Mask = None,
    coords: Coords = None,
    decode: Decode = None,
    planes: Planes = None,
    spacing: Spacing = None,
    every: Every = None,
    frame: Frame = None,
    voxel: Voxel = None,
    intensity: Annotated[
        str | None, typer.Option(help="volumes: which values are black and white, such as ct-lung; see the README")
    ] = None,
    window: Annotated[
        str | None,
        typer.Option(
            metavar="LOW,HIGH", help="volumes: which values are black and white, or which of the body's, as 0.5%,99.5%"
        ),
    ] = None,
    slab: Annotated[int | None, typer.Option(help="volumes: 3 puts neighbouring slices into the channels")] = None,
    fit: Annotated[
        Literal["crop", "pad", "stretch"] | None, typer.Option(help="images: how one becomes a square; pad by default")
    ] = None,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="keep dense features too: one vector for each patch of a tile")
    ] = False,
    reader: Reader = "auto",
    read_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="give up storage that does not answer for so long")
    ] = _READ_TIMEOUT,
    stage: Annotated[
        Path | None, typer.Option(metavar="DIR", help="copy each source to this local disk before it is read")
    ] = None,
    mpp_override: MppOverride = None,
    new_plan: Annotated[
        bool, typer.Option("--new-plan", help="allow settings other than the archive's, as a second plan")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(help="worker processes; by default one per GPU, else one; 0 runs in this process")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="tiles per batch; by default what suits the runtime")] = None,
    threads: Annotated[int | None, typer.Option(help="cores for each worker's encoder; all by default")] = None,
    hash: Annotated[
        Literal["sampled", "full"],
        typer.Option(help="tell whether a source has changed by samples of its bytes, or by all"),
    ] = "sampled",
    retry_quarantined: Annotated[
        bool,
        typer.Option("--retry-quarantined", help="try sources again that were set aside, as workers died over them"),
    ] = False,
    as_json: Json = False,
) -> int:
    """Embed slides, volumes or images into an archive. Stop it whenever you like; the same command goes on."""
    from patchmill import api
    from patchmill.cli.progress import run_progress
    from patchmill.cli.text import report_text
    from patchmill.cluster import RunSettings

    encode = EncodeSettings(
        encoder=encoder,
        weights=str(weights.absolute()) if weights else None,
        untrained=untrained,
        precision=precision,
        runtime=runtime,
        pixels=pixels,
        tokens=tokens,
        batch=batch,
        threads=threads,
    )
    with run_progress() as progress:
        report = api.embed(
            src,
            archive,
            kind=kind,
            plan=_plan_options(mpp, tile, overlap, tissue, min_tissue, decode, planes, spacing, every, frame),
            encode=encode,
            intensity=intensity,
            window=window,
            slab=slab,
            fit=fit,
            voxel=_numbers("--voxel", voxel, 3) if voxel else None,
            run=RunSettings(
                workers=workers,
                new_plan=new_plan,
                full_hash=hash == "full",
                retry_quarantined=retry_quarantined,
                reader=reader,
                read_timeout=read_timeout,
                stage=str(stage.absolute()) if stage else None,
            ),
            mpp_override=mpp_override,
            mask=mask,
            coords=coords,
            watch=progress,
            found=progress.found,
            say=lambda line: print(f"patchmill: note: {line}", file=sys.stderr),
        )
    show(report.as_dict(paths=True), lambda: report_text(report), as_json)
    return 1 if report.failed else 0


def _plan_options(
    mpp: float | None,
    tile: int | None,
    overlap: int | None,
    tissue: str | None,
    min_tissue: float | None,
    decode: str | None,
    planes: str | None,
    spacing: float | None,
    every: int | None,
    frame: int | None,
) -> dict[str, Any]:
    """The settings of a plan by name; None where nothing was said."""
    return {
        "mpp": mpp,
        "tile": tile,
        "overlap": overlap,
        "tissue": tissue,
        "min_tissue": min_tissue,
        "scaled": None if decode is None else decode == "scaled",
        "planes": None if planes is None else tuple(planes.split(",")),
        "spacing": spacing,
        "every": every,
        "frame": frame,
    }


def _numbers(option: str, text: str, count: int) -> Any:
    try:
        found = tuple(float(each) for each in text.split(","))
    except ValueError:
        found = ()
    if len(found) != count:
        raise UsageError(option, f"{text!r} are not {count} numbers", "write them with commas, as 0.5,0.5,2")
    return found


@app.command(epilog="Example: patchmill plan slide.svs --picture plan.png")
def plan(
    src: Sources,
    picture: Annotated[
        Path | None, typer.Option(help="draw tissue and tiles: a PNG for one slide, a folder for several")
    ] = None,
    kind: As = None,
    mpp: Mpp = None,
    tile: TileSide = None,
    overlap: Overlap = None,
    tissue: Tissue = None,
    min_tissue: MinTissue = None,
    mask: Mask = None,
    coords: Coords = None,
    decode: Decode = None,
    planes: Planes = None,
    spacing: Spacing = None,
    every: Every = None,
    frame: Frame = None,
    voxel: Voxel = None,
    reader: Reader = "auto",
    mpp_override: MppOverride = None,
    as_json: Json = False,
) -> int:
    """Where tiles would lie, without embedding them. Exit code 1 if a source cannot be planned."""
    from patchmill import api
    from patchmill.cli.progress import looked_at
    from patchmill.cli.text import previews_text

    with looked_at() as watch:
        found = api.preview(
            src,
            kind=kind,
            plan=_plan_options(mpp, tile, overlap, tissue, min_tissue, decode, planes, spacing, every, frame),
            voxel=_numbers("--voxel", voxel, 3) if voxel else None,
            mask=mask,
            coords=coords,
            reader=reader,
            mpp_override=mpp_override,
            picture=picture,
            watch=watch,
        )
    show({"plans": [each.as_dict() for each in found]}, lambda: previews_text(found), as_json)
    return int(any(each.wrong for each in found))


@app.command(epilog="Example: patchmill status my-archive")
def status(archive: ArchivePath, as_json: Json = False) -> int:
    """What an archive holds, and what is missing. --json also lists every source with its outcome."""
    from patchmill import api
    from patchmill.cli.text import status_text

    found = api.status(archive)
    show(found.as_dict(), lambda: status_text(found), as_json)
    return 0


@app.command(epilog="Example: patchmill verify my-archive")
def verify(
    archive: ArchivePath,
    keep: Annotated[bool, typer.Option("--keep", help="only tell; do not withdraw what is damaged")] = False,
    as_json: Json = False,
) -> int:
    """Read every byte back. What is damaged is withdrawn, and the next embed repairs it; exit code 1 if any was."""
    from patchmill import api
    from patchmill.cli.progress import counted
    from patchmill.cli.text import damage_text

    with counted("sources") as progress:
        damage = api.verify(archive, withdraw=not keep, progress=progress)
    show({"damage": [asdict(each) for each in damage]}, lambda: damage_text(damage), as_json)
    return 1 if damage else 0


@app.command(epilog="Example: patchmill index my-archive")
def index(
    archive: ArchivePath,
    name: Annotated[str, typer.Option(help="name of the index")] = "default",
    plan: PlanKey = None,
    encoder: EncoderKey = None,
    output: Output = None,
    as_json: Json = False,
) -> int:
    """Build the exact index over all embeddings of an archive."""
    from patchmill import api
    from patchmill.cli.progress import counted

    with counted("sources") as progress:
        report = api.build_index(archive, plan=plan, encoder=encoder, output=output, name=name, progress=progress)
    show(report.as_dict(), report.text, as_json)
    return 0


@app.command(epilog="Example: patchmill tokens my-archive grid.zarr --source ct --fuse mean")
def tokens(
    archive: ArchivePath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder of the Zarr array that is made")],
    source: Annotated[str, typer.Option(help="id, name or path of a volume that was embedded with --tokens")],
    plane: Annotated[str | None, typer.Option(help="axial, coronal or sagittal, where there are several")] = None,
    fuse: Annotated[Literal["mean"] | None, typer.Option(help="mean of all planes, on one grid")] = None,
    plan: PlanKey = None,
    encoder: EncoderKey = None,
    as_json: Json = False,
) -> int:
    """Write a volume's dense features as one grid. It has an affine to millimetres."""
    from patchmill import api
    from patchmill.cli.text import grid_text

    grid = api.write_tokens(archive, source, out, plane=plane, fuse=fuse, plan=plan, encoder=encoder)
    found = {"out": str(out), "shape": list(grid.shape), "affine": grid.affine.tolist()}
    show(found, lambda: grid_text(grid, out), as_json)
    return 0


@app.command(epilog="Example: patchmill query my-archive --image tile.png -k 5 --picture hits.png")
def query(
    archive: ArchivePath,
    image: Annotated[Path | None, typer.Option(help="an image file, taken as one tile of the plan")] = None,
    source: Annotated[str | None, typer.Option(help="id, name or path of a source; with --at")] = None,
    at: Annotated[
        str | None,
        typer.Option(metavar="PLACE", help="X,Y in level-0 pixels; X,Y,Z in mm, RAS+; an image's number or name"),
    ] = None,
    lps: Annotated[bool, typer.Option("--at-lps", help="--at is in DICOM's own millimetres, LPS+")] = False,
    k: Annotated[int, typer.Option("-k", help="number of hits")] = 10,
    picture: Annotated[Path | None, typer.Option(help="write the query and its hits as a PNG")] = None,
    name: Annotated[str, typer.Option("--index", help="name of the index")] = "default",
    weights: Weights = None,
    as_json: Json = False,
) -> int:
    """Find the tiles most like an image or a place."""
    from patchmill import api

    if (image is None) == (source is None) or (source is None) != (at is None):
        raise UsageError("query", "one thing to search for is needed", "give --image FILE, or --source ID --at X,Y")
    if image is not None:
        result = api.query_image(archive, image, k, index=name, weights=str(weights) if weights else None)
    else:
        result = api.query_place(archive, str(source), _point(str(at), lps), k, index=name)
    if picture is not None:
        api.draw_hits(archive, result, picture)
    show(result.as_dict(), result.text, as_json)
    return 0


def _point(text: str, lps: bool) -> tuple[float, ...] | str:
    """Numbers, or the name of an image."""
    try:
        point = tuple(float(each) for each in text.split(","))
    except ValueError:
        point = ()
    if lps:
        if len(point) != 3:
            raise UsageError("--at-lps", f"--at {text!r} is no place in a volume", "write X,Y,Z in millimetres")
        return -point[0], -point[1], point[2]
    return point or text


@probe_app.command(epilog="Example: patchmill probe knn my-archive --labels labels.csv")
def knn(
    archive: ArchivePath,
    labels: Annotated[
        Path,
        typer.Option(
            help="CSV with source,label, for tiles also row, x,y, x,y,z or image; see the README; or a set's .npz"
        ),
    ],
    k: Annotated[
        list[int] | None,
        typer.Option("-k", help="neighbours; may be given several times; 10, 20, 100 and 200 by default"),
    ] = None,
    plan: PlanKey = None,
    encoder: EncoderKey = None,
    output: Output = None,
    pool: Annotated[
        Literal["mean", "max"] | None, typer.Option(help="labels of sources: one vector for each, of all its tiles")
    ] = None,
    allow_untrained: Annotated[
        bool, typer.Option("--allow-untrained", help="take random weights too, for tests of the machinery")
    ] = False,
    as_json: Json = False,
) -> int:
    """DINO's kNN protocol on labels per tile or per source."""
    from patchmill import api

    report = api.probe_knn(
        archive,
        labels,
        ks=tuple(k) if k else (10, 20, 100, 200),
        plan=plan,
        encoder=encoder,
        output=output,
        pool=pool,
        allow_untrained=allow_untrained,
    )
    show(report.as_dict(), report.text, as_json)
    return 0


@app.command(epilog="Example: patchmill encoders --check efficientnet-lite0")
def encoders(
    check: Annotated[str | None, typer.Option(metavar="NAME", help="run the gate of one encoder here")] = None,
    export: Annotated[str | None, typer.Option(metavar="NAME", help="write the ONNX graph of one encoder")] = None,
    onnx: Annotated[Path | None, typer.Option(help="file for --export; NAME.onnx by default")] = None,
    weights: Weights = None,
    precision: Precision = "auto",
    runtime: Runtime = "auto",
    pixels: Annotated[
        int | None, typer.Option(help="pixels per side of the encoder's input; its own by default")
    ] = None,
    untrained: Annotated[int | None, typer.Option(metavar="SEED", help="random weights from this seed")] = None,
    as_json: Json = False,
) -> int:
    """List the encoders, prove one, write its graph. The list says where weights are or come from."""
    from patchmill import api
    from patchmill.cli.text import encoders_text, gate_text

    name = check if check is not None else export
    if onnx is not None and export is None:
        raise UsageError("--onnx", "it is for --export alone", "name the encoder with --export")
    if name is None:
        cards = api.list_encoders()
        show({"encoders": [asdict(card) for card in cards]}, lambda: encoders_text(cards), as_json)
        return 0
    if check is not None and export is not None:
        raise UsageError("--export", "--check was given too", "give one of the two")
    if not name:
        option = "--check" if check is not None else "--export"
        raise UsageError(option, "it names no encoder", "give a name that `patchmill encoders` lists")
    settings = EncodeSettings(
        encoder=name,
        weights=str(weights) if weights else None,
        precision=precision,
        runtime=runtime,
        pixels=pixels,
        untrained=untrained,
    )
    if export is not None:
        if precision == "auto":
            settings = replace(settings, precision="fp32")
        path = onnx or Path(f"{export}.onnx")
        api.export_encoder(settings, path)
        show({"graph": str(path), "weights": f"{path}.data"}, lambda: f"{path} and {path}.data", as_json)
        return 0
    report = api.check_encoder(settings)
    show(asdict(report), lambda: gate_text(name, report), as_json)
    return 0


@app.command(epilog="Example: patchmill doctor")
def doctor(as_json: Json = False) -> int:
    """Look at what is installed and what is missing. Exit code 1 if something is wrong."""
    from patchmill import api
    from patchmill.cli.text import doctor_text

    findings = api.doctor()
    show({"findings": [asdict(each) for each in findings]}, lambda: doctor_text(findings), as_json)
    return int(any(each.state == "wrong" for each in findings))


@app.command(epilog="Example: patchmill demo patchmill-demo")
def demo(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="where everything goes")] = Path("patchmill-demo"),
    slide: Annotated[Path | None, typer.Option(help="a slide of your own in place of the sample")] = None,
    as_json: Json = False,
) -> int:
    """The main job on one small real slide. It embeds, indexes, queries and probes; safe to repeat."""
    from patchmill import api
    from patchmill.cli.progress import run_progress
    from patchmill.cli.text import demo_text

    with run_progress() as progress:
        made = api.demo(folder, slide=slide, watch=progress, say=lambda line: print(line, file=sys.stderr))
    value = {
        "slide": str(made.slide),
        "archive": str(made.archive),
        "picture": str(made.picture),
        "run": made.run.as_dict(paths=True),
        "index": made.index.as_dict(),
        "query": made.hits.as_dict(),
        "rule": made.rule,
        "probe": made.probe.as_dict(),
    }
    show(value, lambda: demo_text(made), as_json)
    return 0
