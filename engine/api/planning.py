"""The verb `plan`: where a source's tiles would lie, without an archive; and the files that say so."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from patchmill.api.choosing import settings_for
from patchmill.errors import SourceError, UsageError
from patchmill.plan import ROI_SUFFIXES, draw_plan, mask_of, plan_slide, plan_volume, read_roi
from patchmill.query import save_picture
from patchmill.sources import (
    CatalogEntry,
    Patience,
    PatientSlide,
    PatientVolume,
    find_sources,
    open_images,
    open_slide,
    open_volume,
)
from patchmill.types import (
    PLANES,
    QUANTILES,
    ImageSettings,
    Kind,
    PlanSettings,
    Settings,
    SourceRef,
    VolumeSettings,
    many,
)

__all__ = ["Preview", "listed", "preview", "with_rois"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """The plan of one source, in figures."""

    path: str
    kind: Kind = "slide"
    tiles: int = 0
    reader: str = ""
    mpp: float | None = None  # of a slide: what a tile pixel spans
    level: int | None = None  # of a slide: that tiles are read from
    shrink: int | None = None  # of a slide: by the codec
    tissue_mm2: float | None = None  # of a slide; None where the plan has no mask
    shape: tuple[int, int, int] | None = None  # of a volume: voxels towards right, anterior, superior
    voxel: tuple[float, float, float] | None = None  # of a volume: millimetres
    planes: Mapping[str, int] | None = None  # of a volume: tiles in each plane
    empty: int | None = None  # of a volume: tiles that hold too little of the body
    quantiles: tuple[float, float] | None = None  # of a volume: 0.5 % and 99.5 % of the body's values
    unreadable_files: int = 0  # of the folder of a DICOM series, which may be slices of it
    other_objects: int = 0  # of a DICOM series: files that bear its UID and are no slices
    picture: str | None = None  # a file
    wrong: str = ""  # why there is no plan

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def preview(
    sources: str | Path | Iterable[str | Path],
    *,
    kind: Kind | None = None,
    plan: Settings | Mapping[str, Any] | None = None,
    mask: str | Path | None = None,
    coords: str | Path | None = None,
    reader: str = "auto",
    mpp_override: float | None = None,
    voxel: tuple[float, float, float] | None = None,
    picture: str | Path | None = None,
    watch: Callable[[str, int, int], None] | None = None,
) -> tuple[Preview, ...]:
    """Plan sources as `embed` would, and say what it would do; nothing is kept.

    sources, kind, plan, mask, coords, mpp_override, voxel: as for `embed`. picture: a PNG of one slide; for several, a
    folder of them. watch: called with a volume's path, and how many of its boxes are looked at, of how many. Raises
    UsageError, and TransientError for a folder of sources that does not answer; a source that cannot be planned is in
    the result.
    """
    asked = plan if isinstance(plan, Settings) else None
    entries = find_sources(listed(sources), asked.kind if asked else kind)
    settings = asked or settings_for(entries[0].kind, plan if isinstance(plan, Mapping) else {})
    settings, rois = with_rois(entries, settings, mask, coords)
    pictures = pictures_of(entries, picture)
    return tuple(
        previewed(
            SourceRef(
                id=entry.path,
                path=entry.path,
                mpp=entry.mpp if entry.mpp is not None else mpp_override,
                reader=reader,
                roi=rois.get(entry.name),
                kind=settings.kind,
                frame=settings.frame if isinstance(settings, VolumeSettings) else None,
                spacing=voxel,
            ),
            settings,
            pictures.get(entry.name),
            watch and partial(watch, entry.path),
        )
        for entry in entries
    )


def listed(sources: str | Path | Iterable[str | Path]) -> list[str | Path]:
    """One source or many, as a list."""
    return [sources] if isinstance(sources, str | Path) else list(sources)


def previewed(
    ref: SourceRef, settings: Settings, picture: Path | None, watch: Callable[[int, int], None] | None
) -> Preview:
    """The plan of one source, drawn if there is a place for the picture."""
    try:
        with Patience(ref.id) as patience:
            match settings:
                case PlanSettings():
                    return previewed_slide(ref, settings, picture, patience)
                case VolumeSettings():
                    return previewed_volume(ref, settings, patience, watch)
                case ImageSettings():
                    images = patience.run(open_images, ref)
                    try:
                        return Preview(path=ref.path, kind="images", tiles=len(images.names), reader=images.reader)
                    finally:
                        images.close()
    except SourceError as error:
        return Preview(path=ref.path, kind=settings.kind, wrong=f"{error.wrong}; {error.do}")


def previewed_slide(ref: SourceRef, settings: PlanSettings, picture: Path | None, patience: Patience) -> Preview:
    """The plan of a slide. Raises SourceError."""
    roi = patience.run(read_roi, ref) if ref.roi is not None else None
    slide = PatientSlide(patience.run(open_slide, ref), patience)
    try:
        mask = mask_of(slide, settings, ref.id, roi)
        made = plan_slide(slide, settings, ref.id, roi, mask)
        area = None if mask is None else float(mask.tissue.sum()) * (mask.scale * slide.mpp / 1000) ** 2
        if picture is not None:
            says = "" if area is None else f", {area:.2f} sq mm of tissue"  # the font has no µ
            title = f"{many(made.rows, 'tile')} of {settings.tile} px, mpp {made.mpp:.3g}{says}"
            save_picture(draw_plan(slide, made, mask, title), picture)
        return Preview(
            path=ref.path,
            tiles=made.rows,
            mpp=made.mpp,
            level=made.level,
            shrink=made.shrink,
            reader=slide.reader,
            tissue_mm2=area,
            picture=str(picture) if picture is not None else None,
        )
    finally:
        slide.close()


def previewed_volume(
    ref: SourceRef, settings: VolumeSettings, patience: Patience, watch: Callable[[int, int], None] | None
) -> Preview:
    """The plan of a volume. Raises SourceError."""
    volume = PatientVolume(patience.run(open_volume, ref), patience)
    try:
        made = plan_volume(volume, settings, ref.id, watch)
        counts = np.bincount(made.coords[:, 0], minlength=len(PLANES)).tolist()
        known = dict(zip(QUANTILES, made.quantiles, strict=True))
        return Preview(
            path=ref.path,
            kind="volume",
            tiles=made.rows,
            reader=volume.reader,
            shape=made.shape,
            voxel=made.steps,
            planes={name: count for name, count in zip(PLANES, counts, strict=True) if count},
            empty=made.empty,
            quantiles=(known[0.005], known[0.995]),
            unreadable_files=int(volume.metadata.get("unreadable_files", 0)),
            other_objects=int(volume.metadata.get("other_objects", 0)),
        )
    finally:
        volume.close()


def pictures_of(entries: Sequence[CatalogEntry], picture: str | Path | None) -> dict[str, Path]:
    """Where the picture of each source goes."""
    if picture is None:
        return {}
    if entries[0].kind != "slide":
        raise UsageError("--picture", "plans of slides alone are drawn", "leave it out")
    if len(entries) == 1:
        if Path(picture).suffix.lower() != ".png":
            raise UsageError("--picture", f"{str(picture)!r} is no PNG", "name a file that ends in .png")
        return {entries[0].name: Path(picture)}
    if not Path(picture).is_dir():
        raise UsageError(
            "--picture", f"{len(entries)} slides do not fit into one picture", "name a folder that is there"
        )
    found = {entry.name: Path(picture) / f"{entry.name.replace('/', '_')}.png" for entry in entries}
    if len(set(found.values())) < len(found):
        raise UsageError("--picture", "two slides would have the same picture", "plan their folders one by one")
    return found


def with_rois(
    entries: Sequence[CatalogEntry], plan: Settings, mask: str | Path | None, coords: str | Path | None
) -> tuple[Settings, dict[str, str]]:
    """The plan's settings with the rule that own masks or lists of tiles make, and each source's file by its name.

    mask, coords: a file for one slide, or a folder with a file per slide: its name without the suffix, with a suffix of
    ROI_SUFFIXES or, as TRIDENT has it, `_patches.h5`. A source without a file fails by itself. Raises UsageError.
    """
    if not isinstance(plan, PlanSettings):
        if mask is not None or coords is not None:
            raise UsageError("--mask" if mask is not None else "--coords", "it is for slides", "leave it out")
        return plan, {}
    if mask is None and coords is None:
        if plan.tissue in ROI_SUFFIXES:
            raise UsageError("--tissue", f"the rule {plan.tissue!r} needs a file per slide", f"give --{plan.tissue}")
        return plan, {}
    if mask is not None and coords is not None:
        raise UsageError("--mask", "the tiles are listed in --coords already", "give one of the two")
    rule: Literal["mask", "coords"] = "mask" if mask is not None else "coords"
    if plan.tissue not in ("auto", rule):
        raise UsageError(f"--{rule}", f"the tissue rule is {plan.tissue!r}", f"leave out --tissue {plan.tissue}")
    place = Path(mask or coords or "")
    found: dict[str, str] = {}
    for entry in entries:
        roi = roi_of(entry, place, rule, len(entries))
        if roi in found.values() and Path(roi).exists():
            raise UsageError(f"--{rule}", f"{roi} would serve two slides of the same name", "embed their folders apart")
        found[entry.name] = roi
    return replace(plan, tissue=rule), found


def roi_of(entry: CatalogEntry, place: Path, rule: str, count: int) -> str:
    """The file of one source; where there is none, the one that there should be."""
    if not place.is_dir():
        if not place.exists():
            raise UsageError(f"--{rule}", f"there is no {place}", "name a file, or a folder with a file per slide")
        if count > 1:
            raise UsageError(
                f"--{rule}", f"{place} is one file for {count} slides", "name a folder with a file per slide"
            )
        if place.suffix.lower() not in ROI_SUFFIXES[rule]:
            known = ", ".join(ROI_SUFFIXES[rule])
            raise UsageError(
                f"--{rule}", f"{place} is of a kind that is not known", f"name a file that ends in {known}"
            )
        return str(place.absolute())
    stem = Path(entry.path).stem
    names = [f"{stem}{suffix}" for suffix in ROI_SUFFIXES[rule]] + ([f"{stem}_patches.h5"] if rule == "coords" else [])
    found = [place / name for name in names if (place / name).exists()]
    if len(found) > 1:
        raise UsageError(f"--{rule}", f"{found[0]} and {found[1]} are for the same slide", "leave one of them")
    return str((found[0] if found else place / names[0]).absolute())
