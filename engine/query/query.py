"""An image or a place in a source -> the tiles of the archive that look most like it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from patchmill.archive import Archive
from patchmill.encoders import open_encoder, resolve
from patchmill.encoders.runtimes import RUNS
from patchmill.errors import EncoderError, UsageError
from patchmill.index import Exclusion, Index, open_index, place_of, place_text, recorded, row_of, tile_at
from patchmill.query.image import read_image, read_member
from patchmill.types import VALID_GOOD, EncoderSpec, EncodeSettings, ImagePlan, Plan, PlanSettings, many

__all__ = ["Hit", "QueryResult", "query_image", "query_place"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """One tile that was found."""

    rank: int  # from 1
    source: str  # source id
    path: str  # the user's own; for the terminal alone, `QueryResult.as_dict` leaves it out
    row: int  # of the plan
    place: Mapping[str, Any] = field(hash=False)  # where it lies in its source; see `patchmill.index.place_of`
    score: float  # cosine, -1 to 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QueryResult:
    """What a query found, and by which embeddings."""

    query: str  # what was searched for, in words
    index: str
    plan: str  # plan key
    encoder: str  # encoder key
    encoder_name: str
    output: str
    untrained: bool  # random weights: the hits mean nothing
    unindexed: int  # complete sources that the index does not hold yet
    hits: tuple[Hit, ...]
    place: Hit | None  # the tile that was searched for, rank 0, where a place was asked for
    image: UInt8[np.ndarray, "h w 3"] | None  # the encoder's input, where an image was asked for
    point: tuple[float, ...] | None = None  # the place that was asked for, as it was given

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know."""
        notes = []
        if self.untrained:
            notes.append("the encoder is untrained: the hits prove the machinery, nothing else")
        if self.unindexed:
            notes.append(
                f"{many(self.unindexed, 'source is', 'sources are')} not in the index yet: run patchmill index"
            )
        return tuple(notes)

    def as_dict(self) -> dict[str, Any]:
        """As JSON-able values that name sources by id alone."""
        hits = [
            {"rank": hit.rank, "source": hit.source, "row": hit.row, "score": hit.score, **hit.place}
            for hit in self.hits
        ]
        names = ("query", "index", "plan", "encoder", "encoder_name", "output", "untrained", "unindexed")
        return {**{name: getattr(self, name) for name in names}, "hits": hits, "notes": list(self.notes)}

    def text(self) -> str:
        """For the terminal; it names the user's files."""
        lines = [f"{self.query}, by {self.encoder_name} {self.output}, index {self.index}"]
        lines += [f"{hit.rank:>4}  {hit.score:.4f}  {hit.path}  {place_text(hit.place)}" for hit in self.hits]
        return "\n".join([*lines, *(() if self.hits else ("nothing else is in the index",)), *self.notes])


def query_image(
    archive: Archive, image: Path, k: int = 10, *, index: str = "default", weights: str | None = None
) -> QueryResult:
    """The k tiles that look most like an image file.

    The image is taken as one tile of the index's plan, at its mpp, or as one more image of a set (`read_image` and
    `read_member` say how). weights: the file that the
    archive was embedded with, where it is not found by itself. Raises UsageError for an image that cannot be used,
    EncoderError where the archive's encoder cannot be had again, ArchiveError for a stale or damaged index.
    """
    opened = open_index(archive, index)
    spec = _spec(archive, opened)
    if spec.view.dtype == "int16":
        wrong = f"{spec.name} takes Hounsfield units, which a picture does not hold"
        raise UsageError("--image", wrong, "give a place of a source: --source and --at")
    pixels = read_image(image, spec.view.pixels) if spec.view.fit is None else read_member(image, spec.view)
    vector = _embed(spec, pixels, weights)[opened.manifest.output]
    key = opened.manifest.plan
    plan = recorded(archive.plans(), f"plans/{key}.json", key)
    span = f" of {plan.tile} px at {plan.mpp:g} µm/px" if isinstance(plan, PlanSettings) else ""
    query = f"an image, taken as one tile{span}"
    return _result(archive, opened, vector, k, query=query, image=pixels)


def query_place(
    archive: Archive, source: str, point: Sequence[float] | str, k: int = 10, *, index: str = "default"
) -> QueryResult:
    """The k tiles that look most like the one at a place; that tile itself is left out.

    source: id, name or path. point: of a slide, x and y in level-0 pixels; of a volume, x, y, z in millimetres, RAS+;
    of an image set, the number of an image, or its name. Of several tiles that contain the place, the one whose centre
    is nearest is taken; its stored embedding is used, so no encoder is needed. Raises UsageError for an unknown source,
    a place without a tile, and a source without these embeddings; ArchiveError for a stale or damaged index.
    """
    ref = archive.lookup(source)
    opened = open_index(archive, index)
    manifest = opened.manifest
    store = archive.source(ref.id)
    if store.completion(manifest.plan, manifest.encoder) is None:
        raise UsageError(f"source {ref.id}", "it is not completely embedded as the index is", "run patchmill embed")
    plan = store.read_plan(manifest.plan)
    vectors, valid = store.read(manifest.plan, manifest.encoder, manifest.output)
    row = _named(archive, plan, point) if isinstance(point, str) else tile_at(plan, point)
    if valid[row] != VALID_GOOD:
        raise UsageError("--at", f"tile {row} there has no embedding", "choose another place")
    place = _hit(0, ref.id, ref.path, row, plan, 1.0)
    return _result(
        archive,
        opened,
        vectors[row : row + 1],
        k,
        exclude=(ref.id, row),
        query=f"the tile at {place_text(place.place)} of source {ref.id}",
        place=place,
        point=None if isinstance(point, str) else tuple(point),
    )


def _named(archive: Archive, plan: Plan, name: str) -> int:
    """The row of an image by its name in the set."""
    if not isinstance(plan, ImagePlan):
        raise UsageError("--at", f"{name!r} is no place", "give numbers: X,Y of a slide, X,Y,Z of a volume")
    found = row_of(plan, archive.item_id(name))
    if found is None:
        raise UsageError("--at", f"the set has no image {name!r}", "name it as it lies in the folder or file")
    return found


def _spec(archive: Archive, index: Index) -> EncoderSpec:
    key = index.manifest.encoder
    return recorded(archive.encoders(), f"encoders/{key}.json", key).spec


def _embed(
    spec: EncoderSpec, pixels: UInt8[np.ndarray, "h w 3"], weights: str | None
) -> dict[str, Float[np.ndarray, "1 d"]]:
    """Embed one tile with the encoder that the archive was made with, or refuse."""
    settings = EncodeSettings(
        encoder=spec.name,
        weights=weights,
        untrained=int(spec.weights.removeprefix("untrained:")) if spec.untrained else None,
        precision=spec.precision,
        pixels=spec.view.pixels,
        intensity=spec.view.intensity,
        slab=spec.view.slab,
        fit=spec.view.fit,
        runtime="cpu" if spec.precision in RUNS["cpu"] else "auto",  # a GPU would be opened longer than it works
    )
    found = resolve(settings)
    if found.weights != spec.weights:
        wrong = f"the weights found are not those that the archive was made with ({spec.weights[:12]})"
        raise EncoderError(spec.name, wrong, "name the file with --weights")
    if found.key != spec.key:
        raise EncoderError(spec.name, "this version builds it differently", "use the version that embedded the archive")
    encoder = open_encoder(settings)
    try:
        return dict(encoder(pixels[None]))
    finally:
        encoder.close()


def _result(
    archive: Archive,
    index: Index,
    vector: Float[np.ndarray, "1 d"],
    k: int,
    *,
    query: str,
    exclude: Exclusion | None = None,
    place: Hit | None = None,
    image: UInt8[np.ndarray, "h w 3"] | None = None,
    point: tuple[float, ...] | None = None,
) -> QueryResult:
    manifest = index.manifest
    spec = _spec(archive, index)
    (found,) = index.search(vector, k, () if exclude is None else (exclude,))
    ids = {one.source for one in found}
    paths = {id: archive.ref(id).path for id in ids}
    plans = {id: archive.source(id).read_plan(manifest.plan) for id in ids}
    return QueryResult(
        query=query,
        index=index.name,
        plan=manifest.plan,
        encoder=manifest.encoder,
        encoder_name=spec.name,
        output=manifest.output,
        untrained=spec.untrained,
        unindexed=index.unindexed,
        hits=tuple(
            _hit(rank, one.source, paths[one.source], one.row, plans[one.source], one.score)
            for rank, one in enumerate(found, 1)
        ),
        place=place,
        image=image,
        point=point,
    )


def _hit(rank: int, source: str, path: str, row: int, plan: Plan, score: float) -> Hit:
    return Hit(rank=rank, source=source, path=path, row=row, place=place_of(plan, row), score=score)
