"""Encoders of Hounsfield units: graphs against transformers with pixels normalised outside, gate, card."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from patchmill.encoders import CpuEncoder, gate_tiles, vit
from patchmill.encoders.cards import read_card
from patchmill.encoders.gate import judge, reference_of
from patchmill.encoders.layout import untrained
from patchmill.encoders.lint import tensorrt_findings
from patchmill.encoders.torchgraph import module_of
from patchmill.errors import EncoderError, UsageError
from patchmill.types import EncoderSpec, Intensity, View
from tests.encoders.test_vit import OUTPUTS, assert_close, run

SIDE = 64
MEAN, STD = (60.0, 40.0, 20.0), (170.0, 180.0, 190.0)
YAML = """
name: {name}
title: ViT on Hounsfield units
license: ours
architecture:
  {{family: vit, width: 128, depth: 2, heads: 2, hidden: 256, patch: 16, registers: 0, eps: 1.0e-6, bias: none,
   rope_base: 100, mean: {mean}, std: [170, 180, 190], hounsfield: {hounsfield}}}
pixels: 64
outputs: {{cls: 128, mean: 128}}
weights: {{obtain: train it}}
"""


def yaml(name="hu", hounsfield="[-1000, 1000]", mean="[60, 40, 20]"):
    return YAML.format(name=name, hounsfield=hounsfield, mean=mean)


@pytest.fixture(scope="module")
def arch(small):
    return replace(small.architecture, mean=MEAN, std=STD, hounsfield=(-1000.0, 1000.0))


def spec_of(precision="fp32", weights="untrained:5"):
    return EncoderSpec(
        name="hu",
        architecture={},
        weights=weights,
        view=View(pixels=SIDE, dtype="int16"),
        precision=precision,
        outputs={"cls": 384, "mean": 384},
        license="none",
    )


def slices(count=4):
    """Slices of CTs, and whatever else int16 can hold."""
    rng = np.random.default_rng(0)
    wild = rng.integers(-32768, 32768, (2, SIDE, SIDE, 3)).astype(np.int16)
    return np.concatenate([gate_tiles(SIDE, "hounsfield")[:count], wild])


def normalised(tiles):
    clipped = tiles.clip(-1000, 1000).astype(np.float64)
    return torch.from_numpy(((clipped - MEAN) / STD).transpose(0, 3, 1, 2)).float()


def wanted_of(oracle, arch, weights, tiles):
    with torch.inference_mode():
        tokens = oracle.vit(arch, weights)(normalised(tiles)).last_hidden_state
    patches = tokens[:, 5:]
    found = {"cls": tokens[:, 0], "mean": patches.mean(1), "token": patches.unflatten(1, (SIDE // 16, SIDE // 16))}
    return {name: value.numpy() for name, value in found.items()}


@pytest.mark.parametrize("target", ["ort", "plain"])
def test_equals_transformers_on_pixels_that_were_normalised_before(target, arch, small_weights, oracle):
    tiles = slices()
    model = vit.build(arch, small_weights, SIDE, target=target, outputs=OUTPUTS)
    assert_close(run(model, tiles), wanted_of(oracle, arch, small_weights, tiles), 1e-4)


@pytest.mark.parametrize(("precision", "bound"), [("fp16", 0.02), ("bf16", 0.15)])
def test_torch_runs_it_in_half_precision(precision, bound, arch, small_weights, oracle):
    tiles = slices()
    model = vit.build(arch, small_weights, SIDE, precision=precision, outputs=OUTPUTS)
    with torch.inference_mode():
        found = dict(zip(OUTPUTS, (each.numpy() for each in module_of(model)(torch.from_numpy(tiles))), strict=True))
    assert_close(found, wanted_of(oracle, arch, small_weights, tiles), bound)


def test_each_unit_counts_within_the_clip_and_none_beyond(arch, small_weights):
    """In half precision, too: 999 and 1000 HU differ, 1000 and 3000 do not; nor do -1000 and what lies outside."""
    for precision in ("fp32", "fp16", "int8"):
        model = vit.build(arch, small_weights, SIDE, precision=precision, outputs=("cls",))
        values = np.array([999, 1000, 3000, -999, -1000, -1024, -32768], np.int16)
        tiles = np.broadcast_to(values[:, None, None, None], (7, SIDE, SIDE, 3)).copy()
        near, top, above, low, air, outside, least = (run(model, tile[None], ("cls",))["cls"] for tile in tiles)
        assert np.array_equal(top, above)
        assert np.array_equal(air, outside)
        assert np.array_equal(air, least)
        if precision == "fp32":
            assert not np.array_equal(near, top)
            assert not np.array_equal(low, air)


def test_pixels_of_another_type_are_refused(arch, small_weights):
    encoder = CpuEncoder(spec_of(), vit.build(arch, small_weights, SIDE), 1)
    try:
        with pytest.raises(EncoderError, match=r"tiles are uint8 \[1, 64, 64, 3\], the encoder takes int16 \[b, 64"):
            encoder(np.zeros((1, SIDE, SIDE, 3), np.uint8))
    finally:
        encoder.close()


def test_the_gate_passes_the_true_graph_and_no_other(arch, small_weights):
    reference = reference_of(spec_of(), vit.build(arch, small_weights, SIDE, target="plain"))
    spoilt = {
        "": arch,
        "clip": replace(arch, hounsfield=(-1000.0, 300.0)),
        "mean": replace(arch, mean=(60.0, 40.0, 25.0)),
        "std": replace(arch, std=(170.0, 180.0, 192.0)),
    }
    for name, each in spoilt.items():
        encoder = CpuEncoder(spec_of(), vit.build(each, small_weights, SIDE), 2)
        try:
            assert judge(encoder, reference).passed is (name == ""), name
        finally:
            encoder.close()


@pytest.mark.parametrize("pixels", [64, 224])
def test_slices_of_the_gate_are_the_same_32_bodies_at_every_size(pixels):
    tiles, large = gate_tiles(pixels, "hounsfield"), gate_tiles(128, "hounsfield")
    assert tiles.shape == (32, pixels, pixels, 3)
    assert tiles.dtype == np.int16
    assert np.array_equal(tiles, gate_tiles(pixels, "hounsfield"))
    assert len({tile.tobytes() for tile in tiles}) == 32
    assert np.array_equal(tiles[..., 0], tiles[..., 2])
    assert -1024 <= tiles.min() < -990
    assert 500 < tiles.max() < 3071
    means = [each.mean(axis=(1, 2, 3)) for each in (tiles, large)]
    assert np.abs(means[0] - means[1]).max() < 25
    assert np.ptp(means[1]) > 200


def test_tensorrt_has_no_int16(arch, small_weights):
    model = vit.build(arch, small_weights, SIDE, target="plain")
    assert tensorrt_findings(model.float_first()) == ["int16 input (pixels)"]


def test_a_view_of_hounsfield_units_has_no_window_and_a_key_of_its_own():
    with pytest.raises(UsageError, match="takes Hounsfield units as they are"):
        View(dtype="int16", intensity=Intensity(windows=((0.0, 1.0),)))
    view = View(dtype="int16", slab=3)
    assert View.from_record(view.record()) == view
    assert replace(spec_of(), view=View(pixels=SIDE)).key != spec_of().key


def test_a_card_says_whether_its_pixels_are_hounsfield_units():
    made = read_card("hu.yaml", yaml())
    assert (made.dtype, made.architecture.hounsfield) == ("int16", (-1000.0, 1000.0))
    assert untrained(made.architecture, 0)["cls"].shape == (128,)
    for facts, says in (
        ({"hounsfield": "[-2000, 1000]"}, "architecture.hounsfield: two ends within -1024 and 32767"),
        ({"hounsfield": "[300, 300]"}, "low end first"),
        ({"hounsfield": "[.nan, 300]"}, "low end first"),
        ({"hounsfield": "[300]"}, "architecture.hounsfield"),
        ({"hounsfield": "null"}, "architecture.std: greater than 0, of pixels in 0..1"),
        ({"mean": "[60, 40, 20000]"}, "architecture.mean: of HU"),
    ):
        with pytest.raises(EncoderError, match="is no encoder") as caught:
            read_card("hu.yaml", yaml(**facts))
        assert says in str(caught.value)
