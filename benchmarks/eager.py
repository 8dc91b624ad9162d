"""The usual way to run an encoder: transformers' model in PyTorch, on normalised floats."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import UInt8

from patchmill.encoders.cards import ConvNeXt, ViT, card

__all__ = ["eager"]

Tiles = UInt8[np.ndarray, "n h w 3"]


def eager(
    name: str, threads: int | None = None, *, device: str = "cpu", half: bool = False, compiled: bool = False
) -> Callable[[Tiles], Any] | None:
    """An encoder's model with random weights in inference mode; None where transformers is missing or lacks the model.

    Pixels are normalised by it too, as they are in our graphs. half: everything in fp16. compiled: by torch.compile.
    """
    try:
        import torch
        import transformers
    except ImportError:
        return None
    arch = card(name).architecture
    if isinstance(arch, ViT) and arch.family == "dinov3-vit":
        vit = transformers.DINOv3ViTConfig(
            hidden_size=arch.width,
            num_hidden_layers=arch.depth,
            num_attention_heads=arch.heads,
            intermediate_size=arch.hidden,
            num_register_tokens=arch.registers,
            use_gated_mlp=arch.mlp == "swiglu",
            hidden_act="silu" if arch.mlp == "swiglu" else "gelu",
            query_bias=arch.bias != "none",
            value_bias=arch.bias != "none",
            layer_norm_eps=arch.eps,
        )
        model: Any = transformers.DINOv3ViTModel(vit)
    elif isinstance(arch, ConvNeXt):
        convnext = transformers.DINOv3ConvNextConfig(depths=list(arch.depths), hidden_sizes=list(arch.widths))
        model = transformers.DINOv3ConvNextModel(convnext)
    else:
        return None
    dtype = torch.float16 if half else torch.float32
    model = model.eval().to(device, dtype)
    model = torch.compile(model, dynamic=False) if compiled else model
    if threads is not None:
        torch.set_num_threads(threads)
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (arch.mean, arch.std))
    prefix = 1 + (arch.registers if isinstance(arch, ViT) else 0)

    def encode(pixels: Tiles) -> Any:
        with torch.inference_mode():
            floats = (torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 255 - mean) / std
            tokens = model(floats.to(dtype)).last_hidden_state
            return tokens[:, 0].float().cpu(), tokens[:, prefix:].mean(1).float().cpu()

    return encode
