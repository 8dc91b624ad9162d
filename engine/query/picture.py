"""A contact sheet of what a query found: the query, then its hits with rank, score and place."""

import math
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from patchmill.archive import Archive
from patchmill.errors import SourceError, UsageError
from patchmill.kernels import pack
from patchmill.query.query import Hit, QueryResult
from patchmill.sources import open_slide
from patchmill.types import Slide, SlidePlan

__all__ = ["draw_hits", "save_picture"]

SIDE = 224  # pixels of a tile in the picture
GAP = 20
CAPTION = 48  # height of the two lines under a tile
COLUMNS = 5
HEAD = 56
PAPER, INK, FAINT, FRAME, ABSENT, WARNING = "#ffffff", "#1a1a1a", "#6b6b6b", "#d0d0d0", "#b5b5b5", "#c0392b"


def draw_hits(archive: Archive, result: QueryResult, out: Path) -> None:
    """Write a PNG with the query's tile and those of its hits, read from their sources.

    A tile whose source cannot be read, for instance because its file has moved, is a grey square that says so. The
    picture names sources by id. Raises UsageError if it cannot be written; then no part of it is left behind.
    """
    tiles = _tiles(archive, result)
    shown = [tiles.get(hit) for hit in result.hits]
    query = _shrink(result.image) if result.image is not None else tiles.get(result.place)
    image = _sheet(result, query, shown)
    save_picture(image, out)


def save_picture(image: Image.Image, out: Path) -> None:
    """Write a PNG, whole or not at all, over nothing but another file that ends in .png. Raises UsageError."""
    if out.suffix.lower() != ".png" or (os.path.lexists(out) and not out.is_file()):  # no slide, no device
        raise UsageError(str(out), "pictures are PNG files", "name a file that ends in .png")
    partial = out.with_name(f".{os.getpid()}.partial")  # shorter than any name that is allowed
    try:
        image.save(partial, format="PNG")
        os.replace(partial, out)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise UsageError(str(out), f"cannot be written ({type(error).__name__})", "choose another place") from error


def _tiles(archive: Archive, result: QueryResult) -> dict[Hit | None, Image.Image]:
    """The tiles that can be read; every source is opened once and closed."""
    tiles: dict[Hit | None, Image.Image] = {}
    wanted = [*result.hits, *([result.place] if result.place else [])]
    for source in dict.fromkeys(hit.source for hit in wanted):
        plan = archive.source(source).read_plan(result.plan)
        try:
            slide = open_slide(archive.ref(source))
        except SourceError:
            continue
        try:
            for hit in wanted:
                if hit.source == source:
                    with suppress(SourceError):  # this region alone may be damaged
                        tiles[hit] = _shrink(read_tile(slide, plan, hit.row))
        finally:
            slide.close()
    return tiles


def read_tile(slide: Slide, plan: SlidePlan, row: int) -> UInt8[np.ndarray, "tile tile 3"]:
    """The pixels of one tile of a plan, at the plan's mpp, read for itself alone. Raises SourceError."""
    x, y = (math.ceil(value / plan.downsample - 1e-6) for value in plan.coords[row].tolist())
    side = math.ceil(plan.extent - 1e-6)
    tile: UInt8[np.ndarray, "tile tile 3"] = np.empty((plan.settings.tile, plan.settings.tile, 3), np.uint8)
    pixels = slide.read(plan.level, x, y, side, side, plan.shrink)
    pack(pixels[None], np.zeros((1, 1), np.int32), np.zeros((1, 2), np.int32), plan.extent, tile[None])
    return tile


def _shrink(tile: UInt8[np.ndarray, "h w 3"]) -> Image.Image:
    return Image.fromarray(tile).resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def _sheet(result: QueryResult, query: Image.Image | None, tiles: Sequence[Image.Image | None]) -> Image.Image:
    columns = max(1, min(COLUMNS, len(tiles)))
    lines = max(1, math.ceil(len(tiles) / columns))
    step_x, step_y = SIDE + GAP, SIDE + CAPTION + GAP
    left = GAP + step_x + GAP  # the query has a column of its own
    sheet = Image.new("RGB", (left + columns * step_x, HEAD + lines * step_y + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    warning = "UNTRAINED ENCODER: " if result.untrained else ""
    title = f"{warning}{result.encoder_name} {result.output}, index {result.index}"
    draw.text((GAP, GAP), title, WARNING if result.untrained else INK, ImageFont.load_default(20))
    draw.line((left - GAP, HEAD, left - GAP, sheet.height - GAP), FRAME)
    _cell(draw, sheet, (GAP, HEAD), query, "query", _place(result.place) if result.place else "image")
    for i, (hit, tile) in enumerate(zip(result.hits, tiles, strict=True)):
        corner = (left + i % columns * step_x, HEAD + i // columns * step_y)
        _cell(draw, sheet, corner, tile, f"{hit.rank}.  {hit.score:.4f}", _place(hit))
    return sheet


def _cell(
    draw: ImageDraw.ImageDraw, sheet: Image.Image, at: tuple[int, int], tile: Image.Image | None, name: str, place: str
) -> None:
    x, y = at
    if tile is None:
        draw.rectangle((x, y, x + SIDE - 1, y + SIDE - 1), ABSENT)
        middle = (x + SIDE / 2, y + SIDE / 2)
        draw.multiline_text(
            middle, "the source's file\ncannot be read", INK, ImageFont.load_default(16), anchor="mm", align="center"
        )
    else:
        sheet.paste(tile, at)
        draw.rectangle((x - 1, y - 1, x + SIDE, y + SIDE), outline=FRAME)  # white tiles end somewhere, too
    draw.text((x, y + SIDE + 4), name, INK, ImageFont.load_default(18))
    draw.text((x, y + SIDE + 26), place, FAINT, ImageFont.load_default(14))


def _place(hit: Hit) -> str:
    return f"{hit.source[:8]}  x {hit.x}, y {hit.y}"
