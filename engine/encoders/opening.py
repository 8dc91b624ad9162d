"""From settings to an encoder that is open: the spec, the graph, the session; with the gate, or without."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from patchmill.encoders import convnext, ctnet, efficientnet, vit
from patchmill.encoders.cards import Architecture, Card, ConvNeXt, CTNet, EfficientNetLite, Exported, ViT, card, cards
from patchmill.encoders.checkpoints import load
from patchmill.encoders.exported import files_of, read_graph
from patchmill.encoders.gate import GateReport, judge, reference_of, refusal, with_whole
from patchmill.encoders.graph import Model
from patchmill.encoders.graphcache import CachedGraph, digest_of, find_graph, keep_graph
from patchmill.encoders.layout import parameters, untrained
from patchmill.encoders.precision import Precision, precisions
from patchmill.encoders.remembered import gate_key, recall, remember
from patchmill.encoders.runtimes import RUNS, Runtime, gpus, runtime_for
from patchmill.encoders.session import CpuEncoder, release_freed_memory
from patchmill.encoders.vit import Target
from patchmill.encoders.weights import find, locate, sha256_of
from patchmill.errors import EncoderError, NoSpaceError
from patchmill.types import Encoder, EncoderSpec, EncodeSettings, PlanSettings, Settings, View

LARGE = 8 << 30  # bytes of fp32 weights: DINOv3 7B has 27 GB
SHALLOW = 4  # blocks
Weights = Mapping[str, np.ndarray] | Model  # a graph that is not ours comes with its weights

__all__ = ["EncoderCard", "advice", "export", "known", "open_encoder", "open_gated", "placed", "resolve"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderCard:
    """One line of `patchmill encoders`."""

    name: str
    title: str
    license: str
    pixels: int
    outputs: Mapping[str, int]
    precisions: tuple[str, ...]
    tile: str  # what its authors embed, for people; empty where that is the input
    weights: str | None  # the file that would be used; None if there is none on this machine
    found: str  # by which rule it was found, or how to get it


def known() -> tuple[EncoderCard, ...]:
    """All encoders, and whether their weights are on this machine."""
    return tuple(_described(card) for card in cards().values())


def _described(card: Card) -> EncoderCard:
    located = find(card)
    return EncoderCard(
        name=card.name,
        title=card.title,
        license=card.license,
        pixels=card.pixels,
        outputs=card.outputs,
        precisions=precisions(card.architecture),
        tile=_tile(card),
        weights=str(located.path) if located else None,
        found=located.where if located else card.weights.obtain,
    )


def _tile(card: Card) -> str:
    if isinstance(card.architecture, CTNet):
        slices, pixels = card.architecture.slices, card.pixels
        return f"boxes of {slices} x {pixels} x {pixels} voxels of {card.expects.spacing:g} mm"
    tile, mpp = card.expects.tile, card.expects.mpp
    if tile is None:
        return ""
    return f"tiles of {tile} px" + (f" at {mpp:g} µm/px" if mpp is not None else "")


def advice(settings: EncodeSettings, plan: Settings) -> str:
    """What is to be said where a slide's tiles are not those that the encoder's authors use; mostly nothing."""
    if not isinstance(plan, PlanSettings):
        return ""
    expects = card(settings.encoder).expects
    tile = expects.tile not in (None, plan.tile)
    mpp = expects.mpp is not None and not 0.9 < plan.mpp / expects.mpp < 1.1
    if not tile and not mpp:
        return ""
    usual = _tile(card(settings.encoder))
    return f"{settings.encoder} is used with {usual} by its authors; these are of {plan.tile} px at {plan.mpp:g} µm/px"


def resolve(settings: EncodeSettings) -> EncoderSpec:
    """The spec of an encoder without opening it; hashes the weights file, once per process.

    The precision must be concrete: "auto" is decided by `open_gated`. Raises EncoderError for unknown names,
    missing weights, and sizes or precisions that the encoder does not have.
    """
    chosen = card(settings.encoder)
    arch = chosen.architecture
    pixels = chosen.pixels if settings.pixels is None else settings.pixels
    if pixels % arch.step or not arch.step <= pixels <= 4096:
        do = f"use a multiple of {arch.step} up to 4096; {chosen.name}'s own is {chosen.pixels}"
        raise EncoderError("--pixels", f"{chosen.name} cannot take {pixels} px", do)
    if isinstance(arch, ViT | CTNet) and arch.only not in (None, pixels):
        raise EncoderError(
            "--pixels", f"{chosen.name} cannot take {pixels} px", f"leave it at {arch.only}, its only size"
        )
    offered = precisions(arch)
    if settings.precision == "auto":
        raise EncoderError(
            "--precision", "auto is no precision yet", f"open the gate first, or use {', '.join(offered)}"
        )
    if settings.precision not in offered:
        wrong = f"{chosen.name} has no {settings.precision} graph"
        raise EncoderError("--precision", wrong, f"use auto or {', '.join(offered)}")
    return EncoderSpec(
        name=chosen.name,
        architecture=_facts(arch),
        weights=_identity(chosen, settings),
        view=View(
            pixels=pixels,
            dtype=chosen.dtype,
            intensity=settings.intensity,
            slab=settings.slab,
            depth=arch.slices if isinstance(arch, CTNet) else 1,
            fit=settings.fit,
        ),
        precision=settings.precision,
        outputs=chosen.outputs,
        license=chosen.license,
        tokens=_tokens(chosen, pixels) if settings.tokens else None,
    )


def _tokens(chosen: Card, pixels: int) -> tuple[int, int, int]:
    """Rows, columns and width of a tile's dense features. Raises EncoderError for an encoder that gives none."""
    arch = chosen.architecture
    match arch:
        case ViT() | EfficientNetLite():
            width = arch.width
        case ConvNeXt():
            width = arch.widths[-1]
        case CTNet():
            wrong = f"{chosen.name} gives vectors of whole volumes, and no dense features"
            raise EncoderError("--tokens", wrong, "leave it out, or use another encoder")
        case Exported():
            wrong = f"{chosen.name} is a graph of its own, which gives {', '.join(chosen.outputs)} alone"
            raise EncoderError("--tokens", wrong, "leave it out, or use another encoder")
    return pixels // arch.step, pixels // arch.step, width


def _facts(arch: Architecture | Exported) -> dict[str, Any]:
    """What the graph is authored from. What is as usual is left out: a new switch changes no key that exists."""
    usual = {fact.name: fact.default for fact in fields(arch)}
    return {name: value for name, value in asdict(arch).items() if value != usual[name]}


def _identity(chosen: Card, settings: EncodeSettings) -> str:
    """What identifies the weights: the sha256 of the file's bytes, or the seed."""
    if settings.untrained is not None:
        if isinstance(chosen.architecture, Exported):
            raise EncoderError("--untrained", f"{chosen.name} is a graph with weights of its own", "leave it out")
        if settings.weights is not None:
            raise EncoderError("--untrained", "--weights was given too", "give one of the two")
        if settings.untrained < 0:
            raise EncoderError("--untrained", f"{settings.untrained} is no seed", "use 0 or more")
        return f"untrained:{settings.untrained}"
    located = locate(chosen, settings.weights)
    found = sha256_of(located.path, graph=isinstance(chosen.architecture, Exported))
    if located.where == chosen.weights.package and found != chosen.weights.sha256:
        wrong = f"{located.path.name} in the package {located.where} is not the file that was published"
        raise EncoderError(chosen.name, wrong, "install the package again")
    return found


def open_encoder(settings: EncodeSettings) -> Encoder:
    """Open an encoder at a concrete precision, without the gate. Works in any process. Raises EncoderError."""
    spec = resolve(settings)
    runtime, _ = _runtime(settings)
    encoder = _opened(spec, _runnable(spec, _weights(settings), runtime, settings), runtime, settings)
    release_freed_memory()
    return encoder


def placed(settings: EncodeSettings) -> tuple[EncodeSettings, int, str]:
    """The settings with the runtime that `auto` stands for here, the GPUs that it can use, what is to be said of it.

    Raises EncoderError.
    """
    runtime, note = _runtime(settings)
    return replace(settings, runtime=runtime), gpus() if runtime != "cpu" else 0, note


def _runtime(settings: EncodeSettings) -> tuple[Runtime, str]:
    foreign = isinstance(card(settings.encoder).architecture, Exported)
    return runtime_for(settings.runtime, settings.precision, foreign=foreign)


def _runnable(
    spec: EncoderSpec, weights: Weights, runtime: Runtime, settings: EncodeSettings, afresh: bool = False
) -> Model | CachedGraph:
    """The graph that a runtime gets: authored now, or by an earlier start. afresh: now."""
    cacheable = runtime == "cpu" and settings.untrained is None and not isinstance(weights, Model)
    if cacheable and not afresh and (found := find_graph(spec)) is not None:
        return found
    model = _graph(spec, weights, plain=runtime == "tensorrt")
    if cacheable:
        keep_graph(spec, model)
    return model


def _opened(spec: EncoderSpec, graph: Model | CachedGraph, runtime: Runtime, settings: EncodeSettings) -> Encoder:
    if runtime == "cpu":
        given = graph.path if isinstance(graph, CachedGraph) else graph
        return CpuEncoder(spec, given, settings.threads, batch=settings.batch)
    assert isinstance(graph, Model), "only the CPU reads graphs from files"
    if runtime == "torch":
        from patchmill.encoders.torchsession import TorchEncoder  # torch takes seconds, and need not be installed

        return TorchEncoder(spec, graph, batch=settings.batch)
    from patchmill.encoders.cudasession import CudaEncoder

    return CudaEncoder(spec, graph, runtime, batch=settings.batch)


def export(settings: EncodeSettings, path: Path) -> None:
    """Write an encoder's graph at a concrete precision, for other runtimes: standard operators, external data.

    int8 is written with an operator of ONNX Runtime. path: ends in .onnx, so that no weights are overwritten. Raises
    EncoderError, or NoSpaceError where the disk is full.
    """
    spec = resolve(settings)
    data = path.with_name(f"{path.name}.data") if path.name else path
    if path.is_dir() or data.is_dir() or path.suffix != ".onnx":
        raise EncoderError("--onnx", f"{path} cannot be the name of a graph", "end it with .onnx, as graph.onnx")
    chosen = card(settings.encoder)
    if isinstance(chosen.architecture, Exported):
        own = {each.resolve() for each in files_of(locate(chosen, settings.weights).path)}
        if own & {path.resolve(), data.resolve()}:
            raise EncoderError("--onnx", f"{path} is the encoder's own graph, or its weights", "name another file")
    model = _graph(spec, _weights(settings), plain=spec.precision != "int8")
    try:
        model.save(path)
    except OSError as error:
        if error.errno in NoSpaceError.FULL:
            raise NoSpaceError.of(str(path), error) from error
        raise EncoderError(str(path), f"cannot be written ({error.strerror})", "name another file") from error


def open_gated(settings: EncodeSettings, *, afresh: bool = False) -> tuple[Encoder, GateReport]:
    """Open an encoder that has passed the execution gate on this machine, and the gate's report.

    The runtime is chosen first, see runtimes.py. Then "auto" takes the fastest precision that the gate lets pass: of
    fp16, bf16, fp32 on a GPU, of int8 and fp32 on a CPU, where int8 needs trained weights to be judged by. The
    report's `why` says what was taken and for what reason. afresh: do not take the word of an earlier gate on this
    machine. Raises EncoderError if a precision does not pass.
    """
    if settings.precision != "auto":
        resolve(settings)  # what the encoder lacks is told before what the machine lacks
    runtime, note = _runtime(settings)
    plan = [(precision, said + note) for precision, said in _precisions_to_try(settings, runtime)]
    encoder, report = _first_that_passes(settings, runtime, plan, afresh)
    release_freed_memory()
    return encoder, report


def _first_that_passes(
    settings: EncodeSettings, runtime: Runtime, plan: Sequence[tuple[Precision, str]], afresh: bool
) -> tuple[Encoder, GateReport]:
    fp32, weights = resolve(replace(settings, precision="fp32")), _weights(settings)

    @cache
    def reference() -> Mapping[str, np.ndarray]:
        return reference_of(fp32, _graph(fp32, weights, plain=True, depth=_judged_by(fp32)), settings.threads)

    refused = ""
    for precision, why in plan:
        spec = resolve(replace(settings, precision=precision))
        try:
            encoder, report = _judged(spec, weights, reference, settings, runtime, why + refused, afresh)
        except EncoderError as error:  # the runtime will not have this graph, or fails over it
            if precision == plan[-1][0]:
                raise
            refused = f", {precision} was refused: {error.wrong}"
            continue
        if report.passed:
            return encoder, report
        encoder.close()
        refused = f", {precision} was refused: {report.text()}"
    raise refusal(report, foreign=isinstance(weights, Model))


def _judged(
    spec: EncoderSpec,
    weights: Weights,
    reference: Callable[[], Mapping[str, np.ndarray]],
    settings: EncodeSettings,
    runtime: Runtime,
    why: str,
    afresh: bool,
) -> tuple[Encoder, GateReport]:
    graph = _runnable(spec, weights, runtime, settings, afresh)
    encoder = _opened(spec, graph, runtime, settings)
    try:
        key = gate_key(spec, digest_of(graph), encoder.provenance)
        del graph  # the runtime has its own copy of the weights
        known = None if afresh else recall(key)
        if known is not None:
            return encoder, replace(known, why=why)
        depth = _judged_by(spec)
        if depth is None:
            report = judge(encoder, reference(), why)
        else:
            first = _opened(spec, _graph(spec, weights, plain=runtime == "tensorrt", depth=depth), runtime, settings)
            try:
                report = judge(first, reference(), f"{why}, judged by its first {depth} blocks")
            finally:
                first.close()
            report = with_whole(report, encoder)
        if report.passed:
            remember(key, report)
        return encoder, report
    except EncoderError:
        encoder.close()
        raise


def _judged_by(spec: EncoderSpec) -> int | None:
    """Blocks of the copy that a very large encoder is judged by, whose fp32 reference would not fit; else None."""
    arch = card(spec.name).architecture
    large = isinstance(arch, ViT) and 4 * parameters(arch) > LARGE
    return SHALLOW if large else None


def _precisions_to_try(settings: EncodeSettings, runtime: Runtime) -> list[tuple[Precision, str]]:
    """Precisions in order of preference, each with the reason to be given if it is taken."""
    if settings.precision != "auto":
        return [(settings.precision, "asked for")]
    if runtime != "cpu":
        offered = precisions(card(settings.encoder).architecture)
        first, *others = (precision for precision in RUNS[runtime] if precision in offered)
        said: list[tuple[Precision, str]] = [(first, "the fastest that passes the gate")]
        return said + [(other, "the next that passes the gate") for other in others]
    if "int8" not in precisions(card(settings.encoder).architecture):
        return [("fp32", f"{settings.encoder} has no int8 graph")]
    if settings.untrained is not None:
        return [("fp32", "untrained weights cannot tell whether int8 is good enough")]
    return [("int8", "the fastest that passes the gate"), ("fp32", "the next that passes the gate")]


def _weights(settings: EncodeSettings) -> Weights:
    chosen = card(settings.encoder)
    if isinstance(chosen.architecture, Exported):
        return read_graph(locate(chosen, settings.weights).path, chosen, settings.pixels or chosen.pixels)
    if settings.untrained is not None:
        return untrained(chosen.architecture, settings.untrained)
    return load(locate(chosen, settings.weights).path, chosen)


def _graph(spec: EncoderSpec, weights: Weights, *, plain: bool = False, depth: int | None = None) -> Model:
    """The graph that runs, or the same in standard operators, by which it is judged. depth: blocks, all if None."""
    if isinstance(weights, Model):
        return weights
    arch, pixels = card(spec.name).architecture, spec.view.pixels
    match arch:
        case ViT():
            target: Target = "plain" if plain else "ort"
            arch = arch if depth is None else replace(arch, depth=depth)
            return vit.build(arch, weights, pixels, precision=spec.precision, target=target, outputs=list(spec.shapes))
        case ConvNeXt():
            return convnext.build(arch, weights, pixels, precision=spec.precision, tokens=spec.tokens is not None)
        case EfficientNetLite():
            return efficientnet.build(arch, weights, pixels, tokens=spec.tokens is not None)
        case CTNet():
            return ctnet.build(arch, weights, precision=spec.precision)
        case Exported():
            raise ValueError("a graph of its own needs no author")
