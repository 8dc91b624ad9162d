"""FAISS over an archive's embeddings: build, search, and which embeddings are meant."""

from patchmill.index.build import IndexReport, build_index
from patchmill.index.choice import Choice, choose, recorded
from patchmill.index.places import place_of, place_text, row_of, tile_at
from patchmill.index.search import Exclusion, Found, Index, open_index
from patchmill.index.vectors import Pool, good_vectors, whole_vector

__all__ = [
    "Choice",
    "Exclusion",
    "Found",
    "Index",
    "IndexReport",
    "Pool",
    "build_index",
    "choose",
    "good_vectors",
    "open_index",
    "place_of",
    "place_text",
    "recorded",
    "row_of",
    "tile_at",
    "whole_vector",
]
