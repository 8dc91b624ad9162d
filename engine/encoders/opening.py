"""From settings to an encoder that is open: the spec, the graph, the session; with the gate, or without."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from patchmill.encoders import efficientnet, vit
from patchmill.encoders.cards import Card, ViT, card, cards
from patchmill.encoders.checkpoints import load
from patchmill.encoders.gate import GateReport, judge, reference_of, refusal
from patchmill.encoders.graph import Model
from patchmill.encoders.layout import untrained
from patchmill.encoders.precision import Precision, precisions
from patchmill.encoders.session import CpuEncoder, release_freed_memory
from patchmill.encoders.weights import find, locate, sha256_of
from patchmill.errors import EncoderError
from patchmill.types import EncoderSpec, EncodeSettings, View

__all__ = ["EncoderCard", "known", "open_encoder", "open_gated", "resolve"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderCard:
    """One line of `patchmill encoders`."""

    name: str
    title: str
    license: str
    pixels: int
    outputs: Mapping[str, int]
    precisions: tuple[str, ...]
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
        weights=str(located.path) if located else None,
        found=located.where if located else card.weights.obtain,
    )


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
        architecture={"family": arch.family, **asdict(arch)},
        weights=_identity(chosen, settings),
        view=View(pixels=pixels),
        precision=settings.precision,
        outputs=chosen.outputs,
        license=chosen.license,
    )


def _identity(chosen: Card, settings: EncodeSettings) -> str:
    """What identifies the weights: the sha256 of the file's bytes, or the seed."""
    if settings.untrained is not None:
        if settings.weights is not None:
            raise EncoderError("--untrained", "--weights was given too", "give one of the two")
        if settings.untrained < 0:
            raise EncoderError("--untrained", f"{settings.untrained} is no seed", "use 0 or more")
        return f"untrained:{settings.untrained}"
    located = locate(chosen, settings.weights)
    found = sha256_of(located.path)
    if located.where == chosen.weights.package and found != chosen.weights.sha256:
        wrong = f"{located.path.name} in the package {located.where} is not the file that was published"
        raise EncoderError(chosen.name, wrong, "install the package again")
    return found


def open_encoder(settings: EncodeSettings) -> CpuEncoder:
    """Open an encoder at a concrete precision, without the gate. Works in any process. Raises EncoderError."""
    spec = resolve(settings)
    encoder = CpuEncoder(spec, _graph(spec, _weights(settings)), settings.threads)
    release_freed_memory()
    return encoder


def open_gated(settings: EncodeSettings) -> tuple[CpuEncoder, GateReport]:
    """Open an encoder that has passed the execution gate on this machine, and the gate's report.

    "auto" takes int8 where the encoder has it, its weights are trained and the gate lets it pass, else fp32; the
    report's `why` says which and for what reason. Raises EncoderError if a precision does not pass.
    """
    encoder, report = _first_that_passes(settings, _precisions_to_try(settings))
    release_freed_memory()
    return encoder, report


def _first_that_passes(
    settings: EncodeSettings, plan: Sequence[tuple[Precision, str]]
) -> tuple[CpuEncoder, GateReport]:
    fp32, weights = resolve(replace(settings, precision="fp32")), _weights(settings)
    reference = reference_of(fp32, _graph(fp32, weights, reference=True), settings.threads)
    refused = ""
    for precision, why in plan:
        spec = resolve(replace(settings, precision=precision))
        try:
            encoder, report = _judged(spec, weights, reference, settings.threads, why + refused)
        except EncoderError as error:  # the runtime will not have this graph, or fails over it
            if precision == plan[-1][0]:
                raise
            refused = f", {precision} was refused: {error.wrong}"
            continue
        if report.passed:
            return encoder, report
        encoder.close()
        refused = f", {precision} was refused: {report.text()}"
    raise refusal(report)


def _judged(
    spec: EncoderSpec,
    weights: Mapping[str, np.ndarray],
    reference: Mapping[str, np.ndarray],
    threads: int | None,
    why: str,
) -> tuple[CpuEncoder, GateReport]:
    encoder = CpuEncoder(spec, _graph(spec, weights), threads)
    try:
        return encoder, judge(encoder, reference, why)
    except EncoderError:
        encoder.close()
        raise


def _precisions_to_try(settings: EncodeSettings) -> list[tuple[Precision, str]]:
    """Precisions in order of preference, each with the reason to be given if it is taken."""
    if settings.precision != "auto":
        return [(settings.precision, "asked for")]
    if "int8" not in precisions(card(settings.encoder).architecture):
        return [("fp32", f"{settings.encoder} has no int8 graph")]
    if settings.untrained is not None:
        return [("fp32", "untrained weights cannot tell whether int8 is good enough")]
    return [("int8", "the fastest that passes the gate"), ("fp32", "the next that passes the gate")]


def _weights(settings: EncodeSettings) -> dict[str, np.ndarray]:
    chosen = card(settings.encoder)
    if settings.untrained is not None:
        return untrained(chosen.architecture, settings.untrained)
    return load(locate(chosen, settings.weights).path, chosen)


def _graph(spec: EncoderSpec, weights: Mapping[str, np.ndarray], *, reference: bool = False) -> Model:
    """The graph that runs, or the one that it is judged by: fp32 in standard operators."""
    arch = card(spec.name).architecture
    if isinstance(arch, ViT):
        if reference:
            return vit.build(arch, weights, spec.view.pixels, target="plain")
        return vit.build(arch, weights, spec.view.pixels, precision=spec.precision)
    return efficientnet.build(arch, weights, spec.view.pixels)
