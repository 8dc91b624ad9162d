"""`pack` by its definition, in NumPy: one weighted mean per output pixel. Slow; judges the fast ones."""

import numpy as np
from jaxtyping import Int32, UInt8

from patchmill.kernels.boxes import box_weights, check

__all__ = ["pack"]


def pack(
    block: UInt8[np.ndarray, "h w 3"],
    origins: Int32[np.ndarray, "n 2"],
    extent: float,
    out: UInt8[np.ndarray, "n p p 3"],
) -> None:
    """See `patchmill.kernels.cpu.pack`."""
    side = check(block, origins, extent, out)
    pixels = out.shape[1]
    first, weights = box_weights(extent, pixels)
    coverage = np.zeros((pixels, side))
    for i in range(pixels):
        used = min(weights.shape[1], side - first[i])
        coverage[i, first[i] : first[i] + used] = weights[i, :used]
    coverage /= coverage.sum(axis=1, keepdims=True)
    for n, (x, y) in enumerate(origins.tolist()):
        tile = block[y : y + side, x : x + side].astype(np.float64)
        means = np.einsum("ih,hwc,jw->ijc", coverage, tile, coverage, optimize=True)
        out[n] = np.floor(means + 0.5)
