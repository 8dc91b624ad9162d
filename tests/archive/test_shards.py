"""How large shards are, judged by the rules themselves."""

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from patchmill.archive import choose_shard_rows
from patchmill.archive.shards import chunking, shard_starts

rates = st.floats(0, 1e6, allow_nan=False)


@given(st.integers(0, 10**7), rates, st.integers(1, 10**7))
def test_shard_rows_are_a_power_of_two_within_their_bounds(rows, rate, width):
    chosen = choose_shard_rows(rows, rate, width)
    assert chosen in [16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]
    assert chosen == 16 or chosen * width <= 64 * 2**20
    assert chosen == 16 or chosen < 2 * rows


@given(st.floats(1, 8192 / 60))
def test_a_shard_is_twenty_to_sixty_seconds_of_work(rate):
    assert 20 <= choose_shard_rows(10**7, rate, 768) / rate <= 60


@pytest.mark.parametrize(
    ("rows", "rate", "width", "chosen"),
    [(10**6, 10, 768, 256), (10**6, 5000, 2048, 8192), (41, 5000, 768, 64), (10**6, 1000, 400_000, 128), (0, 0, 1, 16)],
)
def test_shard_rows(rows, rate, width, chosen):
    assert choose_shard_rows(rows, rate, width) == chosen


@given(st.integers(0, 20_000), st.sampled_from([16, 64, 512, 1024, 2048, 8192]))
def test_chunks(rows, shard_rows):
    stored, chunk = chunking(rows, shard_rows)
    assert chunk == min(1024, shard_rows, max(16, (rows + 15) // 16 * 16))
    assert stored % chunk == 0
    assert chunking(rows, stored) == (stored, chunk)  # what is stored can be asked for again
    assert stored == shard_rows or (stored == chunk and stored >= rows)
    covered = [row for start in shard_starts(rows, stored) for row in range(start, min(start + stored, rows))]
    assert covered == list(range(rows))


def test_metadata_is_what_zarr_itself_would_write():
    from patchmill.archive.arrays import array_document, encode

    store = zarr.storage.MemoryStore()
    zarr.create_array(
        store,
        shape=(2500, 6),
        shards=(2048, 6),
        chunks=(1024, 6),
        dtype="float16",
        fill_value=np.nan,
        compressors=zarr.codecs.Crc32cCodec(),
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=["tile", "feature"],
    )
    ours = {
        "zarr.json": zarr.core.buffer.default_buffer_prototype().buffer.from_bytes(
            array_document(
                (2500, 6), "float16", file_rows=2048, chunk_rows=1024, fill=np.nan, names=("tile", "feature")
            )
        )
    }
    mine, theirs = zarr.open_array(zarr.storage.MemoryStore(ours), mode="r"), zarr.open_array(store, mode="r")
    assert repr(mine.metadata.to_dict()) == repr(theirs.metadata.to_dict())  # NaN is not equal to itself
    rows = np.random.default_rng(0).standard_normal((2048, 6)).astype(np.float16)
    zarr.open_array(store, mode="r+")[:2048] = rows
    assert encode(ours["zarr.json"].to_bytes(), rows, 0) == store._store_dict["c.0.0"].to_bytes()
