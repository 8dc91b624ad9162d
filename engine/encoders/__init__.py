"""Encoders: cards, weights, graphs, sessions, precisions and the execution gate. Never reads pixels from sources."""

from patchmill.encoders.gate import GateReport, gate_tiles
from patchmill.encoders.opening import EncoderCard, export, known, open_encoder, open_gated, resolve
from patchmill.encoders.session import CpuEncoder

__all__ = [
    "CpuEncoder",
    "EncoderCard",
    "GateReport",
    "export",
    "gate_tiles",
    "known",
    "open_encoder",
    "open_gated",
    "resolve",
]
