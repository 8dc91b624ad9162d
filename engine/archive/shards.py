"""How many rows a shard holds, and which shards a plan has."""

from math import log2

__all__ = ["choose_shard_rows", "chunking", "shard_starts"]

LEAST_ROWS, MOST_ROWS = 16, 8192
MOST_BYTES = 64 * 2**20  # of one file; also bounds what a worker holds per open shard
SECONDS = 30.0  # of work that a kill may cost; the nearest power of two lies between 21 and 43 s
CHUNK_ROWS = 1024  # rows per checksum inside a shard


def choose_shard_rows(rows: int, rate: float, bytes_per_row: int) -> int:
    """Rows per shard for an encoder of this rate: a power of two from 16 to 8192.

    rows: of the plan. rate: tiles per second. bytes_per_row: of the widest array, as stored. About 30 s of work, at
    most 64 MiB per file, and not more than the next power of two above `rows`.
    """
    wanted = 1 << round(log2(max(rate * SECONDS, 1.0)))
    fitting = 1 << int(log2(max(MOST_BYTES // max(bytes_per_row, 1), 1)))
    enough = 1 << max(rows - 1, 0).bit_length()
    return max(LEAST_ROWS, min(wanted, fitting, enough, MOST_ROWS))


def chunking(rows: int, shard_rows: int) -> tuple[int, int]:
    """Rows per shard and rows per chunk as an array of `rows` rows stores them.

    Chunks hold min(1024, shard rows, rows rounded up to 16). Where all rows fit into one chunk, the shard is as small
    as that chunk: a shard must be a whole number of chunks.
    """
    padded = max(-(-rows // LEAST_ROWS) * LEAST_ROWS, LEAST_ROWS)
    chunk_rows = min(CHUNK_ROWS, shard_rows, padded)
    return (padded, padded) if chunk_rows == padded else (shard_rows, chunk_rows)


def shard_starts(rows: int, shard_rows: int) -> range:
    """The first rows of all shards."""
    return range(0, rows, shard_rows)
