"""Labels from a CSV, resolved to sources and rows of an archive."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from patchmill.archive import Archive
from patchmill.errors import UsageError
from patchmill.index import Choice, row_of, tile_at
from patchmill.types import Plan, SourceRef

__all__ = ["Label", "read_labels"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """One line of the CSV: the label of a tile, or of a source with all its tiles."""

    source: str  # source id
    origin: str  # what is of one piece: the patient, where the archive knows none the source, but of a set the image
    row: int | None  # row of the source's plan; None: the whole source
    label: str
    split: str | None  # train or test
    group: str  # tiles of one group are never on both sides of a split that is made here


def read_labels(path: Path, archive: Archive, choice: Choice) -> tuple[Label, ...]:
    """The labels of a CSV with the columns `source` and `label`, and if wanted a place, `split`, `group`.

    `source` is an id, a name or a path. A place is `row`, or `x` and `y` in level-0 pixels of a slide, or `x`, `y`, `z`
    in millimetres (RAS+) of a volume, which mean the tile that contains them, or `image`, its name in an image set.
    `split` is train or test. Without a `group` column the group is the archive's subject, or the source where it has
    none, or the image in a set.
    Raises UsageError naming the line: unknown source, no such row, no tile at a place, missing column or value, a
    tile or source that is labelled twice.
    """
    lines = _lines(path)
    columns = set(lines[0][1])
    labels = []
    seen: dict[tuple[str, int | None], int] = {}
    refs: dict[str, SourceRef] = {}
    plans: dict[str, Plan] = {}
    for number, line in lines:
        where = f"{path.name} line {number}"
        text = _value(line, "source", where)
        if text not in refs:
            refs[text] = _lookup(archive, text, where)
        ref = refs[text]
        row = None
        if columns & {"row", "x", "image"}:
            if ref.id not in plans:
                plans[ref.id] = _plan(archive, ref.id, choice, where)
            row = _row(line, plans[ref.id], where, archive)
        if (ref.id, row) in seen:
            what = "this source" if row is None else f"tile {row} of this source"
            raise UsageError(where, f"{what} is labelled in line {seen[ref.id, row]} already", "keep one of them")
        seen[ref.id, row] = number
        origin = f"{ref.id}/{row}" if "image" in columns else ref.subject or ref.id
        labels.append(
            Label(
                source=ref.id,
                origin=origin,
                row=row,
                label=_value(line, "label", where),
                split=_split(line, where) if "split" in columns else None,
                group=_value(line, "group", where) if "group" in columns else ref.subject or origin,
            )
        )
    return tuple(labels)


def _lines(path: Path) -> list[tuple[int, Mapping[str, str]]]:
    """Line numbers and lines; at least one. Raises UsageError if it is no CSV or a needed column is missing."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = reader.fieldnames or ()
            lines: list[tuple[int, Mapping[str, str]]] = [(reader.line_num, line) for line in reader]
    except OSError as error:
        raise UsageError(path.name, f"cannot be read ({type(error).__name__})", "check --labels") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(path.name, "is no CSV in UTF-8", "save it as CSV") from error
    for column in ("source", "label"):
        if column not in columns:
            found = ", ".join(columns) or "none"
            raise UsageError(path.name, f"has no column {column!r}, but {found}", "name the columns in the first line")
    if ("x" in columns) != ("y" in columns):
        raise UsageError(path.name, "has only one of the columns x and y", "give both, or row, or none of them")
    if {"row", "x"} <= set(columns):
        raise UsageError(path.name, "names tiles both by row and by x, y", "keep one of the two")
    if "image" in columns and {"row", "x"} & set(columns):
        raise UsageError(path.name, "names tiles both by image and by place", "keep one of the two")
    if not lines:
        raise UsageError(path.name, "has no line below its first", "add a line for each tile or source")
    for number, line in lines:
        if None in line or None in line.values():
            raise UsageError(f"{path.name} line {number}", "has not as many values as columns", "check its commas")
    return lines


def _value(line: Mapping[str, str], column: str, where: str) -> str:
    text = line[column].strip()
    if not text:
        raise UsageError(where, f"has no {column}", f"fill the column {column}")
    return text


def _number(line: Mapping[str, str], column: str, where: str) -> float:
    text = _value(line, column, where)
    try:
        return float(text)
    except ValueError as error:
        raise UsageError(where, f"{column} is {text!r}, no number", f"correct the column {column}") from error


def _split(line: Mapping[str, str], where: str) -> str:
    text = _value(line, "split", where)
    if text not in ("train", "test"):
        raise UsageError(where, f"split is {text!r}", "use train or test")
    return text


def _row(line: Mapping[str, str], plan: Plan, where: str, archive: Archive) -> int:
    if "image" in line:
        name = _value(line, "image", where)
        found = row_of(plan, archive.item_id(name))
        if found is None:
            raise UsageError(
                where, f"there is no image {name!r} in the set", "name it as it lies in the folder or file"
            )
        return found
    if "row" not in line:
        point = [_number(line, axis, where) for axis in ("x", "y", "z") if axis in line]
        try:
            return tile_at(plan, point)
        except UsageError as error:
            raise UsageError(where, f"{error.where}: {error.wrong}", error.do) from error
    row = _number(line, "row", where)
    if not (0 <= row < plan.rows and row.is_integer()):
        wrong = f"there is no row {line['row'].strip()}"
        raise UsageError(where, wrong, f"the source has {plan.rows} rows, counted from 0")
    return int(row)


def _lookup(archive: Archive, text: str, where: str) -> SourceRef:
    try:
        return archive.lookup(text)
    except UsageError as error:
        raise UsageError(where, f"{error.where}: {error.wrong}", error.do) from error


def _plan(archive: Archive, source: str, choice: Choice, where: str) -> Plan:
    store = archive.source(source)
    if not store.has_plan(choice.plan):
        raise UsageError(where, f"source {source} has no plan {choice.plan}", "run patchmill embed on it first")
    return store.read_plan(choice.plan)
