"""From a weights file to the canonical layout: reading, recognising the keys, checking every tensor, converting."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from patchmill.encoders.cards import Card, EfficientNetLite, ViT
from patchmill.encoders.layout import inverted_blocks
from patchmill.encoders.torchfile import RefusedError, read_torch
from patchmill.errors import EncoderError

__all__ = ["load"]

Tensors = Mapping[str, np.ndarray]
Shapes = dict[str, tuple[int, ...]]

ROTARY_TOLERANCE = 0.01  # relative; Meta stores the periods in bfloat16


def load(path: Path, card: Card) -> dict[str, np.ndarray]:
    """Weights of one encoder in the canonical layout, float32, all finite.

    path: safetensors in a layout of transformers (4.x or 5.x), or a `.pth` with Meta's layout or that of
    efficientnet_lite_pytorch. Raises EncoderError for any file that is not exactly these weights.
    """
    tensors = read(path)
    wanted, convert, ignored = _layout(path, tensors, card)
    if card.architecture.family == "dinov3-vit":
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(ignored)}
    _check_names(path, tensors, wanted, card)
    return convert({name: _checked(path, name, tensors[name], shape, card) for name, shape in wanted.items()})


def read(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors or `.pth` file by name, as stored. Raises EncoderError with one line."""
    try:
        with path.open("rb") as file:
            head = file.read(9)
        if path.suffix == ".safetensors" or head[8:] == b"{":  # a length of 8 bytes, then JSON
            with safe_open(path, framework="numpy") as opened:
                return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no dictionary
        return read_torch(path)
    except RefusedError as error:
        raise EncoderError(str(path), str(error), "get the weights again, from their origin") from error
    except (SafetensorError, TypeError) as error:  # TypeError: a dtype that NumPy lacks
        reason = str(error).splitlines()[0][:120]
        raise EncoderError(str(path), f"is no intact safetensors file ({reason})", "get the weights again") from error
    except OSError as error:
        raise EncoderError(
            str(path), f"cannot be read ({error.strerror})", "check the path and its permissions"
        ) from error


Converter = Callable[[Tensors], dict[str, np.ndarray]]


def _layout(path: Path, tensors: Tensors, card: Card) -> tuple[Shapes, Converter, tuple[str, ...]]:
    """Recognise the keys: the shapes that the layout has, its converter, and endings of keys that do not matter."""
    arch = card.architecture
    if isinstance(arch, EfficientNetLite) and "_conv_stem.weight" in tensors:
        return _efficientnet_shapes(arch), lambda found: _from_efficientnet(found, arch), ("num_batches_tracked",)
    if isinstance(arch, ViT) and {"embeddings.cls_token", "model.embeddings.cls_token"} & tensors.keys():
        return _hugging_face_shapes(arch), lambda found: _from_hugging_face(found, arch), ("mask_token", "inv_freq")
    if isinstance(arch, ViT) and "cls_token" in tensors:
        return _meta_shapes(arch), lambda found: _from_meta(path, found, arch), ("mask_token",)
    example = next(iter(tensors), "nothing")
    known = "efficientnet_lite_pytorch" if isinstance(arch, EfficientNetLite) else "transformers or Meta"
    wrong = f"has no tensors as {known} name them (it begins with {example})"
    raise EncoderError(str(path), wrong, f"give the weights of {card.name}")


def _check_names(path: Path, tensors: Tensors, wanted: Shapes, card: Card) -> None:
    missing = [name for name in wanted if name not in tensors]
    unexpected = [name for name in tensors if name not in wanted]
    for names, what in ((missing, "lacks"), (unexpected, "also holds")):
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise EncoderError(str(path), f"{what} {names[0]}{others}", f"give the weights of {card.name}")


def _checked(path: Path, name: str, tensor: np.ndarray, shape: tuple[int, ...], card: Card) -> np.ndarray:
    """One tensor as float32. Raises EncoderError for another shape, integers, NaN or infinity."""
    if tensor.shape != shape:
        wrong = f"{name} is {list(tensor.shape)}, {card.name} wants {list(shape)}"
        raise EncoderError(str(path), wrong, "give the weights of that encoder")
    if not np.issubdtype(tensor.dtype, np.floating) and tensor.dtype.name != "bfloat16":
        raise EncoderError(
            str(path), f"{name} holds {tensor.dtype}, no floating-point numbers", "get the weights again"
        )
    tensor = np.ascontiguousarray(tensor, np.float32).reshape(shape)
    if not np.isfinite(tensor).all():
        raise EncoderError(str(path), f"{name} holds NaN or infinity", "get the weights again")
    return tensor


# ------------------------------------------------------------------------------------------------- transformers


def _hugging_face_shapes(arch: ViT) -> Shapes:
    """Names as transformers 4.x writes them; 5.x may put `model.` in front."""
    width, hidden = arch.width, arch.hidden
    result: Shapes = {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.register_tokens": (1, arch.registers, width),
        "embeddings.patch_embeddings.weight": (width, 3, arch.patch, arch.patch),
        "embeddings.patch_embeddings.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for block in (f"layer.{number}" for number in range(arch.depth)):
        for norm in ("norm1", "norm2"):
            result |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
        for letter in "qkvo":
            result[f"{block}.attention.{letter}_proj.weight"] = (width, width)
            if letter != "k":
                result[f"{block}.attention.{letter}_proj.bias"] = (width,)
        result |= {f"{block}.mlp.up_proj.weight": (hidden, width), f"{block}.mlp.up_proj.bias": (hidden,)}
        result |= {f"{block}.mlp.down_proj.weight": (width, hidden), f"{block}.mlp.down_proj.bias": (width,)}
        result |= {f"{block}.layer_scale{number}.lambda1": (width,) for number in (1, 2)}
    return result


def _from_hugging_face(found: Tensors, arch: ViT) -> dict[str, np.ndarray]:
    weights = {
        "cls": found["embeddings.cls_token"][0, 0],
        "registers": found["embeddings.register_tokens"][0],
        "patch.weight": found["embeddings.patch_embeddings.weight"],
        "patch.bias": found["embeddings.patch_embeddings.bias"],
        "norm.weight": found["norm.weight"],
        "norm.bias": found["norm.bias"],
    }
    for number in range(arch.depth):
        theirs, ours = f"layer.{number}", f"blocks.{number}"
        projections = [found[f"{theirs}.attention.{letter}_proj.weight"] for letter in "qkv"]
        query, value = (found[f"{theirs}.attention.{letter}_proj.bias"] for letter in "qv")
        weights[f"{ours}.qkv.weight"] = np.concatenate(projections)
        weights[f"{ours}.qkv.bias"] = np.concatenate([query, np.zeros_like(query), value])
        for part in ("weight", "bias"):
            weights[f"{ours}.norm1.{part}"] = found[f"{theirs}.norm1.{part}"]
            weights[f"{ours}.norm2.{part}"] = found[f"{theirs}.norm2.{part}"]
            weights[f"{ours}.proj.{part}"] = found[f"{theirs}.attention.o_proj.{part}"]
            weights[f"{ours}.fc1.{part}"] = found[f"{theirs}.mlp.up_proj.{part}"]
            weights[f"{ours}.fc2.{part}"] = found[f"{theirs}.mlp.down_proj.{part}"]
        weights[f"{ours}.scale1"] = found[f"{theirs}.layer_scale1.lambda1"]
        weights[f"{ours}.scale2"] = found[f"{theirs}.layer_scale2.lambda1"]
    return weights


# --------------------------------------------------------------------------------------------------------- Meta


def _meta_shapes(arch: ViT) -> Shapes:
    width, hidden = arch.width, arch.hidden
    result: Shapes = {
        "cls_token": (1, 1, width),
        "storage_tokens": (1, arch.registers, width),
        "patch_embed.proj.weight": (width, 3, arch.patch, arch.patch),
        "patch_embed.proj.bias": (width,),
        "rope_embed.periods": (width // arch.heads // 4,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for block in (f"blocks.{number}" for number in range(arch.depth)):
        for norm in ("norm1", "norm2"):
            result |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
        result |= {f"{block}.attn.qkv.weight": (3 * width, width), f"{block}.attn.proj.weight": (width, width)}
        result |= {f"{block}.attn.qkv.bias": (3 * width,), f"{block}.attn.proj.bias": (width,)}
        result[f"{block}.attn.qkv.bias_mask"] = (3 * width,)
        result |= {f"{block}.mlp.fc1.weight": (hidden, width), f"{block}.mlp.fc1.bias": (hidden,)}
        result |= {f"{block}.mlp.fc2.weight": (width, hidden), f"{block}.mlp.fc2.bias": (width,)}
        result |= {f"{block}.ls{number}.gamma": (width,) for number in (1, 2)}
    return result


def _from_meta(path: Path, found: Tensors, arch: ViT) -> dict[str, np.ndarray]:
    head = arch.width // arch.heads
    periods = arch.rope_base ** (np.arange(head // 4) * 4 / head)
    if not np.allclose(found["rope_embed.periods"], periods, rtol=ROTARY_TOLERANCE, atol=0):
        raise EncoderError(str(path), f"its positions have another base than {arch.rope_base}", "give DINOv3's weights")
    weights = {
        "cls": found["cls_token"][0, 0],
        "registers": found["storage_tokens"][0],
        "patch.weight": found["patch_embed.proj.weight"],
        "patch.bias": found["patch_embed.proj.bias"],
        "norm.weight": found["norm.weight"],
        "norm.bias": found["norm.bias"],
    }
    for block in (f"blocks.{number}" for number in range(arch.depth)):
        weights[f"{block}.qkv.weight"] = found[f"{block}.attn.qkv.weight"]
        weights[f"{block}.qkv.bias"] = found[f"{block}.attn.qkv.bias"] * found[f"{block}.attn.qkv.bias_mask"]
        for part in ("weight", "bias"):
            weights[f"{block}.proj.{part}"] = found[f"{block}.attn.proj.{part}"]
            for name in ("norm1", "norm2"):
                weights[f"{block}.{name}.{part}"] = found[f"{block}.{name}.{part}"]
            for name in ("fc1", "fc2"):
                weights[f"{block}.{name}.{part}"] = found[f"{block}.mlp.{name}.{part}"]
        weights[f"{block}.scale1"] = found[f"{block}.ls1.gamma"]
        weights[f"{block}.scale2"] = found[f"{block}.ls2.gamma"]
    return weights


# ---------------------------------------------------------------------------------------- efficientnet_lite_pytorch


def _convolutions(arch: EfficientNetLite) -> list[tuple[str, str, str, tuple[int, int, int, int]]]:
    """Our name, their convolution, their BatchNorm, and the convolution's shape."""
    result = [("stem", "_conv_stem", "_bn0", (arch.stem, 3, 3, 3))]
    for number, block in enumerate(inverted_blocks(arch)):
        theirs, k = f"_blocks.{number}", block.kernel
        if block.expanded != block.inputs:
            expand = (block.expanded, block.inputs, 1, 1)
            result.append((f"{block.name}.expand", f"{theirs}._expand_conv", f"{theirs}._bn0", expand))
        depthwise, project = (block.expanded, 1, k, k), (block.outputs, block.expanded, 1, 1)
        result.append((f"{block.name}.depthwise", f"{theirs}._depthwise_conv", f"{theirs}._bn1", depthwise))
        result.append((f"{block.name}.project", f"{theirs}._project_conv", f"{theirs}._bn2", project))
    return [*result, ("head", "_conv_head", "_bn1", (arch.width, arch.stages[-1][-1], 1, 1))]


def _efficientnet_shapes(arch: EfficientNetLite) -> Shapes:
    result: Shapes = {"_fc.weight": (arch.classes, arch.width), "_fc.bias": (arch.classes,)}
    for _, convolution, norm, shape in _convolutions(arch):
        result[f"{convolution}.weight"] = shape
        result |= {f"{norm}.{part}": shape[:1] for part in ("weight", "bias", "running_mean", "running_var")}
    return result


def _from_efficientnet(found: Tensors, arch: EfficientNetLite) -> dict[str, np.ndarray]:
    """Fold every BatchNorm into its convolution, in float64."""
    weights: dict[str, np.ndarray] = {}
    for name, convolution, norm, _ in _convolutions(arch):
        parts = ("weight", "bias", "running_mean", "running_var")
        gamma, beta, mean, variance = (found[f"{norm}.{part}"].astype(np.float64) for part in parts)
        scale = gamma / np.sqrt(variance + arch.eps)
        weights[f"{name}.weight"] = (found[f"{convolution}.weight"] * scale[:, None, None, None]).astype(np.float32)
        weights[f"{name}.bias"] = (beta - mean * scale).astype(np.float32)
    return weights
