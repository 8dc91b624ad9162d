"""The verbs, one function each: all that the command line and notebooks call."""

from patchmill.api.demo import Demo, demo
from patchmill.api.doctor import Finding, doctor
from patchmill.api.embedding import embed
from patchmill.api.searching import build_index, check_encoder, draw_hits, probe_knn, query_image, query_place, verify
from patchmill.api.status import Status, status
from patchmill.encoders import known as list_encoders

__all__ = [
    "Demo",
    "Finding",
    "Status",
    "build_index",
    "check_encoder",
    "demo",
    "doctor",
    "draw_hits",
    "embed",
    "list_encoders",
    "probe_knn",
    "query_image",
    "query_place",
    "status",
    "verify",
]
