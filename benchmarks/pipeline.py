"""The whole of `embed` as a fraction of what its encoder does alone, on the same tiles and the same cores."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from patchmill import api
from patchmill.benchmarks.inputs import slides_of, tiles_of
from patchmill.benchmarks.record import Record, in_turns, machine, row, versions
from patchmill.cluster import Doors, RunReport, RunSettings
from patchmill.encoders import open_encoder
from patchmill.errors import UsageError
from patchmill.testing.encoders import null_doors
from patchmill.types import EncodeSettings, PlanSettings

__all__ = ["bench_pipeline"]

NULL = EncodeSettings(encoder="null", precision="fp32", untrained=0)


def bench_pipeline(
    inputs: Sequence[Path] = (),
    *,
    encoder: str = "dinov3-vits16",
    precision: str = "fp32",
    tiles: int = 20,
    rounds: int = 3,
) -> Record:
    """Embed slides into a new archive, in turns with the encoder alone and with an encoder that takes no time.

    inputs: slides; one of `tiles` x `tiles` real tiles is made where none is named. The encoder has untrained weights.
    The pipeline's rate counts from the start of the first shard to the last commit: reading, decoding, resampling,
    encoding, writing and syncing.
    """
    settings = EncodeSettings(encoder=encoder, untrained=0, precision=precision)  # type: ignore[arg-type]
    reports: dict[str, RunReport] = {}
    with TemporaryDirectory() as folder:
        slides = slides_of(list(inputs), Path(folder), tiles)
        alone = open_encoder(settings)
        pixels = tiles_of(slides, 8 * alone.batch, PlanSettings())

        def encode() -> float:
            start = time.perf_counter()
            for first in range(0, len(pixels), alone.batch):
                alone(pixels[first : first + alone.batch])
            return len(pixels) / (time.perf_counter() - start)

        def embed(encode: EncodeSettings, doors: Doors | None, name: str) -> Callable[[], float]:
            def measure() -> float:
                with TemporaryDirectory(dir=folder) as place:
                    report = api.embed(
                        slides, Path(place) / "archive", encode=encode, run=RunSettings(workers=1), doors=doors
                    )
                for outcome in report.outcomes:
                    if outcome.outcome != "complete":
                        raise UsageError("--input", f"{outcome.path} is {outcome.outcome}", "name another slide")
                reports[name] = report
                return report.rate

            return measure

        baseline, whole, null = f"{encoder} {precision} alone", f"embed with {encoder} {precision}", "embed, no encoder"
        cases = {baseline: encode, whole: embed(settings, None, whole), null: embed(NULL, null_doors(), null)}
        try:
            values = in_turns(cases, rounds)
        finally:
            alone.close()
    report = reports[whole]
    shares = ", ".join(f"{name} {share:.0%}" for name, share in report.stages.items())
    return Record(
        benchmark="pipeline",
        machine=machine(),
        versions=versions(),
        rows=(
            row(whole, values[whole], "tiles/s", baseline=(baseline, values[baseline])),
            row(baseline, values[baseline], "tiles/s"),
            row(null, values[null], "tiles/s", baseline=(baseline, values[baseline])),
        ),
        notes=(
            f"{report.tiles} tiles a run; untrained weights: they say nothing about quality",
            f"the tasks' time in the last run: {shares}; encoder busy {report.encoder_busy:.0%}",
        ),
    )
