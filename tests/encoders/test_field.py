"""DINOv3's other sizes and the models that it is compared with: graphs against the families' own code.

transformers is run here. For what only timm, open_clip or the authors' code has, golden vectors and the names and
shapes of all tensors are stored; `tests/golden/make_timm.py` makes them.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from patchmill.encoders import convnext, vit
from patchmill.encoders.cards import ConvNeXt, ViT, card, cards
from patchmill.encoders.keys import layouts, superfluous
from patchmill.encoders.layout import untrained
from patchmill.encoders.positions import resized
from tests.encoders.test_vit import assert_close, run

GOLDEN = Path(__file__).parents[1] / "golden"
TIMM = sorted(path.stem.removesuffix(".timm") for path in GOLDEN.glob("*.timm.json"))
RAD = (0.5307,) * 3, (0.2583,) * 3


def shallow(name: str, depth: int = 2) -> ViT:
    """The architecture with two blocks, at its full width."""
    return replace(card(name).architecture, depth=depth)


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("dinov3-vits16plus", "ort"),
        ("dinov3-vits16plus", "plain"),
        ("dinov3-vitl16plus", "ort"),
        ("dinov3-vith16plus", "plain"),
        ("dinov3-vit7b16", "ort"),
        ("dinov3-vitl16-sat493m", "ort"),
    ],
)
def test_sizes_of_dinov3_equal_transformers(name, target, oracle):
    arch = shallow(name, 1 if "7b" in name else 2)
    weights, tiles = untrained(arch, 3), oracle.pictures(112, 2)
    constants = oracle.SATELLITE if "sat493m" in name else oracle.IMAGENET
    wanted = oracle.vit_outputs(oracle.vit(arch, weights), tiles, constants)
    model = vit.build(arch, weights, 112, target=target, outputs=tuple(wanted))
    assert_close(run(model, tiles), wanted, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "pixels"), [("tiny", 96), ("tiny", 224), ("small", 96), ("base", 96), ("large", 96)])
def test_convnext_equals_transformers(size, pixels, oracle):
    arch = card(f"dinov3-convnext-{size}").architecture
    if size != "tiny":
        arch = replace(arch, depths=(1, 2, 3, 1))
    weights, tiles = untrained(arch, 3), oracle.pictures(pixels, 2)
    wanted = oracle.convnext_outputs(oracle.convnext(arch, weights), tiles)
    outputs = ("cls", "token")
    assert_close(run(convnext.build(arch, weights, pixels, tokens=True), tiles, outputs), wanted, 1e-4)
    spread = np.abs(wanted["cls"]).max()
    for precision, bound in (("fp16", 0.01), ("int8", 0.15)):
        found = run(convnext.build(arch, weights, pixels, precision=precision), tiles, ("cls",))
        assert_close(found, wanted, bound * spread)


@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        *(("dinov2-vits14", pixels) for pixels in (224, 336, 518)),
        *(("dinov2-vits14-reg4", pixels) for pixels in (224, 336, 518)),
        ("dinov2-vitg14", 224),
        ("dinov2-vitg14-reg4", 224),
    ],
)
def test_dinov2_equals_transformers(name, pixels, oracle):
    """And with Meta's own rule for its table, where there are no registers."""
    arch = shallow(name)
    weights, tiles = untrained(arch, 4), oracle.pictures(pixels, 2)
    wanted = oracle.dinov2_outputs(oracle.dinov2(arch, weights, pixels), tiles)
    assert_close(run(vit.build(arch, weights, pixels), tiles, ("cls", "mean")), wanted, 1e-4)


@pytest.mark.parametrize(
    ("name", "pixels"), [("phikon-v2", 224), ("phikon-v2", 336), ("rad-dino", 518), ("rad-dino", 224)]
)
def test_models_kept_as_transformers_dinov2(name, pixels, oracle):
    arch = shallow(name)
    weights, tiles = untrained(arch, 5), oracle.pictures(pixels, 2)
    constants = RAD if name == "rad-dino" else oracle.IMAGENET
    wanted = oracle.dinov2_outputs(oracle.dinov2(arch, weights, pixels), tiles, constants)
    assert_close(run(vit.build(arch, weights, pixels), tiles, ("cls", "mean")), wanted, 1e-4)


@pytest.mark.parametrize("name", TIMM)
def test_equals_golden_vectors_of_timm(name, oracle):
    golden = json.loads((GOLDEN / f"{name}.timm.json").read_text())
    arch = shallow(name, golden["depth"])
    weights = untrained(arch, golden["seed"])
    outputs = tuple(golden["outputs"])
    for target in ("ort", "plain"):
        model = vit.build(arch, weights, golden["pixels"], target=target, outputs=outputs)
        found = run(model, oracle.pictures(golden["pixels"], 2), outputs)
        for output, wanted in golden["outputs"].items():
            np.testing.assert_allclose(found[output][:, :: wanted["every"]], wanted["values"], atol=1e-4)
            np.testing.assert_allclose(np.linalg.norm(found[output], axis=1), wanted["norms"], rtol=1e-4)


def named(layout) -> dict[str, tuple[int, ...]]:
    """Name and shape of all tensors that a file of this layout has."""
    pairs = [pair for stored in layout.values() for pair in zip(stored.names, stored.shapes, strict=True)]
    return {name: shape for name, shape in pairs if name}


@pytest.mark.parametrize("name", TIMM)
def test_every_tensor_of_timm_is_known_by_name_and_shape(name):
    """Of the whole model at its full depth, none missing and none left over."""
    golden = json.loads((GOLDEN / f"{name}.timm.json").read_text())
    arch = card(name).architecture
    theirs = {key: tuple(shape) for key, shape in golden["tensors"].items()}
    for key in [key for key in theirs if "{}" in key]:
        theirs |= {key.replace("{}", str(block)): theirs[key] for block in range(golden["blocks"])}
        del theirs[key]
    theirs = {key: shape for key, shape in theirs.items() if not superfluous(key, arch)}
    found = [
        {
            key: shape
            for stored in layout.values()
            for key, shape in zip(stored.names, stored.shapes, strict=True)
            if key
        }
        for layout in layouts(arch).values()
    ]
    assert theirs in found
    assert card(name).parameters == golden["parameters"]


DINOV3 = [name for name, each in cards().items() if name.startswith("dinov3-vit")]


@pytest.mark.parametrize("name", DINOV3)
def test_every_tensor_of_transformers_dinov3_is_known_by_name_and_shape(name, oracle):
    """At full depth and width, 7B as well: nothing is allocated."""
    arch = card(name).architecture
    with torch.device("meta"):
        model = oracle.vit_of(arch)
    theirs = {key.removeprefix("model."): tuple(value.shape) for key, value in model.state_dict().items()}
    theirs = {key: shape for key, shape in theirs.items() if not superfluous(key, arch)}
    assert named(layouts(arch)["transformers (DINOv3)"]) == theirs
    masked = arch.width * arch.depth * (arch.bias == "queries and values")
    counted = sum(value.numel() for key, value in model.state_dict().items() if not superfluous(key, arch))
    assert card(name).parameters == counted + masked


@pytest.mark.parametrize("rule", ["by size", "antialias", "offset"])
def test_a_table_at_its_own_size_is_left_alone(rule):
    table = np.random.default_rng(0).normal(size=(49, 5))
    np.testing.assert_array_equal(resized(table, 7, rule), table)
    assert resized(table, 7, rule) is not table


@pytest.mark.parametrize(("side", "grid"), [(37, 16), (14, 28), (37, 24), (14, 5), (16, 64)])
@pytest.mark.parametrize("rule", ["by size", "antialias", "offset"])
def test_tables_are_resized_as_torch_does_it(side, grid, rule):
    table = np.random.default_rng(side).normal(size=(side * side, 6)).astype(np.float32)
    square = torch.from_numpy(table).double().reshape(1, side, side, 6).permute(0, 3, 1, 2)
    if rule == "offset":
        scale = (grid + 0.1) / side
        wanted = torch.nn.functional.interpolate(square, scale_factor=(scale, scale), mode="bicubic")
    else:
        wanted = torch.nn.functional.interpolate(square, (grid, grid), mode="bicubic", antialias=rule == "antialias")
    np.testing.assert_allclose(resized(table, grid, rule), wanted[0].flatten(1).T.numpy(), atol=1e-9)


def test_a_model_of_one_size_has_no_other():
    with pytest.raises(ValueError, match="28 x 28 patches only"):
        vit.build(shallow("conch"), untrained(shallow("conch"), 0), 224, outputs=("pooled",))


def test_every_encoder_is_compared_with_something():
    """A new card needs an oracle: a size of DINOv3, transformers' DINOv2 or ResNet, or golden vectors."""
    for name, each in cards().items():
        if isinstance(each.architecture, ConvNeXt) or name.startswith(("dinov3-", "dinov2-", "efficientnet-")):
            continue
        assert name in TIMM or name in ("phikon-v2", "rad-dino", "meddinov3-vitb16", "ctnet"), name
