"""From the options that a user gave to the settings of a run: which of them there are depends on what is embedded."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from patchmill.encoders import USUAL, box_of_encoder, dtype_of, intensity_of, presets
from patchmill.errors import UsageError
from patchmill.sources import CatalogEntry
from patchmill.types import PLANES, EncodeSettings, Fit, ImageSettings, Kind, PlanSettings, Settings, VolumeSettings

__all__ = ["boxed", "encode_for", "settings_for"]

SETTINGS: Mapping[Kind, type[PlanSettings] | type[VolumeSettings] | type[ImageSettings]] = {
    "slide": PlanSettings,
    "volume": VolumeSettings,
    "images": ImageSettings,
}
NAMES: Mapping[Kind, str] = {"slide": "slides", "volume": "volumes", "images": "image sets"}


def settings_for(kind: Kind, options: Mapping[str, Any]) -> Settings:
    """The settings of a plan from options that may be of any kind of source; those of None were not given.

    Raises UsageError for an option that this kind of source does not have.
    """
    given = {name: value for name, value in options.items() if value is not None}
    known = {each: {field.name for field in fields(SETTINGS[each])} for each in SETTINGS}
    for name in given:
        if name not in known[kind]:
            others = " and ".join(NAMES[each] for each in SETTINGS if name in known[each])
            option = "--decode" if name == "scaled" else f"--{name.replace('_', '-')}"
            raise UsageError(option, f"it is for {others}, and these are {NAMES[kind]}", "leave it out")
    return SETTINGS[kind](**given)


def boxed(settings: Settings, encoder: str) -> Settings:
    """The settings of a plan for an encoder: one that takes whole volumes has a box of its own.

    Raises UsageError where the settings ask for other tiles than the encoder can take.
    """
    if not isinstance(settings, VolumeSettings):
        return settings
    box, usual = box_of_encoder(encoder), VolumeSettings()
    if box is None:
        if settings.slices is not None:
            raise UsageError("--encoder", f"{encoder} takes pictures, and the plan is a box", "use another encoder")
        return settings
    slices, tile, spacing = box
    wanted = replace(settings, slices=slices, tile=tile, spacing=spacing, planes=(), every=1, overlap=0)
    if settings in (wanted, replace(wanted, planes=PLANES[:1])):
        return settings
    whole = f"{encoder} takes each volume as one box of {slices} x {tile} x {tile} voxels of {spacing:g} mm"
    for name in ("slices", "tile", "spacing", "planes", "every", "overlap"):
        if getattr(settings, name) != getattr(usual, name):
            raise UsageError(f"--{name}", whole, "leave it out")
    return wanted


def encode_for(
    encode: EncodeSettings,
    entries: Sequence[CatalogEntry],
    *,
    intensity: str | None = None,
    window: str | None = None,
    slab: int | None = None,
    fit: Fit | None = None,
) -> tuple[EncodeSettings, str, str]:
    """The settings with the view that these sources ask for, units, and what is to be said of it; mostly nothing.

    intensity, window: as for `patchmill.encoders.intensity_of`; where neither is given the modality that all volumes
    name decides, and their values must then have the units. An encoder of HU has no such choice. Raises UsageError
    where that is none or several, for what these sources have no use for, and for sources that cannot be HU.
    """
    kind = entries[0].kind
    wanted: Mapping[Kind, Mapping[str, object]] = {
        "volume": {"--intensity": intensity, "--window": window, "--slab": slab},
        "images": {"--fit": fit},
    }
    for other, options in wanted.items():
        for option, value in options.items():
            if value is not None and kind != other:
                raise UsageError(option, f"it is for {NAMES[other]}, and these are {NAMES[kind]}", "leave it out")
    hounsfield = dtype_of(encode.encoder) == "int16"
    if hounsfield and kind != "volume":
        wrong = f"{encode.encoder} takes Hounsfield units, and these are {NAMES[kind]}"
        raise UsageError("--encoder", wrong, "use another encoder; this one is for CT volumes")
    if box_of_encoder(encode.encoder) is not None and (slab or encode.slab) != 1:
        raise UsageError("--slab", f"{encode.encoder} takes each volume as one box", "leave it out")
    if kind == "images":
        return replace(encode, fit=fit or encode.fit or "pad"), "", ""
    if kind == "slide":
        return encode, "", ""
    asked = intensity_of(intensity, window) or encode.intensity
    units = said = ""
    if hounsfield and asked is not None:
        option = "--intensity" if window is None else "--window"
        raise UsageError(option, f"{encode.encoder} takes Hounsfield units as they are", "leave it out")
    if hounsfield and any(entry.modality == "" for entry in entries):
        said = f"{encode.encoder} takes Hounsfield units: files that cannot tell are taken to hold them"
    if asked is None and not hounsfield:
        modalities = sorted({entry.modality for entry in entries if entry.modality is not None})
        name = USUAL.get(modalities[0]) if len(modalities) == 1 else None
        if name is None and modalities:
            found = ", ".join(each or "unknown" for each in modalities)
            wrong = f"nothing says how values become grey levels (modality: {found})"
            raise UsageError("--intensity", wrong, f"use {', '.join(presets())}, or --window LOW,HIGH")
        if name is not None:
            asked, said = presets()[name], f"intensities {name}, since the modality is {modalities[0]}"
            units = asked.units
    return replace(encode, intensity=asked, slab=encode.slab if slab is None else slab), units, said
