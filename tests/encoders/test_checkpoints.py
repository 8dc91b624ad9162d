"""Weights files: every layout comes out the same, and every bad file is one clear line."""

import json
import os
import struct
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file

from patchmill.encoders.cards import card
from patchmill.encoders.checkpoints import load
from patchmill.encoders.keys import layouts
from patchmill.encoders.weights import sha256_of
from patchmill.errors import EncoderError


@pytest.fixture(scope="module")
def state(small, small_weights, oracle):
    return oracle.hugging_face(small.architecture, small_weights)


def refused(path, chosen) -> str:
    with pytest.raises(EncoderError) as caught:
        dict(load(path, chosen))
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"{path}: ")
    return line


def test_every_layout_comes_out_the_same(layout, small, small_weights, state, write, tmp_path):
    weights = load(write(tmp_path, state, layout), small)
    assert weights.keys() == small_weights.keys()
    for name, tensor in small_weights.items():
        assert weights[name].dtype == np.float32
        np.testing.assert_array_equal(weights[name], tensor)


def test_half_precision_files_are_widened(small, state, tmp_path):
    for dtype in (torch.float16, torch.bfloat16):
        halved = {name: tensor.to(dtype) for name, tensor in state.items()}
        torch.save(halved | {"model": None}, tmp_path / "unused.pth")  # what is no tensor does not matter
        save_file(halved, tmp_path / "half.safetensors")
        weights = load(tmp_path / "half.safetensors", small)
        wanted = halved["norm.weight"].float().numpy()
        np.testing.assert_array_equal(weights["norm.weight"], wanted)


def test_another_size_names_the_tensor_and_both_shapes(small, state, tmp_path):
    save_file(state, tmp_path / "s.safetensors")
    line = refused(tmp_path / "s.safetensors", card("dinov3-vitb16"))
    assert "lacks layer.2.norm1.weight and" in line
    wide = state | {"embeddings.cls_token": torch.zeros(1, 1, 768)}
    save_file(wide, tmp_path / "wide.safetensors")
    line = refused(tmp_path / "wide.safetensors", small)
    assert "embeddings.cls_token is [1, 1, 768], dinov3-vits16 wants [1, 1, 384]" in line


def test_missing_and_unexpected_tensors_are_named(small, state, tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({name: tensor for name, tensor in state.items() if name != "norm.bias"}, path)
    assert "lacks norm.bias" in refused(path, small)
    save_file(state | {"model.layer.0.mlp.gate_proj.weight": torch.zeros(2)}, path)
    assert "also holds layer.0.mlp.gate_proj.weight" in refused(path, small)
    save_file(state | {"model.layer.2.norm1.weight": torch.zeros(384)}, path)  # deeper than it should be
    assert "also holds layer.2.norm1.weight" in refused(path, small)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(value, small, state, tmp_path):
    spoilt = state["model.layer.1.mlp.up_proj.weight"].clone()
    spoilt[7, 7] = value
    save_file(state | {"model.layer.1.mlp.up_proj.weight": spoilt}, tmp_path / "w.safetensors")
    assert "layer.1.mlp.up_proj.weight holds NaN or infinity" in refused(tmp_path / "w.safetensors", small)


def test_integers_are_refused(small, state, tmp_path):
    save_file(state | {"norm.bias": torch.zeros(384, dtype=torch.int8)}, tmp_path / "w.safetensors")
    assert "norm.bias holds int8" in refused(tmp_path / "w.safetensors", small)


@pytest.mark.parametrize("kept", [0, 4, 8, 100, 20_000, -1])
def test_truncated_safetensors(kept, small, state, tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(state, path)
    path.write_bytes(path.read_bytes()[:kept])
    assert "safetensors" in refused(path, small)


@pytest.mark.parametrize("offsets", [[0, 8], [4, 8], [-4, 0], [0, 2**62]])
def test_lying_safetensors_offsets(offsets, small, tmp_path):
    header = json.dumps({"embeddings.cls_token": {"dtype": "F32", "shape": [1], "data_offsets": offsets}}).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    assert "is no intact safetensors file" in refused(path, small)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n" + b"\0" * 500, b"PK\x03\x04" + b"\0" * 100])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_that_holds_no_weights(content, suffix, small, tmp_path):
    (tmp_path / f"w{suffix}").write_bytes(content)
    refused(tmp_path / f"w{suffix}", small)


def test_a_folder_is_refused(small, tmp_path):
    assert "cannot be read (Is a directory)" in refused(tmp_path, small)


def test_weights_of_another_family(small, state, oracle, tmp_path):
    save_numpy({"visual.trunk.cls_token": np.zeros(3, ml_dtypes.bfloat16)}, tmp_path / "w.safetensors")
    assert "name them (it begins with visual.trunk.cls" in refused(tmp_path / "w.safetensors", small)
    torch.save(oracle.efficientnet().state_dict(), tmp_path / "lite.pth")
    assert "begins with _conv_stem.weight" in refused(tmp_path / "lite.pth", small)
    save_file(state, tmp_path / "vit.safetensors")
    assert "no tensors as efficientnet_lite_pytorch name them" in refused(
        tmp_path / "vit.safetensors", card("efficientnet-lite0")
    )


def test_positions_of_another_base_are_refused(small, state, write, tmp_path):
    path = write(tmp_path, state, "meta")
    changed = torch.load(path, weights_only=True)
    changed["rope_embed.periods"] = (10_000 ** (torch.arange(16) / 16)).bfloat16()
    torch.save(changed, path)
    assert "positions have another base" in refused(path, small)


def filled(arch, layout: str) -> dict[str, torch.Tensor]:
    """A file of a layout with other random numbers in every tensor."""
    generator = torch.Generator().manual_seed(0)
    pairs = [
        pair for stored in layouts(arch)[layout].values() for pair in zip(stored.names, stored.shapes, strict=True)
    ]
    return {name: torch.randn(shape, generator=generator) for name, shape in pairs if name}


def test_timms_eva_has_biases_apart_and_a_gate_of_its_own(tmp_path):
    whole = card("dinov3-vits16plus")
    small = replace(whole, architecture=replace(whole.architecture, depth=1), parameters=None)
    state = filled(small.architecture, "timm (Eva)")
    save_file(state, tmp_path / "w.safetensors")
    weights = load(tmp_path / "w.safetensors", small)
    block = "blocks.0."
    q, v = (state[f"{block}attn.{letter}_bias"] for letter in "qv")
    np.testing.assert_array_equal(weights[f"{block}qkv.bias"], np.concatenate([q, np.zeros(384), v]))
    gate, up = (state[f"{block}mlp.fc1_{letter}.weight"] for letter in "gx")
    np.testing.assert_array_equal(weights[f"{block}fc1.weight"], np.concatenate([gate, up]))
    np.testing.assert_array_equal(weights[f"{block}scale2"], state[f"{block}gamma_2"])


@pytest.mark.parametrize("layout", ["transformers (DINOv2)", "transformers 4 (DINOv2)", "Meta (DINOv2)", "timm"])
def test_layouts_with_three_projections_and_with_one(layout, tmp_path):
    whole = card("dinov2-vitg14")
    arch = replace(whole.architecture, width=48, heads=3, hidden=64, depth=1, table=3)
    small = replace(whole, architecture=arch, parameters=None)
    state = filled(arch, layout)
    save_file(state, tmp_path / "w.safetensors")
    weights = load(tmp_path / "w.safetensors", small)
    block = "encoder.layer.0."
    if layout == "transformers 4 (DINOv2)":
        parts = [state[f"{block}attention.attention.{name}.bias"] for name in ("query", "key", "value")]
        gate = [state[f"{block}mlp.weights_in.weight"]]
    elif layout == "transformers (DINOv2)":
        parts = [state[f"{block}attention.{letter}_proj.bias"] for letter in "qkv"]
        gate = [state[f"{block}mlp.gate_proj.weight"], state[f"{block}mlp.up_proj.weight"]]
    else:
        parts = [state["blocks.0.attn.qkv.bias"]]
        gate = [state["blocks.0.mlp.w12.weight" if layout.startswith("Meta") else "blocks.0.mlp.fc1.weight"]]
    np.testing.assert_array_equal(weights["blocks.0.qkv.bias"], np.concatenate(parts))
    np.testing.assert_array_equal(weights["blocks.0.fc1.weight"], np.concatenate(gate))
    positions = state["embeddings.position_embeddings" if layout.startswith("transformers") else "pos_embed"]
    np.testing.assert_array_equal(weights["positions"], positions[0])


def test_a_training_checkpoint_gives_the_model_in_it(small, small_weights, state, write, tmp_path):
    plain = torch.load(write(tmp_path, state, "meta"), weights_only=True)
    teacher = {f"backbone.{name}": tensor for name, tensor in plain.items()} | {
        "dino_head.mlp.0.weight": torch.zeros(3)
    }
    for wrapped in ({"teacher": teacher, "epoch": 3}, {"state_dict": {f"module.{n}": t for n, t in plain.items()}}):
        torch.save(wrapped, tmp_path / "wrapped.pth")
        weights = load(tmp_path / "wrapped.pth", small)
        assert all(np.array_equal(weights[name], small_weights[name]) for name in small_weights)


def test_a_tensor_that_is_there_twice_is_refused(small, state, tmp_path):
    save_file(state | {"model.norm.weight": torch.zeros(384)}, tmp_path / "w.safetensors")
    assert "holds norm.weight twice" in refused(tmp_path / "w.safetensors", small)


def test_a_text_tower_beside_the_image_tower_is_left_aside(tmp_path):
    whole = card("biomedclip")
    small = replace(whole, architecture=replace(whole.architecture, depth=1), parameters=None)
    state = filled(small.architecture, "timm") | {
        "text.transformer.embeddings": torch.zeros(3),
        "logit_scale": torch.ones(1),
    }
    torch.save(state, tmp_path / "open_clip_pytorch_model.bin")
    weights = load(tmp_path / "open_clip_pytorch_model.bin", small)
    np.testing.assert_array_equal(weights["head.weight"], state["visual.head.proj.weight"])
    np.testing.assert_array_equal(weights["cls"], state["visual.trunk.cls_token"][0, 0])


def test_a_card_whose_parameters_are_not_those_of_its_authors_is_refused(small, state, tmp_path):
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(EncoderError, match=r"dinov3-vits16: its architecture has .* parameters, its authors count 7"):
        load(tmp_path / "w.safetensors", replace(small, parameters=7))


def test_weights_in_parts_are_read_from_all_of_them(small, small_weights, state, tmp_path):
    names = sorted(state)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for part, keys in parts.items():
        save_file({key: state[key] for key in keys}, tmp_path / part)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: part for part, keys in parts.items() for key in keys}}))
    weights = load(index, small)
    assert all(np.array_equal(weights[name], small_weights[name]) for name in small_weights)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert "names model-00002-of-00002.safetensors, which is not beside it" in refused(index, small)
    index.write_text("[]")
    assert "is no index of safetensors files" in refused(index, small)


def test_a_part_of_which_nothing_is_needed_is_wanted_too(small, state, tmp_path):
    """All parts together are what an encoder's key tells: with one left out it would be another's."""
    index = tmp_path / "model.safetensors.index.json"
    names = dict.fromkeys(state, "one.safetensors") | {"mask_token": "two.safetensors"}
    save_file({key: tensor for key, tensor in state.items() if "mask_token" not in key}, tmp_path / "one.safetensors")
    index.write_text(json.dumps({"weight_map": names}))
    wrong = "names two.safetensors, which is not beside it; get the weights again"
    assert wrong in refused(index, small)
    with pytest.raises(EncoderError, match=wrong):
        sha256_of(index)
    save_file({"mask_token": torch.zeros(1, 1, 384)}, tmp_path / "two.safetensors")
    assert load(index, small)["cls"].shape == (384,)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_numbers_of_eight_bits_are_refused(dtype, small, state, tmp_path):
    save_file(state | {"norm.bias": torch.zeros(384).to(dtype)}, tmp_path / "w.safetensors")
    assert "is no intact safetensors file" in refused(tmp_path / "w.safetensors", small)


def test_numbers_that_fp32_cannot_hold_are_refused_without_a_warning(small, state, tmp_path):
    save_file(state | {"norm.bias": torch.full((384,), 1e300, dtype=torch.float64)}, tmp_path / "w.safetensors")
    assert "norm.bias holds NaN or infinity" in refused(tmp_path / "w.safetensors", small)


def test_periods_of_any_size_are_refused_before_they_are_read(small, state, write, tmp_path):
    path = write(tmp_path, state, "meta")
    changed = torch.load(path, weights_only=True)
    changed["rope_embed.periods"] = torch.ones(1).expand(40_000, 40_000)
    torch.save(changed, path)
    assert "positions have another base" in refused(path, small)


NULL, HALF = (json.dumps({"weight_map": {"a": f"no{letter}.safetensors"}}) for letter in ("\0", "\ud800"))


@pytest.mark.parametrize("text", ["[" * 200_000, NULL, HALF])
def test_an_index_that_is_none_is_one_line(text, small, tmp_path):
    (tmp_path / "m.safetensors.index.json").write_text(text)
    refused(tmp_path / "m.safetensors.index.json", small)


def test_a_part_that_is_a_pipe_is_refused(small, tmp_path):
    os.mkfifo(tmp_path / "p.safetensors")
    (tmp_path / "m.safetensors.index.json").write_text('{"weight_map": {"a": "p.safetensors"}}')
    assert "p.safetensors, which is no regular file" in refused(tmp_path / "m.safetensors.index.json", small)
