"""How published files name their tensors: for every layout, which of them make up each tensor of ours."""

from collections.abc import Mapping
from dataclasses import dataclass

from patchmill.encoders.cards import Architecture, ConvNeXt, CTNet, EfficientNetLite, ViT
from patchmill.encoders.layout import inverted_blocks, residual_blocks, shapes

__all__ = ["PREFIXES", "Layout", "Stored", "layouts", "superfluous"]

PREFIXES = ("module.", "model.", "backbone.")  # of whole files, from wrappers around the model
# What training needs and encoding does not: masks, tables that follow from the architecture, counters, a norm for small
# crops (facebookresearch/dinov3, models/vision_transformer.py: "never used during eval"), heads of other tasks.
UNUSED = ("mask_token", "inv_freq", "rope_embed.periods", "bias_mask", "num_batches_tracked")
UNUSED_PARTS = ("local_cls_norm.", "dino_head", "ibot")


@dataclass(frozen=True, slots=True)
class Stored:
    """Tensors of a file that make up one of ours, joined along the first axis; an empty name stands for zeros."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    folded: bool = False  # they are a convolution's weight, and its BatchNorm's weight, bias, mean and variance


Layout = Mapping[str, Stored]  # by our name


def superfluous(name: str, arch: Architecture) -> bool:
    """Whether a tensor of a file is nothing that the encoder needs, though files of it hold it."""
    if isinstance(arch, ViT) and arch.head is not None:  # one tower of two, and of it one pooler of two
        parts = ("visual.attn_pool_caption.", "visual.ln_caption.", "visual.head.norm.")
        if not name.startswith("visual.") or name.startswith(parts):
            return True
    if isinstance(arch, CTNet) and name.startswith("classifier.6."):  # to the logits, whose number differs
        return True
    if isinstance(arch, ConvNeXt) and name.startswith("norms."):  # norms.3 is norm, the others do nothing
        return True
    return name.endswith(UNUSED) or any(part in name for part in UNUSED_PARTS)


def layouts(arch: Architecture) -> dict[str, Layout]:
    """Every layout that files of an architecture come in, by the name of the code that writes it."""
    match arch:
        case ViT():
            return {name: _vit(arch, names) for name, names in _VIT.items()}
        case ConvNeXt():
            return {name: _convnext(arch, names) for name, names in _CONVNEXT.items()}
        case EfficientNetLite():
            return {"efficientnet_lite_pytorch": _efficientnet(arch)}
        case CTNet():
            return {"ct-net-models": _ctnet(arch)}


# ------------------------------------------------------------------------------------------------------------- ViT

# Our name in a block, or of a whole tensor, to theirs; several are joined. {} is the block's number.
_META = {
    "patch": "patch_embed.proj",
    "cls": "cls_token",
    "registers": "storage_tokens",
    "positions": "pos_embed",
    "norm1": "blocks.{}.norm1",
    "qkv": "blocks.{}.attn.qkv",
    "proj": "blocks.{}.attn.proj",
    "scale1": "blocks.{}.ls1.gamma",
    "norm2": "blocks.{}.norm2",
    "fc1": "blocks.{}.mlp.fc1",
    "fc2": "blocks.{}.mlp.fc2",
    "gated fc1": "blocks.{}.mlp.w1 blocks.{}.mlp.w2",
    "gated fc2": "blocks.{}.mlp.w3",
    "scale2": "blocks.{}.ls2.gamma",
    "norm": "norm",
}
_TIMM = _META | {
    "registers": "reg_token",
    "gated fc1": "blocks.{}.mlp.fc1",
    "gated fc2": "blocks.{}.mlp.fc2",
}
_TRANSFORMERS = {
    "patch": "embeddings.patch_embeddings",
    "cls": "embeddings.cls_token",
    "registers": "embeddings.register_tokens",
    "positions": "embeddings.position_embeddings",
    "norm1": "layer.{}.norm1",
    "qkv": "layer.{}.attention.q_proj layer.{}.attention.k_proj layer.{}.attention.v_proj",
    "proj": "layer.{}.attention.o_proj",
    "scale1": "layer.{}.layer_scale1.lambda1",
    "norm2": "layer.{}.norm2",
    "fc1": "layer.{}.mlp.up_proj",
    "fc2": "layer.{}.mlp.down_proj",
    "gated fc1": "layer.{}.mlp.gate_proj layer.{}.mlp.up_proj",
    "gated fc2": "layer.{}.mlp.down_proj",
    "scale2": "layer.{}.layer_scale2.lambda1",
    "norm": "norm",
}
_TRANSFORMERS_2 = {name: value.replace("layer.{}", "encoder.layer.{}") for name, value in _TRANSFORMERS.items()} | {
    "patch": "embeddings.patch_embeddings.projection",
    "fc1": "encoder.layer.{}.mlp.fc1",
    "fc2": "encoder.layer.{}.mlp.fc2",
    "norm": "layernorm",
}
_ATTENTION = "encoder.layer.{}.attention.attention."
_VIT: Mapping[str, Mapping[str, str]] = {
    "Meta (DINOv3)": _META,
    "Meta (DINOv2)": _META | {"registers": "register_tokens", "gated fc1": "blocks.{}.mlp.w12"},
    "timm": _TIMM,
    "timm (Eva)": _TIMM
    | {
        "scale1": "blocks.{}.gamma_1",
        "scale2": "blocks.{}.gamma_2",
        "qkv.bias": "blocks.{}.attn.q_bias  blocks.{}.attn.v_bias",
        "gated fc1": "blocks.{}.mlp.fc1_g blocks.{}.mlp.fc1_x",
    },
    "transformers (DINOv3)": _TRANSFORMERS,
    "transformers (DINOv2)": _TRANSFORMERS_2,
    "transformers 4 (DINOv2)": _TRANSFORMERS_2
    | {
        "qkv": f"{_ATTENTION}query {_ATTENTION}key {_ATTENTION}value",
        "proj": "encoder.layer.{}.attention.output.dense",
        "gated fc1": "encoder.layer.{}.mlp.weights_in",
        "gated fc2": "encoder.layer.{}.mlp.weights_out",
    },
}
_HEAD = {  # the linear one is open_clip's, the other CONCH's
    "head.weight": "visual.head.proj.weight",
    "head.query": "visual.attn_pool_contrast.query",
    "head.query_norm": "visual.attn_pool_contrast.ln_q",
    "head.key_norm": "visual.attn_pool_contrast.ln_k",
    "head.q.weight": "visual.attn_pool_contrast.attn.q_proj_weight",
    "head.k.weight": "visual.attn_pool_contrast.attn.k_proj_weight",
    "head.v.weight": "visual.attn_pool_contrast.attn.v_proj_weight",
    "head.qkv.bias": "visual.attn_pool_contrast.attn.in_proj_bias",
    "head.proj": "visual.attn_pool_contrast.attn.out_proj",
    "head.out_norm": "visual.ln_contrast",
    "head.contrast": "visual.proj_contrast",
}


def _vit(arch: ViT, names: Mapping[str, str]) -> Layout:
    leading = {"cls": (1, 1), "registers": (1,), "positions": (1,), "head.query": (1,)}  # axes that files have more
    found: dict[str, Stored] = {}
    for ours, shape in shapes(arch).items():
        prefix = "visual.trunk." if arch.head and not ours.startswith("head.") else ""
        number, part = "", ours
        if ours.startswith("blocks."):
            _, number, part = ours.split(".", 2)
        theirs = _names(arch, part, _HEAD if ours.startswith("head.") else names, number)
        masked = part == "qkv.bias" and arch.bias == "queries and values"
        if masked and len(theirs) == 3:
            theirs[1] = ""
        rows = shape[0] // len(theirs)
        pieces = ((*leading.get(ours, ()), rows, *shape[1:]) for _ in theirs)
        found[ours] = Stored(tuple(f"{prefix}{name}" if name else "" for name in theirs), tuple(pieces))
    return found


def _names(arch: ViT, part: str, names: Mapping[str, str], number: str) -> list[str]:
    """Their names of a tensor of ours; a name for a layer stands for its weight and its bias."""
    if part in names:
        return names[part].format(number, number, number).split(" ")
    layer, _, kind = part.rpartition(".")
    gated = f"gated {layer}"
    found = names[gated if arch.mlp == "swiglu" and gated in names else layer]
    return [f"{name}.{kind}" for name in found.format(number, number, number).split(" ")]


# -------------------------------------------------------------------------------------------------------- ConvNeXt

# stem and down: a convolution and a norm each; {0} is the stage, {1} the block.
_CONVNEXT: Mapping[str, Mapping[str, str]] = {
    "Meta": {
        "stem": "downsample_layers.0.0",
        "stem norm": "downsample_layers.0.1",
        "down": "downsample_layers.{0}.1",
        "down norm": "downsample_layers.{0}.0",
        "depthwise": "stages.{0}.{1}.dwconv",
        "norm": "stages.{0}.{1}.norm",
        "fc1": "stages.{0}.{1}.pwconv1",
        "fc2": "stages.{0}.{1}.pwconv2",
        "scale": "stages.{0}.{1}.gamma",
        "last": "norm",
    },
    "timm": {
        "stem": "stem.0",
        "stem norm": "stem.1",
        "down": "stages.{0}.downsample.1",
        "down norm": "stages.{0}.downsample.0",
        "depthwise": "stages.{0}.blocks.{1}.conv_dw",
        "norm": "stages.{0}.blocks.{1}.norm",
        "fc1": "stages.{0}.blocks.{1}.mlp.fc1",
        "fc2": "stages.{0}.blocks.{1}.mlp.fc2",
        "scale": "stages.{0}.blocks.{1}.gamma",
        "last": "head.norm",
    },
    "transformers": {
        "stem": "stages.0.downsample_layers.0",
        "stem norm": "stages.0.downsample_layers.1",
        "down": "stages.{0}.downsample_layers.1",
        "down norm": "stages.{0}.downsample_layers.0",
        "depthwise": "stages.{0}.layers.{1}.depthwise_conv",
        "norm": "stages.{0}.layers.{1}.layer_norm",
        "fc1": "stages.{0}.layers.{1}.pointwise_conv1",
        "fc2": "stages.{0}.layers.{1}.pointwise_conv2",
        "scale": "stages.{0}.layers.{1}.gamma",
        "last": "layer_norm",
    },
}


def _convnext(arch: ConvNeXt, names: Mapping[str, str]) -> Layout:
    found: dict[str, Stored] = {}
    for ours, shape in shapes(arch).items():
        match ours.split("."):
            case ["norm", kind]:
                theirs = f"{names['last']}.{kind}"
            case ["stages", "0", "down" | "norm" as layer, kind]:
                theirs = f"{names['stem' if layer == 'down' else 'stem norm']}.{kind}"
            case ["stages", stage, "down" | "norm" as layer, kind]:
                theirs = f"{names['down' if layer == 'down' else 'down norm'].format(stage)}.{kind}"
            case ["stages", stage, "blocks", block, "scale"]:
                theirs = names["scale"].format(stage, block)
            case ["stages", stage, "blocks", block, layer, kind]:
                theirs = f"{names[layer].format(stage, block)}.{kind}"
        found[ours] = Stored((theirs,), (shape,))
    return found


# ---------------------------------------------------------------------------------------- efficientnet_lite_pytorch


def _efficientnet(arch: EfficientNetLite) -> Layout:
    """The convolution and its BatchNorm under the names of both our tensors; and the classifier, under none of ours."""
    found = {"": Stored(("_fc.weight", "_fc.bias"), ((arch.classes, arch.width), (arch.classes,)))}
    for name, convolution, norm, shape in _convolutions(arch):
        found |= _folded(name, convolution, norm, shape)
    return found


def _folded(name: str, convolution: str, norm: str, shape: tuple[int, ...]) -> Layout:
    """A convolution of ours, of theirs without a bias and the BatchNorm after it."""
    parts = tuple(f"{norm}.{part}" for part in ("weight", "bias", "running_mean", "running_var"))
    stored = Stored((f"{convolution}.weight", *parts), (shape, *(shape[:1],) * len(parts)), folded=True)
    return {f"{name}.weight": stored, f"{name}.bias": stored}


def _convolutions(arch: EfficientNetLite) -> list[tuple[str, str, str, tuple[int, int, int, int]]]:
    """Our name, their convolution, their BatchNorm, and the convolution's shape."""
    result = [("stem", "_conv_stem", "_bn0", (arch.stem, 3, 3, 3))]
    for number, block in enumerate(inverted_blocks(arch)):
        theirs, k = f"_blocks.{number}", block.kernel
        if block.expanded != block.inputs:
            expand = (block.expanded, block.inputs, 1, 1)
            result.append((f"{block.name}.expand", f"{theirs}._expand_conv", f"{theirs}._bn0", expand))
        depthwise = (block.expanded, 1, k, k)
        result.append((f"{block.name}.depthwise", f"{theirs}._depthwise_conv", f"{theirs}._bn1", depthwise))
        project = (block.outputs, block.expanded, 1, 1)
        result.append((f"{block.name}.project", f"{theirs}._project_conv", f"{theirs}._bn2", project))
    result.append(("head", "_conv_head", "_bn1", (arch.width, arch.stages[-1][-1], 1, 1)))
    return result


# ------------------------------------------------------------------------------------------------------ ct-net-models


def _ctnet(arch: CTNet) -> Layout:
    """torchvision's ResNet as a sequence: the stem is 0, its BatchNorm 1, the stages 4 to 7."""
    known = shapes(arch)
    found = dict(_folded("stem", "features.0", "features.1", known["stem.weight"]))
    for block in residual_blocks(arch):
        _, stage, _, number = block.name.split(".")
        theirs = f"features.{4 + int(stage)}.{number}"
        for part, convolution, norm in (
            ("first", "conv1", "bn1"),
            ("second", "conv2", "bn2"),
            ("project", "downsample.0", "downsample.1"),
        ):
            if (shape := known.get(f"{block.name}.{part}.weight")) is not None:
                found |= _folded(f"{block.name}.{part}", f"{theirs}.{convolution}", f"{theirs}.{norm}", shape)
    layers = {f"reduce.{number}": f"reducingconvs.{2 * number}" for number in range(len(arch.reduced))}
    layers |= {f"hidden.{number}": f"classifier.{3 * number}" for number in range(len(arch.hidden))}
    for ours, theirs in layers.items():
        for part in ("weight", "bias"):
            found[f"{ours}.{part}"] = Stored((f"{theirs}.{part}",), (known[f"{ours}.{part}"],))
    return found
