"""Embeddings as they are compared: good rows only, L2-normalised in fp32."""

from typing import Literal

import numpy as np
from jaxtyping import Float, Float32, Int64

from patchmill.archive import POOLS, Archive
from patchmill.index.choice import Choice
from patchmill.types import VALID_GOOD

__all__ = ["Pool", "good_vectors", "unit", "whole_vector"]

Pool = Literal["mean", "max"]


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
    return _directed(rows, vectors)


def whole_vector(
    archive: Archive, source: str, choice: Choice, pool: Pool
) -> tuple[Int64[np.ndarray, " n"], Float32[np.ndarray, "n d"]]:
    """A complete source as one unit vector, of the mean or maximum of its tiles, as row 0; none if it has no direction.

    Raises ArchiveError if the source is not complete.
    """
    stored = archive.source(source).read_whole(choice.plan, choice.encoder, choice.output)
    return _directed(np.zeros(1, np.int64), unit(stored[POOLS.index(pool)][None]))


def _directed(
    rows: Int64[np.ndarray, " n"], vectors: Float32[np.ndarray, "n d"]
) -> tuple[Int64[np.ndarray, " n"], Float32[np.ndarray, "n d"]]:
    directed = np.isfinite(vectors).all(axis=1)
    return rows[directed].astype(np.int64), vectors[directed]
