"""How values of volumes become grey levels: the presets of configs/intensity, one YAML file each, and own windows."""

from collections.abc import Mapping
from functools import cache
from importlib.resources import files

import yaml

from patchmill.errors import UsageError
from patchmill.types import Intensity

__all__ = ["USUAL", "intensity_of", "presets"]

USUAL: Mapping[str, str] = {"CT": "ct-soft-tissue", "MR": "mri", "PT": "pet-suv"}  # by DICOM's Modality


@cache
def presets() -> Mapping[str, Intensity]:
    """The presets by name."""
    found = {}
    for file in sorted(files("patchmill.configs").joinpath("intensity").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".yaml"):
            preset = yaml.safe_load(file.read_text("utf-8"))
            windows = tuple((float(low), float(high)) for low, high in preset["windows"])
            found[file.name.removesuffix(".yaml")] = Intensity(
                windows=windows, scale=preset["scale"], units=preset["units"]
            )
    return found


def intensity_of(preset: str | None, window: str | None) -> Intensity | None:
    """What a user asks for: a preset by name, or LOW,HIGH in the volume's own values, or three such pairs with `/`.

    Ends in per cent are quantiles of the body: 0.5%,99.5%. None where nothing is asked for. Raises UsageError.
    """
    if window is not None:
        if preset is not None:
            raise UsageError("--window", f"--intensity {preset} was given too", "give one of the two")
        return window_of(window)
    if preset is None:
        return None
    if preset not in presets():
        raise UsageError("--intensity", f"no preset is called {preset!r}", f"use {', '.join(presets())}, or --window")
    return presets()[preset]


def window_of(text: str) -> Intensity:
    """The windows of a text. Raises UsageError."""
    relative = "%" in text
    try:
        pairs = [[float(end.strip().removesuffix("%")) for end in pair.split(",")] for pair in text.split("/")]
        windows = tuple((low, high) for low, high in pairs)
    except ValueError:
        wrong = f"{text!r} is no window"
        raise UsageError("--window", wrong, "write LOW,HIGH, such as -150,250 or 0.5%,99.5%") from None
    if relative:
        if text.count("%") != 2 * len(windows):
            raise UsageError("--window", f"{text!r} mixes values and per cent", "write both ends alike")
        windows = tuple((round(low / 100, 6), round(high / 100, 6)) for low, high in windows)
    return Intensity(windows=windows, scale="quantile" if relative else "value")
