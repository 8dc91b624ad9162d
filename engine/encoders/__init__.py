"""Encoders: cards, weights, graphs, sessions, precisions and the execution gate. Never reads pixels from sources."""

from patchmill.encoders.gate import GateReport, gate_tiles
from patchmill.encoders.opening import EncoderCard, advice, export, gpus_for, known, open_encoder, open_gated, resolve
from patchmill.encoders.session import CpuEncoder, available_cores

__all__ = [
    "CpuEncoder",
    "EncoderCard",
    "GateReport",
    "advice",
    "available_cores",
    "export",
    "gate_tiles",
    "gpus_for",
    "known",
    "open_encoder",
    "open_gated",
    "resolve",
]
