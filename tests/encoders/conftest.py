"""The oracles of tests/golden/make.py, and files of weights in every layout, for all tests of the encoders."""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from patchmill.encoders.cards import Card, card
from patchmill.encoders.layout import untrained


@pytest.fixture(scope="session")
def oracle() -> ModuleType:
    """tests/golden/make.py as a module."""
    path = Path(__file__).parents[1] / "golden" / "make.py"
    spec = importlib.util.spec_from_file_location("golden_make", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def no_weights_of_this_machine(monkeypatch, tmp_path):
    """No test finds weights that happen to lie on the machine."""
    monkeypatch.delenv("PATCHMILL_WEIGHTS", raising=False)
    for name in ("HF_HOME", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "no-hub"))
    monkeypatch.delenv("PATCHMILL_ENCODERS", raising=False)
    monkeypatch.setenv("PATCHMILL_CACHE", str(tmp_path / "cache"))  # nor a gate that was passed before


@pytest.fixture(scope="session")
def small() -> Card:
    """DINOv3 S/16 with two blocks: every part of the layout, a sixth of the work."""
    whole = card("dinov3-vits16")
    return replace(whole, architecture=replace(whole.architecture, depth=2), parameters=None)


@pytest.fixture(scope="session")
def small_weights(small) -> dict[str, np.ndarray]:
    return dict(untrained(small.architecture, 5))


def meta_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' state dict (5.x) in Meta's names: fused qkv with a mask on its bias, periods of the positions."""
    result = {
        "cls_token": state["embeddings.cls_token"],
        "mask_token": state["embeddings.mask_token"][0],
        "storage_tokens": state["embeddings.register_tokens"],
        "patch_embed.proj.weight": state["embeddings.patch_embeddings.weight"],
        "patch_embed.proj.bias": state["embeddings.patch_embeddings.bias"],
        "rope_embed.periods": (100 ** (torch.arange(16) / 16)).bfloat16(),
        "norm.weight": state["norm.weight"],
        "norm.bias": state["norm.bias"],
    }
    depth = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("model.layer."))
    for n in range(depth):
        hf, meta = f"model.layer.{n}.", f"blocks.{n}."
        query, value = (state[f"{hf}attention.{letter}_proj.bias"] for letter in "qv")
        ones = torch.ones_like(query)
        result[f"{meta}attn.qkv.weight"] = torch.cat([state[f"{hf}attention.{a}_proj.weight"] for a in "qkv"])
        # What the mask hides is not zero in the file, so that a reader that ignores the mask is caught.
        result[f"{meta}attn.qkv.bias"] = torch.cat([query, 7 * ones, value])
        result[f"{meta}attn.qkv.bias_mask"] = torch.cat([ones, 0 * ones, ones])
        for theirs, ours in {
            "attention.o_proj": "attn.proj",
            "mlp.up_proj": "mlp.fc1",
            "mlp.down_proj": "mlp.fc2",
        }.items():
            result |= {f"{meta}{ours}.{part}": state[f"{hf}{theirs}.{part}"] for part in ("weight", "bias")}
        for norm in ("norm1", "norm2"):
            result |= {f"{meta}{norm}.{part}": state[f"{hf}{norm}.{part}"] for part in ("weight", "bias")}
        result |= {f"{meta}ls{number}.gamma": state[f"{hf}layer_scale{number}.lambda1"] for number in (1, 2)}
    return result


@pytest.fixture(scope="session")
def write() -> Callable[[Path, dict[str, torch.Tensor], str], Path]:
    """Write transformers' state dict (5.x) to a file in one of the layouts that exist."""

    def written(folder: Path, state: dict[str, torch.Tensor], layout: str) -> Path:
        if layout == "transformers-5":
            path = folder / "five.safetensors"
            save_file(state, path)
        elif layout == "transformers-5-all-prefixed":
            path = folder / "prefixed.safetensors"
            save_file({f"model.{name.removeprefix('model.')}": tensor for name, tensor in state.items()}, path)
        elif layout == "transformers-4":
            path = folder / "four.safetensors"
            save_file({name.removeprefix("model."): tensor for name, tensor in state.items()}, path)
        else:
            path = folder / "meta.pth"
            torch.save(meta_state(state), path, _use_new_zipfile_serialization=layout == "meta")
        return path

    return written


LAYOUTS = ("transformers-5", "transformers-5-all-prefixed", "transformers-4", "meta", "meta-legacy")


@pytest.fixture(params=LAYOUTS)
def layout(request) -> str:
    return request.param
