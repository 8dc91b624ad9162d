"""Embeddings as they are compared: good rows only, L2-normalised in fp32."""

import numpy as np
from jaxtyping import Float, Float32, Int64

from patchmill.archive import Archive
from patchmill.index.choice import Choice
from patchmill.types import VALID_GOOD

__all__ = ["good_vectors", "unit"]


def unit(vectors: Float[np.ndarray, "n d"]) -> Float32[np.ndarray, "n d"]:
    """Rows scaled to length 1 in fp32; a row that has no direction (zero, NaN or infinite) becomes NaN."""
    wide = np.asarray(vectors, np.float32)
    length = np.sqrt(np.einsum("nd,nd->n", wide, wide))[:, None]
    usable = np.isfinite(length) & (length > 0)
    scaled: Float32[np.ndarray, "n d"] = np.divide(wide, length, out=np.full_like(wide, np.nan), where=usable)
    return scaled


def good_vectors(
    archive: Archive, source: str, choice: Choice
) -> tuple[Int64[np.ndarray, " n"], Float32[np.ndarray, "n d"]]:
    """Row numbers and unit vectors of a complete source, without rows that are unreadable, removed or all zero.

    Raises ArchiveError if the source is not complete.
    """
    stored, valid = archive.source(source).read(choice.plan, choice.encoder, choice.output)
    rows = np.flatnonzero(valid == VALID_GOOD)
    vectors = unit(stored[rows])
    directed = np.isfinite(vectors).all(axis=1)
    return rows[directed].astype(np.int64), vectors[directed]
