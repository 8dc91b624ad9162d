"""The encoder of torch on a GPU: its chunks, and the order in which its streams hand them over."""

import gc
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from patchmill.encoders import gate_tiles, torchsession, vit
from patchmill.encoders.cards import card
from patchmill.encoders.gate import judge, reference_of
from patchmill.encoders.layout import untrained
from patchmill.encoders.session import CpuEncoder
from patchmill.encoders.torchsession import SLOTS, TorchEncoder
from patchmill.errors import EncoderError
from patchmill.types import EncoderSpec, View
from tests.encoders.streams import DEVICE, Gpu, torch_with

SIDE = 64


def first(ready):
    return ready[0]


def last(ready):
    return ready[-1]


# What is queued is done at the last moment or at once, copies before work or work before copies, or as dice fall.
ORDERS = {
    "late, copies first": (first, 0),
    "late, work first": (last, 0),
    "at once": (first, 9),
    "one by one, copies first": (first, 1),
    "one by one, work first": (last, 1),
    **{f"dice {seed}": (random.Random(seed).choice, seed % 3) for seed in range(3)},
}


@pytest.fixture(params=ORDERS)
def gpu(request, monkeypatch):
    return placed(monkeypatch, *ORDERS[request.param])


@pytest.fixture
def late(monkeypatch):
    return placed(monkeypatch, first, 0)


def placed(monkeypatch, order, eager):
    made = Gpu(order, eager)
    monkeypatch.setattr(torchsession, "torch", torch_with(made))
    return made


def made_of(chosen, tokens=None):
    """An encoder's spec and its graph for small tiles, at two blocks."""
    arch = replace(chosen.architecture, depth=2)
    spec = EncoderSpec(
        name=chosen.name,
        architecture={"depth": 2},
        weights="untrained:5",
        view=View(pixels=SIDE, dtype=chosen.dtype),
        precision="fp32",
        outputs=chosen.outputs,
        license="none",
        tokens=tokens,
    )
    return spec, vit.build(arch, untrained(arch, 5), SIDE, outputs=list(spec.shapes))


@pytest.fixture(scope="module")
def plain():
    return made_of(card("dinov3-vits16"))


@pytest.fixture(scope="module")
def tiles():
    return gate_tiles(SIDE)


def on_cpu(spec, model, tiles):
    encoder = CpuEncoder(spec, model, 2)
    try:
        return encoder(tiles)
    finally:
        encoder.close()


def assert_near(found, wanted, rows=slice(None)):
    assert list(found) == list(wanted)
    for name, vectors in found.items():
        np.testing.assert_allclose(vectors, wanted[name][rows], atol=1e-4)


def test_vectors_are_those_of_the_cpu_however_the_streams_go(gpu, plain, tiles):
    """20 tiles are more chunks than there are slots, so that each of them is used again."""
    encoder, wanted = TorchEncoder(*plain, batch=6), on_cpu(*plain, tiles[:20])
    gpu.chunks.clear()
    for rows in (20, 1, 3, 7):
        assert_near(encoder(tiles[:rows]), wanted, slice(rows))
    assert gpu.chunks == [(3, SIDE, SIDE, 3)] * (7 + 1 + 1 + 3)  # the last one filled up
    assert SLOTS < 7
    assert encoder.batch == 6
    encoder.close()


@pytest.mark.parametrize("name", ["dinov3-vits16", "meddinov3-vitb16"])
def test_dense_features_and_hounsfield_units(gpu, name):
    chosen = card(name)
    spec, model = made_of(chosen, tokens=(4, 4, chosen.architecture.width))
    shown = gate_tiles(SIDE, "hounsfield" if chosen.dtype == "int16" else "histology")[:7]
    assert shown.dtype == chosen.dtype
    encoder = TorchEncoder(spec, model, batch=4)
    found = encoder(shown)
    encoder.close()
    assert list(found) == ["cls", "mean", "token"]
    assert found["token"].shape == (7, 4, 4, chosen.architecture.width)
    assert_near(found, on_cpu(spec, model, shown))


def test_a_tile_has_the_same_bytes_at_every_place(late, plain, tiles):
    encoder = TorchEncoder(*plain, batch=8)
    report = judge(encoder, reference_of(*plain, 2))
    encoder.close()
    assert report.passed
    assert report.batch_equal
    assert report.on.endswith("on Some GPU")


def test_batches_of_several_threads_do_not_mix(gpu, plain, tiles):
    encoder = TorchEncoder(*plain, batch=6)
    alone = encoder(tiles[:8])
    with ThreadPoolExecutor(encoder.parallel) as pool:
        for found, step in zip(pool.map(encoder, [tiles[:8], tiles[7::-1]] * 4), [1, -1] * 4, strict=True):
            assert all(np.array_equal(found[name][::step], alone[name]) for name in alone)
    encoder.close()


def test_what_was_given_back_is_not_written_to_again(late, plain, tiles):
    encoder = TorchEncoder(*plain, batch=6)
    found = encoder(tiles[:5])
    before = {name: vectors.copy() for name, vectors in found.items()}
    encoder(tiles[5:10])
    encoder.close()
    assert all(np.array_equal(found[name], before[name]) for name in before)


def test_closing_gives_the_memory_back_and_is_safe_to_repeat(late, plain, tiles):
    encoder = TorchEncoder(*plain, batch=6)
    assert any(each.place == DEVICE for each in late.buffers)
    encoder.close()
    encoder.close()
    gc.collect()
    assert not late.buffers
    with pytest.raises(EncoderError, match="the encoder is closed; open it again"):
        encoder(tiles[:1])


def test_a_gpu_that_has_failed_can_still_be_closed(late, plain, monkeypatch):
    encoder = TorchEncoder(*plain, batch=6)

    def failing(device):
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torchsession.torch.cuda, "synchronize", failing)
    encoder.close()


FAILURES = {
    RuntimeError("\nCUDA error: an illegal memory access\nCompile with `TORCH_USE_CUDA_DSA`"): (
        "CUDA error: an illegal memory access; use --runtime cuda or cpu"
    ),
    RuntimeError("backend='inductor' raised:\nRuntimeError: no C compiler"): (
        "RuntimeError: no C compiler; use --runtime cuda or cpu"
    ),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"): (
        "its memory is full; use a smaller --batch, or --pixels"
    ),
    RuntimeError(): "RuntimeError; use --runtime cuda or cpu",
}


@pytest.mark.parametrize(("failure", "told"), FAILURES.items(), ids=str)
def test_a_failure_is_one_line(late, plain, tiles, failure, told):
    late.failure = failure
    with pytest.raises(EncoderError) as caught:
        TorchEncoder(*plain, batch=6)
    assert str(caught.value) == f"dinov3-vits16: cannot be opened on the GPU: {told}"
    encoder = TorchEncoder(*plain, batch=6)
    late.failure = failure
    with pytest.raises(EncoderError) as caught:
        encoder(tiles[:9])
    assert str(caught.value) == f"dinov3-vits16: failed on the GPU: {told}"
    assert caught.value.__cause__ is failure
    assert_near(encoder(tiles[:9]), on_cpu(*plain, tiles[:9]))  # nothing is left of it
    encoder.close()


def test_tiles_of_another_size_or_dtype_are_refused(late, plain, tiles):
    encoder = TorchEncoder(*plain, batch=6)
    for wrong in (gate_tiles(2 * SIDE)[:1], tiles[:1].astype(np.int16)):
        with pytest.raises(EncoderError, match=r"the encoder takes uint8 \[b, 64, 64, 3\]"):
            encoder(wrong)
    encoder.close()


def test_convolutions_in_fp32_are_not_rounded():
    """PyTorch's default, TF32, has the mantissa of fp16."""
    assert not torch.backends.cudnn.allow_tf32
