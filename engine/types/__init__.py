"""What travels between the stages, and the settings that users choose. Imports NumPy only: every package may use it."""

from patchmill.types.common import VALID_GOOD, VALID_NOT_WRITTEN, VALID_REMOVED, VALID_UNREADABLE, fingerprint_of
from patchmill.types.encoding import TOKEN, Encoder, EncoderSpec, EncodeSettings, Intensity, View
from patchmill.types.plans import (
    PLANE_AXES,
    PLANES,
    QUANTILES,
    Block,
    ImagePlan,
    ImageSettings,
    Plan,
    PlanSettings,
    Settings,
    SlidePlan,
    VolumePlan,
    VolumeSettings,
    centred,
)
from patchmill.types.sources import Fit, ImageSet, Kind, Level, Slide, SourceRef, Volume
from patchmill.types.streaming import Batch, Shard, ShardResult

__all__ = [
    "PLANES",
    "PLANE_AXES",
    "QUANTILES",
    "TOKEN",
    "VALID_GOOD",
    "VALID_NOT_WRITTEN",
    "VALID_REMOVED",
    "VALID_UNREADABLE",
    "Batch",
    "Block",
    "EncodeSettings",
    "Encoder",
    "EncoderSpec",
    "Fit",
    "ImagePlan",
    "ImageSet",
    "ImageSettings",
    "Intensity",
    "Kind",
    "Level",
    "Plan",
    "PlanSettings",
    "Settings",
    "Shard",
    "ShardResult",
    "Slide",
    "SlidePlan",
    "SourceRef",
    "View",
    "Volume",
    "VolumePlan",
    "VolumeSettings",
    "centred",
    "fingerprint_of",
]
