"""The commands under `bench`: arguments in, one benchmark, printing."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from patchmill.cli.common import Json, show
from patchmill.types import EncodeSettings, PlanSettings

__all__ = ["bench_app"]

bench_app = typer.Typer(help="Measure throughput on this machine.", rich_markup_mode=None)

_plan, _encode = PlanSettings(), EncodeSettings()  # the defaults are named once

Inputs = Annotated[
    list[Path] | None, typer.Option("--input", help="your own slide; may be given several times; else one is made")
]
Rounds = Annotated[int, typer.Option(min=1, help="how often each case is measured, after a warm-up")]


@bench_app.command("encoder", epilog="Example: patchmill bench encoder --size dinov3-vits16 --batch 1 --batch 16")
def bench_encoder(
    inputs: Inputs = None,
    size: Annotated[
        list[str] | None, typer.Option(help="encoders; DINOv3's S, B and L by default; may be given several times")
    ] = None,
    precision: Annotated[
        list[str] | None, typer.Option(help="fp32 and int8 by default; may be given several times")
    ] = None,
    pixels: Annotated[
        list[int] | None, typer.Option(help="pixels per side of the input; may be given several times")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="tiles per call; may be given several times")] = None,
    rounds: Rounds = 5,
    threads: Annotated[int | None, typer.Option(help="cores; all by default")] = None,
    price: Annotated[
        float | None, typer.Option(help="of an hour of this machine, to tell that of a million tiles")
    ] = None,
    picture: Annotated[Path | None, typer.Option(metavar="FILE", help="also draw it, as a PNG")] = None,
    as_json: Json = False,
) -> int:
    """Tiles per second of each model size, beside PyTorch eager and the best matrix product."""
    from patchmill.benchmarks.encoder import PRECISIONS, SIZES
    from patchmill.benchmarks.encoder import bench_encoder as measure
    from patchmill.benchmarks.plot import check_picture, plot_encoders
    from patchmill.encoders.session import BATCH

    if picture is not None:
        check_picture(picture)
    record = measure(
        inputs or (),
        sizes=size or SIZES,
        precisions=precision or PRECISIONS,
        pixels=pixels or (_plan.tile,),
        batches=sorted(set(batch or (BATCH,))),
        rounds=rounds,
        threads=threads,
        price=price,
    )
    show(record.as_dict(), record.text, as_json)
    if picture is not None:
        plot_encoders(record, picture)
    return 0


@bench_app.command("gpu", epilog="Example: patchmill bench gpu --report gpu.json")
def bench_gpu(
    size: Annotated[
        list[str] | None, typer.Option(help="encoders; DINOv3's S, B and L by default; may be given several times")
    ] = None,
    runtime: Annotated[list[str] | None, typer.Option(help="all by default; may be given several times")] = None,
    precision: Annotated[list[str] | None, typer.Option(help="fp16 by default; may be given several times")] = None,
    pixels: Annotated[
        list[int] | None, typer.Option(help="pixels per side of the input; may be given several times")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="tiles per call; may be given several times")] = None,
    rounds: Rounds = 5,
    price: Annotated[
        float | None, typer.Option(help="of an hour of this machine, to tell that of a million tiles")
    ] = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="also write the JSON to this file")] = None,
    as_json: Json = False,
) -> int:
    """On a machine with a GPU: open, prove and time every runtime, beside transformers and the tensor cores' best."""
    from patchmill.benchmarks.gpu_check import PRECISIONS, RUNTIMES, SIZES, gpu_check

    record = gpu_check(
        sizes=size or SIZES,
        runtimes=runtime or RUNTIMES,
        precisions=precision or PRECISIONS,
        pixels=pixels or (_plan.tile,),
        batches=sorted(set(batch)) if batch else (None,),
        rounds=rounds,
        price=price,
    )
    if report is not None:
        report.write_text(json.dumps(record.as_dict(), indent=1))
    show(record.as_dict(), record.text, as_json)
    return 0


@bench_app.command("pipeline", epilog="Example: patchmill bench pipeline --input slide.svs --rounds 3")
def bench_pipeline(
    inputs: Inputs = None,
    encoder: Annotated[str, typer.Option(help="see patchmill encoders")] = _encode.encoder,
    precision: Annotated[Literal["fp32", "int8"], typer.Option(help="of the encoder")] = "fp32",
    tiles: Annotated[int, typer.Option(help="tiles per side of the slide that is made without --input")] = 20,
    rounds: Rounds = 3,
    as_json: Json = False,
) -> int:
    """The whole of embed as a fraction of what its encoder does alone."""
    from patchmill.benchmarks.pipeline import bench_pipeline as measure

    record = measure(inputs or (), encoder=encoder, precision=precision, tiles=tiles, rounds=rounds)
    show(record.as_dict(), record.text, as_json)
    return 0


@bench_app.command("ingest", epilog="Example: patchmill bench ingest --rounds 5 --json")
def bench_ingest(
    inputs: Inputs = None,
    tiles: Annotated[int, typer.Option(min=2, help="tiles per side of the slides that are made without --input")] = 48,
    rounds: Rounds = 5,
    as_json: Json = False,
) -> int:
    """Tiles per second from files into batches, beside the usual loader and the bare codec."""
    from patchmill.benchmarks.ingest import bench_ingest as measure

    record = measure(inputs or (), tiles=tiles, rounds=rounds)
    show(record.as_dict(), record.text, as_json)
    return 0


@bench_app.command("peers", epilog="Example: patchmill bench peers --rounds 3 --json")
def bench_peers(
    tiles: Annotated[int, typer.Option(min=2, help="tiles per side of the slide that is made")] = 24,
    rounds: Rounds = 3,
    as_json: Json = False,
) -> int:
    """Whole pipelines of LazySlide and slide2vec beside ours; installs them on first use (13 GB), then half an hour."""
    from patchmill.benchmarks.peers import bench_peers as measure

    record = measure(tiles=tiles, rounds=rounds)
    show(record.as_dict(), record.text, as_json)
    return 0


@bench_app.command("memory", epilog="Example: patchmill bench memory --json")
def bench_memory(inputs: Inputs = None, rounds: Rounds = 1, as_json: Json = False) -> int:
    """Peak memory of embed against the size of the slide; several minutes."""
    from patchmill.benchmarks.memory import bench_memory as measure

    record = measure(inputs or (), rounds=rounds)
    show(record.as_dict(), record.text, as_json)
    return 0


@bench_app.command("volumes", epilog="Example: patchmill bench volumes --rounds 5 --gib 1")
def bench_volumes(
    rounds: Rounds = 5,
    gib: Annotated[
        list[int] | None, typer.Option(min=1, help="size of the chunked volumes; 1 and 20 by default")
    ] = None,
    as_json: Json = False,
) -> int:
    """Slices per second out of volumes beside the usual way and copy bandwidth; memory against the volume's size."""
    from patchmill.benchmarks.volumes import GIB
    from patchmill.benchmarks.volumes import bench_volumes as measure

    record = measure(rounds=rounds, sizes=tuple(gib or GIB))
    show(record.as_dict(), record.text, as_json)
    return 0


@bench_app.command("images", epilog="Example: patchmill bench images --side 1024 --rounds 5")
def bench_images(
    images: Annotated[int, typer.Option(min=1, help="files of each folder that is made")] = 256,
    side: Annotated[
        list[int] | None,
        typer.Option(min=1, help="pixels per side; 224, 512 and 1024 by default; may be given several times"),
    ] = None,
    rounds: Rounds = 5,
    as_json: Json = False,
) -> int:
    """Images per second out of folders of JPEG, PNG and TIFF, beside torchvision's ImageFolder and the bare codec."""
    from patchmill.benchmarks.images import SIDES
    from patchmill.benchmarks.images import bench_images as measure

    record = measure(images=images, sides=side or SIDES, rounds=rounds)
    show(record.as_dict(), record.text, as_json)
    return 0
