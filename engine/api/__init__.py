"""The verbs, one function each: all that the command line and notebooks call."""

from patchmill.api.demonstration import Demo, demo
from patchmill.api.diagnosis import Finding, doctor
from patchmill.api.embedding import embed
from patchmill.api.encoders import check_encoder, export_encoder, list_encoders
from patchmill.api.features import write_tokens
from patchmill.api.holdings import Status, status
from patchmill.api.planning import Preview, preview
from patchmill.api.searching import build_index, draw_hits, probe_knn, query_image, query_place, verify

__all__ = [
    "Demo",
    "Finding",
    "Preview",
    "Status",
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
