"""patchmill: slides and volumes in, a searchable archive of DINOv3 embeddings out.

The verbs are functions, the settings are frozen dataclasses; both load on first use, so importing patchmill is cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {  # public name -> the module that it is loaded from
    **dict.fromkeys(
        (
            "build_index",
            "check_encoder",
            "demo",
            "doctor",
            "draw_hits",
            "embed",
            "export_encoder",
            "list_encoders",
            "preview",
            "probe_knn",
            "query_image",
            "query_place",
            "status",
            "verify",
            "write_tokens",
        ),
        "patchmill.api",
    ),
    "Archive": "patchmill.archive",
    "EncodeSettings": "patchmill.types",
    "PatchmillError": "patchmill.errors",
    "PlanSettings": "patchmill.types",
    "ImageSettings": "patchmill.types",
    "RunSettings": "patchmill.cluster",
    "VolumeSettings": "patchmill.types",
}

if TYPE_CHECKING:
    from patchmill.api import (
        build_index,
        check_encoder,
        demo,
        doctor,
        draw_hits,
        embed,
        export_encoder,
        list_encoders,
        preview,
        probe_knn,
        query_image,
        query_place,
        status,
        verify,
        write_tokens,
    )
    from patchmill.archive import Archive
    from patchmill.cluster import RunSettings
    from patchmill.errors import PatchmillError
    from patchmill.types import EncodeSettings, ImageSettings, PlanSettings, VolumeSettings

__all__ = [
    "Archive",
    "EncodeSettings",
    "ImageSettings",
    "PatchmillError",
    "PlanSettings",
    "RunSettings",
    "VolumeSettings",
    "build_index",
    "check_encoder",
    "demo",
    "doctor",
    "draw_hits",
    "embed",
    "export_encoder",
    "list_encoders",
    "preview",
    "probe_knn",
    "query_image",
    "query_place",
    "status",
    "verify",
    "write_tokens",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'patchmill' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
