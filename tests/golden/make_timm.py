"""Golden vectors, and names and shapes of all tensors, of the models that timm or open_clip define.

Run `PYTHONPATH=build/lint python tests/golden/make_timm.py` where timm 1.0.31, open_clip_torch 3.3.0 and torchvision
are installed, beside what patchmill.encoders needs: torchvision has no build for the torch of the extra `dev`. Models
are made as their authors' code makes them (mahmoodlab/UNI, CONCH and TRIDENT, the cards of the others), at two blocks
for the vectors. What follows CONCH's trunk is put together of torch's own parts.
"""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from open_clip.timm_model import TimmModel
from timm.layers import SwiGLUPacked
from torch import nn

from patchmill.encoders.cards import ViT, card
from patchmill.encoders.layout import untrained

HERE = Path(__file__).parent
SEED = 21
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
OPTIMUS = (0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517)
GATED: dict[str, Any] = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "uni": ("vit_large_patch16_224", {"init_values": 1e-5, "dynamic_img_size": True}),
    "uni2-h": (
        "vit_giant_patch14_224",
        {
            "img_size": 224,
            "patch_size": 14,
            "depth": 24,
            "num_heads": 24,
            "init_values": 1e-5,
            "embed_dim": 1536,
            "mlp_ratio": 2.66667 * 2,
            "no_embed_class": True,
            "reg_tokens": 8,
            "dynamic_img_size": True,
            **GATED,
        },
    ),
    "virchow2": (
        "vit_huge_patch14_224",
        {
            "img_size": 224,
            "init_values": 1e-5,
            "reg_tokens": 4,
            "mlp_ratio": 5.3375,
            "global_pool": "",
            "dynamic_img_size": True,
            **GATED,
        },
    ),
    "gigapath": (
        "vit_giant_patch14_dinov2",
        {"img_size": 224, "patch_size": 16, "init_values": 1e-5, "dynamic_img_size": True},
    ),
    "h-optimus-0": ("vit_giant_patch14_reg4_dinov2", {"img_size": 224, "init_values": 1e-5}),
    "h-optimus-1": ("vit_giant_patch14_reg4_dinov2", {"img_size": 224, "init_values": 1e-5}),
    "conch": ("vit_base_patch16_224", {"img_size": 448}),
    "biomedclip": ("vit_base_patch16_224", {}),
    "dinov3-vits16": ("vit_small_patch16_dinov3_qkvb", {}),
    "dinov3-vits16plus": ("vit_small_plus_patch16_dinov3_qkvb", {}),
    "dinov3-vith16plus": ("vit_huge_plus_patch16_dinov3_qkvb", {}),
    "dinov3-vit7b16": ("vit_7b_patch16_dinov3", {}),
}
CONSTANTS = {"conch": CLIP, "biomedclip": CLIP, "h-optimus-0": OPTIMUS, "h-optimus-1": OPTIMUS}


class Conch(nn.Module):
    """The trunk, and what follows it: one query over all normed tokens, a norm; then a projection, of length 1."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        pool = nn.Module()
        pool.query = nn.Parameter(torch.empty(1, 512))
        pool.attn = nn.MultiheadAttention(512, 8, kdim=768, vdim=768)
        pool.ln_q, pool.ln_k = nn.LayerNorm(512), nn.LayerNorm(768)
        self.visual = nn.Module()
        self.visual.trunk, self.visual.attn_pool_contrast, self.visual.ln_contrast = trunk, pool, nn.LayerNorm(512)
        self.visual.proj_contrast = nn.Parameter(torch.empty(512, 512))

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pool = self.visual.attn_pool_contrast
        tokens = pool.ln_k(self.visual.trunk.forward_features(pixels)).transpose(0, 1)  # [T, b, D]
        query = pool.ln_q(pool.query)[:, None].expand(-1, tokens.shape[1], -1)
        pooled = self.visual.ln_contrast(pool.attn(query, tokens, tokens, need_weights=False)[0][0])
        return pooled, nn.functional.normalize(pooled @ self.visual.proj_contrast, dim=-1)


class BiomedClip(nn.Module):
    """open_clip's tower under the name that it has in the whole model."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        kinds = {"embed_dim": 512, "image_size": 224, "pool": "", "proj": "linear", "pretrained": False}
        self.visual = TimmModel("vit_base_patch16_224", **kinds)
        if options:
            self.visual.trunk = timm.create_model("vit_base_patch16_224", num_classes=0, global_pool="token", **options)


def model_of(name: str, **more: Any) -> nn.Module:
    """The model as its authors make it, but for what is given."""
    timm_name, options = MODELS[name]
    if name == "biomedclip":
        return BiomedClip(**more).eval()
    trunk = timm.create_model(timm_name, pretrained=False, num_classes=0, **{**options, **more})
    return (Conch(trunk) if name == "conch" else trunk).eval()


def state_of(name: str, arch: ViT, weights: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The canonical layout in the model's own names."""
    eva = name.startswith("dinov3")
    state: dict[str, np.ndarray] = {
        "cls_token": weights["cls"][None, None],
        "patch_embed.proj.weight": weights["patch.weight"],
        "patch_embed.proj.bias": weights["patch.bias"],
        "norm.weight": weights["norm.weight"],
        "norm.bias": weights["norm.bias"],
    }
    if arch.registers:
        state["reg_token"] = weights["registers"][None]
    if arch.table is not None:
        state["pos_embed"] = weights["positions"][None]
    for n in range(arch.depth):
        block = f"blocks.{n}"
        for part in ("weight", "bias"):
            for ours, theirs in {"norm1": "norm1", "norm2": "norm2", "proj": "attn.proj", "fc2": "mlp.fc2"}.items():
                state[f"{block}.{theirs}.{part}"] = weights[f"{block}.{ours}.{part}"]
            if eva and arch.mlp == "swiglu":
                halves = np.split(weights[f"{block}.fc1.{part}"], 2)
                state |= {f"{block}.mlp.fc1_{letter}.{part}": half for letter, half in zip("gx", halves, strict=True)}
            else:
                state[f"{block}.mlp.fc1.{part}"] = weights[f"{block}.fc1.{part}"]
        state[f"{block}.attn.qkv.weight"] = weights[f"{block}.qkv.weight"]
        if arch.bias == "all":
            state[f"{block}.attn.qkv.bias"] = weights[f"{block}.qkv.bias"]
        elif arch.bias != "none":
            query, _, value = np.split(weights[f"{block}.qkv.bias"], 3)
            state |= {f"{block}.attn.q_bias": query, f"{block}.attn.v_bias": value}
        if arch.layer_scale:
            for number in (1, 2):
                scale = f"gamma_{number}" if eva else f"ls{number}.gamma"
                state[f"{block}.{scale}"] = weights[f"{block}.scale{number}"]
    if arch.head is not None:
        state = {f"visual.trunk.{key}": value for key, value in state.items()}
    if arch.head == "linear":
        state["visual.head.proj.weight"] = weights["head.weight"]
    if arch.head == "attention":
        pool = "visual.attn_pool_contrast"
        state |= {f"{pool}.attn.{letter}_proj_weight": weights[f"head.{letter}.weight"] for letter in "qkv"}
        state |= {f"{pool}.query": weights["head.query"][None], f"{pool}.attn.in_proj_bias": weights["head.qkv.bias"]}
        state["visual.proj_contrast"] = weights["head.contrast"]
        for part in ("weight", "bias"):
            state[f"{pool}.attn.out_proj.{part}"] = weights[f"head.proj.{part}"]
            state[f"{pool}.ln_q.{part}"] = weights[f"head.query_norm.{part}"]
            state[f"{pool}.ln_k.{part}"] = weights[f"head.key_norm.{part}"]
            state[f"visual.ln_contrast.{part}"] = weights[f"head.out_norm.{part}"]
    return {key: torch.from_numpy(np.array(value)) for key, value in state.items()}


def outputs_of(name: str, arch: ViT, model: nn.Module, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the authors use."""
    if name == "conch":
        return dict(zip(("pooled", "contrast"), model(pixels), strict=True))
    if name == "biomedclip":
        return {"projected": model.visual(pixels), "cls": model.visual.trunk.forward_features(pixels)[:, 0]}
    tokens = model.forward_features(pixels)
    cls, mean = tokens[:, 0], tokens[:, 1 + arch.registers :].mean(1)
    return {"cls-mean": torch.cat([cls, mean], 1), "cls": cls} if name == "virchow2" else {"cls": cls, "mean": mean}


def picture(pixels: int, number: int) -> np.ndarray:
    """As in make.py."""
    y, x = np.mgrid[0:pixels, 0:pixels].astype(np.int64)
    channels = [x * y // 7 + 31 * number, x * x // 50 + 3 * y + 17 * number, (x ^ y) * 5 + 57 * number]
    return np.stack([channel % 256 for channel in channels], axis=2).astype(np.uint8)


def golden(name: str, picked: int = 8) -> dict[str, object]:
    """Vectors of the shallow model for two pictures, and the tensors of the whole."""
    whole = card(name)
    fields = {field: getattr(whole.architecture, field) for field in ViT.__dataclass_fields__}
    depth = 1 if whole.architecture.width > 2000 else 2
    arch = ViT(**{**fields, "depth": depth})
    model = model_of(name, depth=depth)
    model.load_state_dict(state_of(name, arch, untrained(arch, SEED)), strict=True)
    mean, std = (torch.tensor(values)[:, None, None] for values in CONSTANTS.get(name, IMAGENET))
    pictures = torch.from_numpy(np.stack([picture(whole.pixels, number) for number in range(2)]))
    with torch.inference_mode():
        outputs = outputs_of(name, arch, model, (pictures.permute(0, 3, 1, 2).float() / 255 - mean) / std)
    with torch.device("meta"):
        tensors = {key: list(value.shape) for key, value in model_of(name).state_dict().items()}
        masked = whole.architecture.width * whole.architecture.depth * (whole.architecture.bias == "queries and values")
        parameters = sum(value.numel() for value in model_of(name).parameters()) + masked
    folded = {re.sub(r"blocks\.\d+\.", "blocks.{}.", key): shape for key, shape in tensors.items()}
    return {
        "encoder": name,
        "model": MODELS[name][0],
        "seed": SEED,
        "depth": depth,
        "pixels": whole.pixels,
        "outputs": {
            output: {
                "every": values.shape[1] // picked,
                "values": np.round(values[:, :: values.shape[1] // picked].double().numpy(), 6).tolist(),
                "norms": np.round(np.linalg.norm(values.double().numpy(), axis=1), 5).tolist(),
            }
            for output, values in outputs.items()
        },
        "blocks": whole.architecture.depth,
        "parameters": parameters,
        "tensors": folded,
    }


if __name__ == "__main__":
    for encoder in sys.argv[1:] or MODELS:
        print(encoder, flush=True)
        (HERE / f"{encoder}.timm.json").write_text(json.dumps(golden(encoder), indent=1) + "\n")
