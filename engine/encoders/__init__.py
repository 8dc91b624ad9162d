"""Encoders: cards, weights, graphs, sessions, precisions and the execution gate. Never reads pixels from sources."""

from patchmill.encoders.cards import box_of_encoder, dtype_of
from patchmill.encoders.gate import GateReport, gate_tiles
from patchmill.encoders.intensities import USUAL, intensity_of, presets
from patchmill.encoders.opening import EncoderCard, advice, export, known, open_encoder, open_gated, placed, resolve
from patchmill.encoders.session import CpuEncoder, available_cores

__all__ = [
    "USUAL",
    "CpuEncoder",
    "EncoderCard",
    "GateReport",
    "advice",
    "available_cores",
    "box_of_encoder",
    "dtype_of",
    "export",
    "gate_tiles",
    "intensity_of",
    "known",
    "open_encoder",
    "open_gated",
    "placed",
    "presets",
    "resolve",
]
