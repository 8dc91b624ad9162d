"""How results read on a terminal."""

import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from patchmill.api import Demo, Finding, Preview, Status
from patchmill.archive import Damage, TokenGrid
from patchmill.cli.common import shown
from patchmill.cli.progress import left_out, unread
from patchmill.cluster import RunReport
from patchmill.encoders import EncoderCard, GateReport
from patchmill.types import PLANES, many

__all__ = [
    "damage_text",
    "demo_text",
    "doctor_text",
    "encoders_text",
    "gate_text",
    "grid_text",
    "previews_text",
    "report_text",
    "status_text",
]

STAGES = {  # of a shard's task -> in words
    "read": "waiting for the reader: disk or network, and OpenSlide's decoding",
    "decode": "decoding on a core",
    "core": "waiting for a core to decode on",
    "resample": "cutting and resampling tiles",
    "batch": "waiting for room in a batch",
    "encode": "waiting for the encoder's last vectors",
    "write": "writing and syncing",
}


def report_text(report: RunReport) -> str:
    """A run: outcomes, rate, and where the time went."""
    counts = ", ".join(f"{report.count(kind)} {kind}" for kind in ("complete", "empty", "failed", "transient"))
    lines = [f"{many(len(report.outcomes), 'source')}: {counts}"]
    if report.tiles:
        word = ", untrained weights: good for throughput alone" if report.untrained else ""
        lines.append(
            f"{many(report.tiles, 'tile')} in {report.embed_seconds:.1f} s, {report.rate:.1f} tiles/s, "
            f"{report.name} {report.precision}{word}"
        )
        lines.append(
            f"encoder busy {report.encoder_busy:.0%} of that time, waiting for pixels {report.encoder_starved:.0%}; "
            f"peak memory of a worker {report.peak_bytes / 2**30:.2f} GiB"
        )
        lines.append("time of the tasks that feed it, which overlaps the encoder's:")
        lines += [f"  {share:>4.0%}  {STAGES[stage]}" for stage, share in report.stages.items()]
        lines.append(f"pixels read per pixel of a tile: {report.decoded:.2f}")
    lines.append(f"records: {report.archive}/runs/{report.run}/")
    return "\n".join(lines)


def grid_text(grid: TokenGrid, out: Path) -> str:
    """A grid of dense features that was written."""
    *cells, width = grid.shape
    sides = np.linalg.norm(grid.affine[:3, :3], axis=0)
    return (
        f"{out}: {' x '.join(map(str, cells))} cells of {' x '.join(f'{side:.2f}' for side in sides)} mm, "
        f"{width} wide, {' and '.join(PLANES[plane] for plane in grid.planes)}"
    )


def previews_text(previews: Iterable[Preview]) -> str:
    """Plans that nothing was made of yet."""
    lines = []
    for each in previews:
        if each.wrong:
            lines.append(f"{shown(each.path)}: {each.wrong}")
            continue
        if each.kind != "slide":
            lines += other_preview(each)
            continue
        tissue = f"; {each.tissue_mm2:.1f} mm² of tissue" if each.tissue_mm2 is not None else ""
        shrunk = f", decoded at 1/{each.shrink}" if each.shrink != 1 else ""
        tiles = f"{many(each.tiles, 'tile')} at {each.mpp:.4g} µm/px"
        lines.append(f"{shown(each.path)}: {tiles} from level {each.level}{shrunk}{tissue}")
        lines.append(f"  reader {each.reader}" + (f"; picture {each.picture}" if each.picture else ""))
    return "\n".join(lines)


def other_preview(preview: Preview) -> list[str]:
    """The lines of a volume's or an image set's plan."""
    if preview.shape is None or preview.voxel is None:
        return [f"{shown(preview.path)}: {many(preview.tiles, 'image')}", f"  reader {preview.reader}"]
    planes = ", ".join(f"{count} {plane}" for plane, count in (preview.planes or {}).items())
    size = " x ".join(map(str, preview.shape))
    voxel = " x ".join(f"{each:.4g}" for each in preview.voxel)
    low, high = preview.quantiles or (0, 0)
    notes = []
    if preview.unreadable_files:
        notes.append(f"  note: {unread(preview.unreadable_files)}")
    if preview.other_objects:
        notes.append(f"  note: {left_out(preview.other_objects)}")
    return [
        f"{shown(preview.path)}: {many(preview.tiles, 'tile')} ({planes or 'none'}), "
        f"{preview.empty} left out as empty; {size} voxels of {voxel} mm "
        f"(right, anterior, superior), body from {low:.4g} to {high:.4g}",
        f"  reader {preview.reader}",
        *notes,
    ]


def status_text(status: Status) -> str:
    """What an archive holds."""
    lines = [
        f"{status.archive}: {many(status.sources, 'source')}, {many(status.runs, 'run')}, "
        f"the last one {status.last_run or 'never'}"
    ]
    for holding in status.holdings:
        name = f"{holding.name} {holding.precision}" + (", untrained" if holding.untrained else "")
        lines.append(
            f"{name} (encoder {holding.encoder}): {many(holding.sources, 'source')} complete, "
            f"{holding.empty} of them empty, {many(holding.rows, 'tile')}, {holding.unreadable} unreadable; "
            f"{many(holding.incomplete, 'source')} under way"
        )
        lines.append(f"  plan {holding.plan}: {holding.plan_text}")
    lines += [f"{one.path}: {one.outcome}: {one.wrong}" for one in status.missing]
    return "\n".join(lines)


def damage_text(damage: Iterable[Damage]) -> str:
    """What verify found."""
    lines = [f"{one.source} {one.where}: {one.wrong}" for one in damage]
    if not lines:
        return "every byte is as it was written"
    return "\n".join([*lines, f"{len(lines)} damaged; run the same embed command again to repair what was withdrawn"])


def doctor_text(findings: Iterable[Finding]) -> str:
    """One line a finding."""
    return "\n".join(
        f"{each.state:<6}{each.name}: {each.text}" + (f"; {each.do}" if each.do else "") for each in findings
    )


def encoders_text(cards: Iterable[EncoderCard]) -> str:
    """One paragraph an encoder."""
    lines = []
    for card in cards:
        outputs = ", ".join(f"{name} {width}" for name, width in card.outputs.items())
        facts = [f"{card.pixels} px, {outputs}", card.tile, ", ".join(card.precisions), card.license]
        lines.append(f"{card.name}: {card.title}; {'; '.join(fact for fact in facts if fact)}")
        lines.append(
            f"  weights: {card.weights} ({card.found})" if card.weights else f"  no weights here: {card.found}"
        )
    return "\n".join(lines)


def gate_text(name: str, report: GateReport) -> str:
    """A gate's verdict."""
    return f"{name} {report.precision} ({report.why}) by {report.on}: {report.text()}"


def demo_text(demo: Demo) -> str:
    """What the demonstration made, and what to try next."""
    hits = "\n".join(f"  {line}" for line in demo.hits.text().splitlines())
    probe = "\n".join(f"  {line}" for line in demo.probe.text().splitlines())
    rate = f"{demo.run.rate:.1f} tiles/s on this machine" if demo.run.tiles else "embedded by an earlier run"
    best = demo.hits.hits[0]
    program = "patchmill" if shutil.which("patchmill") else sys.argv[0]  # of an environment that is not activated
    x, y = (best.place[axis] + 1 for axis in "xy")
    return f"""
Made from {demo.slide}, {rate}:
  {many(demo.run.tiles or demo.index.vectors, "tile")} embedded in {demo.archive}
  an index of {many(demo.index.vectors, "vector")}
  {demo.picture}: the tiles that look most like the one richest in haematoxylin
{hits}
kNN on a rule computed from the pixels: {demo.rule}.
This proves the machinery only: a colour rule says nothing about an encoder's worth in medicine.
{probe}

Try next:
  {program} status {demo.archive}
  {program} query {demo.archive} --source {Path(best.path).name} --at {x},{y} -k 5 --picture hits2.png
  {program} embed YOUR-SLIDES/ --archive my-archive --encoder efficientnet-lite0"""
