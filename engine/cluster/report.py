"""What a run leaves behind: an outcome for every source, and where the time went."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

__all__ = ["Outcome", "RunReport", "SourceOutcome"]

Outcome = Literal["complete", "empty", "failed", "transient"]
STAGES = ("read", "decode", "core", "resample", "batch", "encode", "write")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceOutcome:
    """How one source ended. `path` is for the user's terminal; what is stored leaves it out."""

    source: str
    path: str
    outcome: Outcome
    rows: int = 0
    embedded: int = 0  # rows embedded by this run; the rest were there before
    unreadable: int = 0  # rows that lie on damaged parts of the file
    skipped: bool = False  # it was complete before this run began
    mpp: float | None = None  # micrometres that a tile pixel spans, of a slide
    empty: int = 0  # tiles of a volume that were left out as they hold too little of the body
    unreadable_files: int = 0  # of the folder of a DICOM series, which may be slices of it
    other_objects: int = 0  # of a DICOM series: files that bear its UID and are no slices
    reader: str = ""  # who decodes it; not told of a source that was skipped
    kind: str = ""  # the kind of error, "quarantined" among them
    wrong: str = ""  # what is wrong and what to do, without any path
    seconds: float = 0.0

    def stored(self) -> Mapping[str, Any]:
        """The record that goes into the archive: no path."""
        return {key: value for key, value in asdict(self).items() if key != "path"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """One run of `embed`."""

    run: str
    archive: str
    plan: str  # plan key
    encoder: str  # encoder key
    name: str  # of the encoder
    untrained: bool
    precision: str
    gate: Mapping[str, Any]
    outcomes: tuple[SourceOutcome, ...]
    tiles: int  # embedded and committed by this run
    seconds: float  # wall time, from the start of the workers to the last completion
    embed_seconds: float  # from the first shard's start to the last shard's commit
    encoder_busy: float  # share of embed_seconds in which the encoder worked, 0..1, mean over workers
    encoder_starved: float  # share in which it waited for pixels
    stages: Mapping[str, float]  # share of the tasks' time per stage; see STAGES
    decoded: float  # pixels read from files per pixel that tiles cover
    peak_bytes: int  # largest worker process
    versions: Mapping[str, str]
    stopped: str = ""  # why the run ended before its sources, if it did
    redone: int = 0  # shards started over after a worker's death
    started: str = ""  # UTC
    user: str = field(default="")

    @property
    def rate(self) -> float:
        """Tiles per second while shards were being embedded."""
        return self.tiles / self.embed_seconds if self.embed_seconds > 0 else 0.0

    @property
    def failed(self) -> int:
        """Sources that are not in the archive after this run."""
        return sum(outcome.outcome in ("failed", "transient") for outcome in self.outcomes)

    def count(self, outcome: Outcome) -> int:
        """Sources with this outcome."""
        return sum(each.outcome == outcome for each in self.outcomes)

    def as_dict(self, *, paths: bool) -> dict[str, Any]:
        """A JSON-able object; without `paths` it may be stored."""
        value = {name: getattr(self, name) for name in self.__slots__ if name != "outcomes"}
        if not paths:
            del value["archive"]
        value["rate"] = self.rate
        value["outcomes"] = [asdict(o) if paths else o.stored() for o in self.outcomes]
        return value
