"""The EfficientNet graph against the package efficientnet_lite_pytorch, and against golden vectors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from patchmill.encoders import open_encoder
from patchmill.types import EncodeSettings

GOLDEN = Path(__file__).parents[1] / "golden"


def encoded(tiles: np.ndarray, **settings) -> np.ndarray:
    encoder = open_encoder(EncodeSettings(encoder="efficientnet-lite0", precision="fp32", **settings))
    try:
        return encoder(tiles)["mean"]
    finally:
        encoder.close()


@pytest.mark.parametrize("batch", [1, 5])
def test_equals_the_package(batch, oracle):
    tiles = oracle.pictures(224, batch)
    wanted = oracle.efficientnet_outputs(oracle.efficientnet(), tiles)["mean"]
    assert np.abs(encoded(tiles) - wanted).max() <= 1e-3
    assert wanted.std() > 0.1


def test_tokens_are_the_map_that_the_mean_is_of(oracle):
    tiles = oracle.pictures(96, 2)
    model = open_encoder(EncodeSettings(encoder="efficientnet-lite0", precision="fp32", pixels=96, tokens=True))
    try:
        found = model(tiles)
    finally:
        model.close()
    wanted = oracle.efficientnet_outputs(oracle.efficientnet(), tiles)["token"]
    assert model.spec.tokens == wanted.shape[1:] == (3, 3, 1280)
    assert np.abs(found["token"] - wanted).max() <= 1e-3
    np.testing.assert_allclose(found["token"].mean(axis=(1, 2)), found["mean"], atol=1e-4)


@pytest.mark.filterwarnings("ignore:You are using `torch.load`")
def test_equals_the_package_with_every_batchnorm_at_random(oracle, tmp_path):
    generator = torch.Generator().manual_seed(3)
    state = oracle.efficientnet().state_dict()
    for name, tensor in state.items():
        if name.endswith(("running_mean", "running_var", "bias")):
            tensor.mul_(torch.rand(tensor.shape, generator=generator) + 0.5)
    torch.save(state, tmp_path / "other.pth")
    tiles = oracle.pictures(224, 2)
    wanted = oracle.efficientnet_outputs(oracle.efficientnet(str(tmp_path / "other.pth")), tiles)["mean"]
    assert np.abs(encoded(tiles, weights=str(tmp_path / "other.pth")) - wanted).max() <= 1e-3


def test_equals_golden_vectors(oracle):
    wanted = json.loads((GOLDEN / "efficientnet-lite0.json").read_text())["outputs"]["mean"]
    found = encoded(oracle.pictures(224, 2))
    np.testing.assert_allclose(found[:, :: wanted["every"]], wanted["values"], atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), wanted["norms"], rtol=1e-4)


def test_other_sizes_are_padded_like_tensorflow(oracle):
    tiles = oracle.pictures(160, 2)
    model = oracle.efficientnet()
    for module in model.modules():  # the package's padding is fixed for 224 px; for multiples of 32 it is the same
        assert not isinstance(module, torch.nn.Conv2d) or module.padding == (0, 0)
    wanted = oracle.efficientnet_outputs(model, tiles)["mean"]
    assert np.abs(encoded(tiles, pixels=160) - wanted).max() <= 1e-3
