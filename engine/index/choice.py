"""Which of an archive's embeddings are meant: one plan, one encoder, one of its outputs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from patchmill.archive import Archive
from patchmill.errors import ArchiveError, UsageError
from patchmill.types import EncoderSpec, Settings

__all__ = ["Choice", "choose", "recorded"]

Record = TypeVar("Record")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One plan, one encoder and one of its outputs: vectors of one kind that may be compared with each other."""

    plan: str  # plan key
    encoder: str  # encoder key
    output: str  # cls, mean
    dim: int  # width of the vectors
    encoder_name: str
    untrained: bool  # the weights are random: the vectors mean nothing


def choose(
    archive: Archive, *, plan: str | None = None, encoder: str | None = None, output: str | None = None
) -> Choice:
    """The one (plan, encoder, output) that the arguments single out among the complete embeddings of the archive.

    plan: a plan key or its beginning. encoder: an encoder key, its beginning or an encoder's name. output: one of
    the encoder's outputs; None is the one that it names first. Raises UsageError where nothing is complete, where
    nothing matches, and where several (plan, encoder) pairs are left: it names them.
    """
    sources = {pair for id in archive.source_ids() for pair in archive.source(id).embedded()}
    if not sources:
        raise UsageError("archive", "no source in it is completely embedded", "run patchmill embed first")
    settings, records = archive.plans(), archive.encoders()
    plans = {key: recorded(settings, f"plans/{key}.json", key) for key, _ in sources}
    specs = {key: recorded(records, f"encoders/{key}.json", key).spec for _, key in sources}
    pairs = [
        (plan_key, encoder_key)
        for plan_key, encoder_key in sorted(sources)
        if (plan is None or plan_key.startswith(plan))
        and (encoder is None or encoder_key.startswith(encoder) or specs[encoder_key].name == encoder)
    ]
    if not pairs:
        given = (("--plan", plan), ("--encoder", encoder))
        asked = " ".join(f"{option} {text}" for option, text in given if text is not None)
        raise UsageError(asked, "no complete source has these embeddings", _offer(sorted(sources), plans, specs))
    if len(pairs) > 1:
        raise UsageError("archive", f"it holds {len(pairs)} kinds of embeddings", _offer(pairs, plans, specs))
    plan_key, encoder_key = pairs[0]
    spec = specs[encoder_key]
    name = next(iter(spec.outputs)) if output is None else output
    if name not in spec.outputs:
        raise UsageError("--output", f"{spec.name} has no output {name!r}", f"choose one of {', '.join(spec.outputs)}")
    return Choice(
        plan=plan_key,
        encoder=encoder_key,
        output=name,
        dim=spec.outputs[name],
        encoder_name=spec.name,
        untrained=spec.untrained,
    )


def recorded(records: Mapping[str, Record], file: str, key: str) -> Record:
    """A record that an archive's sources speak of. Raises ArchiveError, naming its file, if it is gone."""
    if key not in records:
        raise ArchiveError(file, "it is missing", "restore it from a backup, or run patchmill embed again")
    return records[key]


def _offer(pairs: Iterable[tuple[str, str]], plans: dict[str, Settings], specs: dict[str, EncoderSpec]) -> str:
    """What may be chosen, as an advice in one line."""
    choices = (
        f"--plan {plan} --encoder {encoder} ({plans[plan].describe()}; "
        f"{specs[encoder].name} {specs[encoder].precision}, {specs[encoder].view.pixels} px)"
        for plan, encoder in pairs
    )
    return f"choose one: {' or '.join(choices)}"
