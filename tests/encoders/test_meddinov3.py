"""MedDINOv3 against transformers' DINOv3 with its deviations: HU, eps, no bias of q, k, v, rotary tables in bf16."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from patchmill.encoders import vit
from patchmill.encoders.cards import card
from patchmill.encoders.checkpoints import load
from patchmill.encoders.keys import layouts, superfluous
from patchmill.encoders.layout import parameters, untrained
from patchmill.errors import EncoderError
from tests.encoders.conftest import meta_state
from tests.encoders.test_field import named
from tests.encoders.test_vit import OUTPUTS, assert_close, run

NAME = "meddinov3-vitb16"
GOLDEN = Path(__file__).parents[1] / "golden" / f"{NAME}.json"


@pytest.fixture(scope="module")
def shallow():
    """Its card with two blocks, and weights."""
    whole = card(NAME)
    arch = replace(whole.architecture, depth=2)
    return replace(whole, architecture=arch, parameters=None), dict(untrained(arch, 5))


@pytest.mark.parametrize(("target", "pixels"), [("ort", 112), ("plain", 112), ("ort", 224), ("ort", 400)])
def test_equals_transformers_with_its_deviations(target, pixels, shallow, oracle):
    chosen, weights = shallow
    tiles = oracle.slices(pixels, 2)
    wanted = oracle.meddinov3_outputs(chosen.architecture, weights, tiles)
    model = vit.build(chosen.architecture, weights, pixels, target=target, outputs=OUTPUTS)
    assert_close(run(model, tiles), wanted, 1e-4)


def test_equals_golden_vectors(oracle):
    golden = json.loads(GOLDEN.read_text())
    arch = card(NAME).architecture
    model = vit.build(arch, untrained(arch, oracle.SEED), 224)
    found = run(model, oracle.slices(224, 2), ("cls", "mean"))
    for output, wanted in golden["outputs"].items():
        np.testing.assert_allclose(found[output][:, :: wanted["every"]], wanted["values"], atol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(found[output], axis=1), wanted["norms"], rtol=1e-4)


def furthest(found, wanted):
    """Greatest distance of a vector from the wanted one, in parts of the wanted ones' mean distance from their mean."""
    spread = np.linalg.norm(wanted - wanted.mean(axis=0), axis=1).mean()
    return (np.linalg.norm(found - wanted, axis=1) / spread).max()


def test_what_is_not_rounded_to_bf16_is_noise(shallow, oracle):
    """q and k are, in its own code; that moves vectors less than the tables in bf16 do, which we have."""
    chosen, weights = shallow
    tiles = oracle.slices(224, 6)
    wanted = oracle.meddinov3_outputs(chosen.architecture, weights, tiles, torch.bfloat16)
    ours = run(vit.build(chosen.architecture, weights, 224), tiles, ("cls", "mean"))
    usual = replace(chosen.architecture, rope_dtype="fp32")
    without = run(vit.build(usual, weights, 224), tiles, ("cls", "mean"))
    for name in ("cls", "mean"):
        assert furthest(ours[name], wanted[name]) < 0.01
        assert furthest(ours[name], wanted[name]) < 0.8 * furthest(without[name], wanted[name])


def checkpoint(oracle, weights, arch):
    """A training checkpoint as its authors publish it: the teacher's backbone and heads."""
    state = meta_state(oracle.hugging_face(arch, weights) | biases(arch))
    backbone = {f"backbone.{name}": each for name, each in state.items() if "qkv.bias" not in name}
    heads = {f"{head}.mlp.0.weight": torch.zeros(3, 3) for head in ("dino_head", "ibot_head")}
    return {"teacher": backbone | heads}


def biases(arch):
    """What `meta_state` asks for, and the file does not have."""
    names = [f"model.layer.{n}.attention.{letter}_proj.bias" for n in range(arch.depth) for letter in "qv"]
    return {name: torch.zeros(arch.width) for name in names}


def test_its_training_checkpoint_is_read(shallow, oracle, tmp_path):
    chosen, weights = shallow
    path = tmp_path / "model.pth"
    state = checkpoint(oracle, weights, chosen.architecture)
    torch.save(state, path)
    loaded = load(path, chosen)
    assert loaded.keys() == weights.keys()
    assert all(np.array_equal(loaded[name], weights[name]) for name in weights)
    state["teacher"]["backbone.blocks.0.attn.qkv.bias"] = torch.zeros(3 * 768)
    torch.save(state, path)
    with pytest.raises(EncoderError, match=r"also holds blocks\.0\.attn\.qkv\.bias"):
        load(path, chosen)


def test_weights_of_the_released_dinov3_are_not_taken_for_it(small, small_weights, oracle, tmp_path):
    chosen = replace(card(NAME), parameters=None)
    chosen = replace(chosen, architecture=replace(chosen.architecture, width=384, heads=6, hidden=1536, depth=2))
    torch.save(meta_state(oracle.vit(small.architecture, small_weights).state_dict()), tmp_path / "dinov3.pth")
    with pytest.raises(EncoderError, match=r"also holds blocks\.0\.attn\.qkv\.bias"):
        load(tmp_path / "dinov3.pth", chosen)


def test_every_tensor_is_known_by_name_and_shape(oracle):
    """At full depth; and there are as many parameters as a ViT-B has without the biases of q, k and v."""
    chosen = card(NAME)
    with torch.device("meta"):
        model = oracle.vit_of(chosen.architecture)
    theirs = {key.removeprefix("model."): tuple(value.shape) for key, value in model.state_dict().items()}
    theirs = {key: shape for key, shape in theirs.items() if not superfluous(key, chosen.architecture)}
    assert named(layouts(chosen.architecture)["transformers (DINOv3)"]) == theirs
    assert parameters(chosen.architecture) == chosen.parameters == 85_668_864 - 12 * 3 * 768


def test_it_takes_slices_in_hounsfield_units():
    chosen = card(NAME)
    assert (chosen.dtype, chosen.architecture.hounsfield, chosen.pixels) == ("int16", (-1000, 1000), 896)
