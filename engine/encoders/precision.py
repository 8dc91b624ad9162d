"""The precisions: which exist for an architecture, and how weights become int8."""

from typing import Literal

import numpy as np
from jaxtyping import Float32, Int8

from patchmill.encoders.cards import Architecture, CTNet, EfficientNetLite, Exported

__all__ = ["Precision", "precisions", "quantised"]

Precision = Literal["fp32", "fp16", "bf16", "int8"]
# Levels of int8 weights on each side of zero. On AVX2 without VNNI the products of two activations (0..255) and two
# weights are added in int16, which saturates above 64 levels: the result would depend on the model of CPU.
LEVELS = 64


def precisions(architecture: Architecture | Exported) -> tuple[Precision, ...]:
    """Precisions that an architecture's graph can be authored in, or is written in."""
    match architecture:
        case EfficientNetLite() | Exported():
            return ("fp32",)
        case CTNet():  # nearly all of it is convolutions, which int8 leaves in fp32
            return "fp32", "fp16", "bf16"
        case _:
            return "fp32", "fp16", "bf16", "int8"


def quantised(
    weight: Float32[np.ndarray, "in out"],
) -> tuple[Int8[np.ndarray, "in out"], Float32[np.ndarray, " out"]]:
    """Symmetric int8 weights and one scale per output channel: weight is about values * scale."""
    scale = np.maximum(np.abs(weight).max(axis=0) / LEVELS, np.finfo(np.float32).tiny).astype(np.float32)
    return np.rint(weight / scale).astype(np.int8), scale
