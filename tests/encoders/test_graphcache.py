"""A graph that was kept gives the same bytes; whatever is not exactly it is authored again."""

import os
import time
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

from patchmill.encoders import gate_tiles, graphcache, open_encoder, opening, resolve, weights
from patchmill.encoders.cards import cards
from patchmill.types import EncodeSettings


@pytest.fixture
def settings(tmp_path, monkeypatch, small, small_weights, oracle):
    """A small model with trained-looking weights in a file; every graph is large enough to be kept."""
    monkeypatch.setattr(graphcache, "LEAST_BYTES", 0)
    known = {**cards(), "dinov3-vits16": small}
    monkeypatch.setattr(opening, "card", known.__getitem__)
    monkeypatch.setattr(opening, "load", lambda path, card: counted(small_weights))
    path = tmp_path / "weights.safetensors"
    save_file({"any": np.zeros(3, np.float32)}, path)
    return EncodeSettings(encoder="dinov3-vits16", weights=str(path), precision="fp32", threads=1, runtime="cpu")


class counted(dict):  # noqa: N801 - stands for a function
    """Weights that count how often they are read."""

    reads = 0

    def __getitem__(self, name):
        counted.reads += 1
        return super().__getitem__(name)


def vectors(settings):
    before = counted.reads
    encoder = open_encoder(settings)
    found = encoder(gate_tiles(224)[:2])
    encoder.close()
    return b"".join(found[name].tobytes() for name in sorted(found)), counted.reads - before


def kept(tmp_path):
    return [folder for folder in (tmp_path / "cache" / "graphs").iterdir() if folder.is_dir()]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_second_start_reads_no_weights_and_gives_the_same_bytes(settings, precision):
    settings = replace(settings, precision=precision)
    first, reads = vectors(settings)
    again, none = vectors(settings)
    assert reads > 0
    assert none == 0
    assert again == first


@pytest.mark.parametrize("name", ["graph.onnx", "graph.onnx.data", "record.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damage_is_found_and_mended(settings, tmp_path, name, damage):
    wanted, _ = vectors(settings)
    (folder,) = kept(tmp_path)
    data = bytearray((folder / name).read_bytes())
    if damage == "gone":
        (folder / name).unlink()
    elif damage == "cut":
        (folder / name).write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 255
        (folder / name).write_bytes(data)
    found, reads = vectors(settings)
    assert found == wanted
    if (name, damage) != ("record.json", "flip"):  # which may have hit the digest, and no number
        assert reads > 0
    assert vectors(settings) == (wanted, 0)
    assert len(kept(tmp_path)) == 1


def test_other_weights_pixels_precisions_and_code_have_graphs_of_their_own(settings, tmp_path, monkeypatch):
    keys = {graphcache._folder(resolve(settings))}
    keys.add(graphcache._folder(resolve(replace(settings, pixels=112))))
    keys.add(graphcache._folder(resolve(replace(settings, precision="int8"))))
    save_file({"any": np.ones(3, np.float32)}, settings.weights)
    os.utime(settings.weights, ns=(1, 1))
    keys.add(graphcache._folder(resolve(settings)))
    monkeypatch.setattr(graphcache, "code_digest", lambda: "other")
    keys.add(graphcache._folder(resolve(settings)))
    assert len(keys) == 5


def test_small_untrained_and_afresh_are_authored(settings, tmp_path, monkeypatch):
    vectors(settings)
    graph = opening._runnable(resolve(settings), counted(), "cpu", settings)
    assert isinstance(graph, graphcache.CachedGraph)
    with pytest.raises(KeyError):  # it asks for weights, of which there are none
        opening._runnable(resolve(settings), counted(), "cpu", settings, afresh=True)
    untrained = replace(settings, weights=None, untrained=0)
    vectors(untrained)
    assert len(kept(tmp_path)) == 1
    monkeypatch.setattr(graphcache, "LEAST_BYTES", 1 << 40)
    vectors(replace(settings, precision="fp16"))
    assert len(kept(tmp_path)) == 1


def test_what_was_not_used_for_longest_makes_room(settings, tmp_path, monkeypatch):
    vectors(settings)
    (old,) = kept(tmp_path)
    os.utime(old, (1, 1))
    vectors(replace(settings, precision="fp16"))
    assert len(kept(tmp_path)) == 2
    size = sum(file.stat().st_size for folder in kept(tmp_path) for file in folder.iterdir())
    monkeypatch.setattr(graphcache, "MOST_BYTES", size)
    vectors(replace(settings, precision="int8"))
    assert old not in kept(tmp_path)
    assert len(kept(tmp_path)) == 2


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(settings, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PATCHMILL_CACHE", str(tmp_path / "file"))
    first, _ = vectors(settings)
    assert vectors(settings)[0] == first


# ------------------------------------------------------------------------------------------------------- hashes


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A file that counts as large, and was written long ago; how often files are hashed."""
    monkeypatch.setattr(weights, "LARGE", 1)
    monkeypatch.setattr(weights, "SETTLED", -(10**18))
    path = tmp_path / "large.safetensors"
    path.write_bytes(b"content")
    hashed = []
    true = weights._sha256.__wrapped__

    def counting(path, facts):
        hashed.append(path)
        return true(path, facts)

    monkeypatch.setattr(weights, "_sha256", counting)
    return path, hashed


def test_a_hash_is_remembered_until_the_file_changes(large):
    path, hashed = large
    first = weights.sha256_of(path)
    assert weights.sha256_of(path) == first
    assert len(hashed) == 1
    times = path.stat()
    path.write_bytes(b"CONTENT")  # as long as before, and dated back
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert weights.sha256_of(path) != first
    assert len(hashed) == 2


def test_a_hash_that_is_damaged_or_of_a_file_just_written_is_none(large, tmp_path, monkeypatch):
    path, hashed = large
    first = weights.sha256_of(path)
    (note,) = (tmp_path / "cache" / "hashes").iterdir()
    for content in ("", "f" * 63, "nonsense", first + "\n"):
        note.write_text(content)
        assert weights.sha256_of(path) == first
    assert len(hashed) == 5
    note.unlink()
    monkeypatch.setattr(weights, "SETTLED", 10**18)
    weights.sha256_of(path)
    assert not note.exists()
    assert time.time_ns() - path.stat().st_mtime_ns < 10**18
