"""A contact sheet of what a query found: the query, then its hits with rank, score and place."""

import math
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from patchmill.archive import Archive
from patchmill.errors import NoSpaceError, SourceError, UsageError
from patchmill.index import place_text
from patchmill.query.query import Hit, QueryResult
from patchmill.query.tiles import SIDE, shrunk, tiles_of

__all__ = ["draw_hits", "save_picture"]

GAP = 20
CAPTION = 48  # height of the two lines under a tile
COLUMNS = 5
HEAD = 56
PAPER, INK, FAINT, FRAME, ABSENT, WARNING = "#ffffff", "#1a1a1a", "#6b6b6b", "#d0d0d0", "#b5b5b5", "#c0392b"


def draw_hits(archive: Archive, result: QueryResult, out: Path) -> None:
    """Write a PNG with the query's tile and those of its hits, read from their sources.

    A tile whose source cannot be read, for instance because its file has moved, is a grey square that says so. The
    picture names sources by id. Raises UsageError or NoSpaceError if it cannot be written; then no part of it is left.
    """
    tiles = _tiles(archive, result)
    shown = [tiles.get(hit) for hit in result.hits]
    query = shrunk(result.image) if result.image is not None else tiles.get(result.place)
    image = _sheet(result, query, shown)
    save_picture(image, out)


def save_picture(image: Image.Image, out: Path) -> None:
    """Write a PNG, whole or not at all, over nothing but another file that ends in .png.

    Raises UsageError, or NoSpaceError where the disk is full.
    """
    if out.suffix.lower() != ".png" or (os.path.lexists(out) and not out.is_file()):  # no slide, no device
        raise UsageError(str(out), "pictures are PNG files", "name a file that ends in .png")
    partial = out.with_name(f".{os.getpid()}.partial")  # shorter than any name that is allowed
    try:
        image.save(partial, format="PNG")
        os.replace(partial, out)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        if error.errno in NoSpaceError.FULL:
            raise NoSpaceError.of(str(out), error) from error
        raise UsageError(str(out), f"cannot be written ({type(error).__name__})", "choose another place") from error


def _tiles(archive: Archive, result: QueryResult) -> dict[Hit | None, Image.Image]:
    """The tiles that can be read; every source is opened once and closed."""
    tiles: dict[Hit | None, Image.Image] = {}
    view = archive.encoders()[result.encoder].spec.view
    wanted = [*result.hits, *([result.place] if result.place else [])]
    for source in dict.fromkeys(hit.source for hit in wanted):
        plan = archive.source(source).read_plan(result.plan)
        with suppress(SourceError), tiles_of(archive, source, plan, view) as tile:
            for hit in wanted:
                if hit.source == source:
                    with suppress(SourceError):  # this region alone may be damaged
                        tiles[hit] = tile(hit.row, result.point if hit is result.place else None)
    return tiles


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
    place = hit.place
    if "mm" in place:  # the slice is seen, and the line is short
        return f"{hit.source[:8]}  {place['plane']} {place['slice']}: {', '.join(f'{mm:.0f}' for mm in place['mm'])} mm"
    return f"{hit.source[:8]}  {place_text(place)}"
