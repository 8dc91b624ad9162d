"""torch gives what ONNX Runtime gives, for every family and both ways to write a graph."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from patchmill.encoders import convnext, efficientnet, vit
from patchmill.encoders.cards import card
from patchmill.encoders.layout import untrained
from patchmill.encoders.session import CpuEncoder
from patchmill.encoders.torchgraph import module_of
from patchmill.types import EncoderSpec, View

FAMILIES = ["dinov3-vits16", "dinov3-vits16plus", "dinov2-vits14-reg4", "conch", "biomedclip", "dinov3-convnext-tiny"]


def graph_of(name, precision, target="ort"):
    """A graph of at most two blocks a stage, and the outputs of its card."""
    chosen = card(name)
    arch, own = chosen.architecture, chosen.outputs
    if name == "efficientnet-lite0":
        return efficientnet.build(arch, untrained(arch, 3), 64), own, 64
    if name == "dinov3-convnext-tiny":
        arch = replace(arch, depths=(1, 1, 2, 1))
        return convnext.build(arch, untrained(arch, 3), 64, precision=precision), own, 64
    arch = replace(arch, depth=2)
    side = arch.only or 4 * arch.patch
    weights = untrained(arch, 3)
    return vit.build(arch, weights, side, precision=precision, target=target, outputs=list(own)), own, side


def by_onnxruntime(model, outputs, side, pixels):
    spec = EncoderSpec(
        name="oracle",
        architecture={},
        weights="untrained:3",
        view=View(pixels=side),
        precision="fp32",
        outputs=outputs,
        license="none",
    )
    encoder = CpuEncoder(spec, model, 2, optimise=False)
    try:
        return encoder(pixels)
    finally:
        encoder.close()


def by_torch(model, pixels):
    with torch.inference_mode():
        found = module_of(model)(torch.from_numpy(pixels))
    return {value.name: each.numpy() for value, each in zip(model.proto.graph.output, found, strict=True)}


def furthest(found, wanted):
    assert found.keys() == wanted.keys()
    return max(float(np.abs(found[name] - wanted[name]).max()) for name in wanted)


@pytest.mark.parametrize("target", ["ort", "plain"])
@pytest.mark.parametrize("name", [*FAMILIES, "efficientnet-lite0"])
def test_fp32_is_that_of_onnx_runtime(name, target):
    model, outputs, side = graph_of(name, "fp32", target)
    pixels = np.random.default_rng(0).integers(0, 256, (3, side, side, 3), dtype=np.uint8)
    wanted = by_onnxruntime(model, outputs, side, pixels)
    assert furthest(by_torch(model, pixels), wanted) < 1e-4
    assert furthest(by_torch(model.float_first(), pixels), wanted) < 1e-4
    assert furthest(by_onnxruntime(model.float_first(), outputs, side, pixels), wanted) < 1e-4


@pytest.mark.parametrize(("precision", "most"), [("fp16", 0.02), ("bf16", 0.15)])
@pytest.mark.parametrize("target", ["ort", "plain"])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("conch", "biomedclip")])  # slow on a CPU
def test_half_precision_is_near_it(name, target, precision, most):
    full, outputs, side = graph_of(name, "fp32", target)
    pixels = np.random.default_rng(0).integers(0, 256, (3, side, side, 3), dtype=np.uint8)
    wanted = by_onnxruntime(full, outputs, side, pixels)
    off = furthest(by_torch(graph_of(name, precision, target)[0], pixels), wanted)
    assert 0 < off < most


def test_an_operator_that_torch_lacks_is_named():
    with pytest.raises(ValueError, match="torch has no DynamicQuantizeMatMul"):
        module_of(graph_of("dinov3-vits16", "int8")[0])


def test_the_compiler_takes_the_module_whole():
    """torch.compile traces it in one piece; here without generating code, which a CPU would need minutes for."""
    model, _, side = graph_of("dinov3-vits16", "fp16")
    module = module_of(model)
    pixels = torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8)
    with torch.inference_mode():
        traced = torch.compile(module, fullgraph=True, dynamic=False, backend="eager")(pixels)
        for found, wanted in zip(traced, module(pixels), strict=True):
            assert torch.equal(found, wanted)
