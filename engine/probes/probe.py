"""The kNN probe: labelled tiles judged by the tiles that look most like them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int64

from patchmill.archive import Archive
from patchmill.errors import UsageError
from patchmill.index import Choice, Pool, choose, good_vectors, whole_vector
from patchmill.probes.knn import KS, TEMPERATURE, nearest, shares, vote
from patchmill.probes.labels import Label, read_labels
from patchmill.probes.metrics import Metrics, measure
from patchmill.probes.splits import Split, make_split
from patchmill.types import many

__all__ = ["KnnResult", "ProbeReport", "probe_knn"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KnnResult:
    """What the vote of k neighbours reaches."""

    k: int
    tiles: Metrics | None  # None where k is larger than a training set
    sources: Metrics | None  # source labels only: of the mean share of a source's tiles
    reason: str | None = None  # why there is nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReport:
    """What a probe found, and all that it depends on."""

    plan: str  # plan key
    encoder: str  # encoder key
    encoder_name: str
    output: str
    pool: Pool | None  # each source is one vector, of all its tiles; None: tiles are
    untrained: bool  # random weights: the figures say nothing about a trained encoder
    labels_of: str  # tiles or sources
    counts: dict[str, int]  # tiles of each class, by name; the order of `confusion`
    tiles: int  # labelled and usable
    sources: int  # with at least one of them
    split: str  # in words
    train: int  # tiles that may judge
    test: int  # tiles that are judged
    temperature: float
    results: tuple[KnnResult, ...]
    notes: tuple[str, ...]  # what a reader must know: leaks, tiles left out

    def as_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return asdict(self)

    @property
    def _judged(self) -> str:
        if self.pool is None:
            return f"{many(self.tiles, 'tile')} from {many(self.sources, 'source')}"
        return f"{many(self.tiles, 'source')}, each the {self.pool} of its tiles"

    def text(self) -> str:
        """For a terminal."""
        head = [
            f"kNN probe of {self._judged}, labelled by {self.labels_of}: "
            + ", ".join(f"{name} {count}" for name, count in self.counts.items()),
            f"{self.encoder_name} {self.output}; {self.split}; figures beside the constant answer's in brackets",
        ]
        return "\n".join([*head, *(line for result in self.results for line in _lines(result)), *self.notes])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Tiles:
    """The tiles that are both labelled and embedded."""

    vectors: Float32[np.ndarray, "n d"]
    labels: tuple[Label, ...]  # one per tile


def probe_knn(
    archive: Archive,
    labels_csv: Path,
    *,
    plan: str | None = None,
    encoder: str | None = None,
    output: str | None = None,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
    pool: Pool | None = None,
    allow_untrained: bool = False,
) -> ProbeReport:
    """DINO's kNN protocol on the archive's embeddings and the labels of a CSV (`read_labels` says which columns).

    Splits: the column `split`; without it every group is judged by all other groups; with one group only, every tile
    by all others, and the report warns of it. Predictions of all test tiles are pooled before they are measured. A
    label without `row` or `x`, `y` is its source's: all tiles carry it, and the source is judged by the mean of its
    tiles' shares as well; with `pool` the source is one vector instead, the mean or maximum of its tiles'. A k larger
    than the smallest training set has no result but a reason: it is not clamped. Raises UsageError for untrained
    encoders (unless allowed), bad labels, a single class, a bad k or temperature.
    """
    if not ks or min(ks) < 1 or len(set(ks)) < len(ks):
        raise UsageError("-k", f"{list(ks)} are no numbers of neighbours", "use different numbers from 1 up")
    if not (0 < temperature < np.inf):
        raise UsageError("--temperature", f"{temperature} is no temperature", "use a number above 0, DINO's is 0.07")
    choice = choose(archive, plan=plan, encoder=encoder, output=output)
    if choice.untrained and not allow_untrained:
        raise UsageError(
            f"encoder {choice.encoder}", "its weights are random, so a probe means nothing", "add --allow-untrained"
        )
    labels = read_labels(labels_csv, archive, choice)
    by_source = labels[0].row is None
    if pool is not None and not by_source:
        raise UsageError("--pool", "the labels are of tiles", "leave it out, or label whole sources")
    tiles, notes = _gather(archive, labels, choice, pool)
    split = make_split(*zip(*((one.split, one.group, one.origin) for one in tiles.labels), strict=True))
    names = sorted({one.label for one in tiles.labels})
    truth = np.array([names.index(one.label) for one in tiles.labels], np.int64)
    if len(np.unique(truth[split.train])) < 2:
        raise UsageError("--labels", f"all training tiles are {names[truth[split.train][0]]!r}", "label a second class")
    return ProbeReport(
        plan=choice.plan,
        encoder=choice.encoder,
        encoder_name=choice.encoder_name,
        output=choice.output,
        pool=pool,
        untrained=choice.untrained,
        labels_of="sources" if by_source else "tiles",
        counts=dict(zip(names, np.bincount(truth).tolist(), strict=True)),
        tiles=len(truth),
        sources=len({one.source for one in tiles.labels}),
        split=split.rule,
        train=int(split.train.sum()),
        test=int(split.test.sum()),
        temperature=temperature,
        results=_results(tiles, truth, split, ks, temperature, by_source and pool is None),
        notes=(*_untrained(choice), *split.notes, *_missing_classes(truth, split, len(names)), *notes),
    )


def _gather(archive: Archive, labels: Sequence[Label], choice: Choice, pool: Pool | None) -> tuple[_Tiles, list[str]]:
    """The labelled tiles that have a good vector, and notes on those that have none."""
    by_source: dict[str, list[Label]] = {}
    for label in labels:
        by_source.setdefault(label.source, []).append(label)
    vectors, kept = [], []
    incomplete = empty = unusable = 0
    for source, mine in by_source.items():
        if (choice.plan, choice.encoder) not in archive.source(source).embedded():
            incomplete += 1
            continue
        rows, good = (
            good_vectors(archive, source, choice) if pool is None else whole_vector(archive, source, choice, pool)
        )
        if mine[0].row is None:
            empty += not len(rows)
            vectors.append(good)
            kept += mine * len(rows)
            continue
        at = {row: i for i, row in enumerate(rows.tolist())}
        usable = [label for label in mine if label.row in at]
        unusable += len(mine) - len(usable)
        vectors.append(good[[at[label.row] for label in usable if label.row is not None]])
        kept += usable
    left_out = (
        (incomplete, "labelled sources are not completely embedded and are left out: run patchmill embed on them"),
        (empty, "labelled sources have no usable tile and are left out"),
        (unusable, "labelled tiles have no usable vector and are left out"),
    )
    notes = [f"{count} {what}" for count, what in left_out if count]
    if not kept:
        raise UsageError("--labels", "no labelled tile is usable", "; ".join(notes))
    return _Tiles(vectors=np.concatenate(vectors), labels=tuple(kept)), notes


def _results(
    tiles: _Tiles,
    truth: Int64[np.ndarray, " n"],
    split: Split,
    ks: Sequence[int],
    temperature: float,
    by_source: bool,
) -> tuple[KnnResult, ...]:
    usable = [k for k in ks if k <= split.smallest]
    answers: dict[int, Float64[np.ndarray, "t c"]] = {}
    if usable:
        similarity, row = nearest(tiles.vectors, split, max(usable))
        votes = vote(similarity, truth[row], int(truth.max()) + 1, usable, temperature)
        answers = {k: shares(votes[k]) for k in usable}
    test = np.flatnonzero(split.test)
    majority = _majority(truth, split)[test]
    sources = [tiles.labels[i].source for i in test]
    return tuple(
        KnnResult(
            k=k,
            tiles=measure(truth[test], answers[k], majority),
            sources=_per_source(truth[test], answers[k], majority, sources) if by_source else None,
        )
        if k in answers
        else KnnResult(
            k=k, tiles=None, sources=None, reason=f"the smallest training set has {many(split.smallest, 'tile')}"
        )
        for k in ks
    )


def _per_source(
    truth: Int64[np.ndarray, " t"],
    share: Float64[np.ndarray, "t c"],
    majority: Int64[np.ndarray, " t"],
    sources: Sequence[str],
) -> Metrics:
    """Metrics of the mean share of every source's tiles; all of them carry the source's label."""
    _, first, member, count = np.unique(np.array(sources), return_index=True, return_inverse=True, return_counts=True)
    mean = np.zeros((len(first), share.shape[1]))
    np.add.at(mean, member, share)
    return measure(truth[first], mean / count[:, None], majority[first])


def _training_counts(truth: Int64[np.ndarray, " n"], split: Split) -> Int64[np.ndarray, "f c"]:
    """Training tiles of each class that each fold is judged by."""
    own = np.zeros((int(split.fold.max()) + 1, int(truth.max()) + 1), np.int64)
    np.add.at(own, (split.fold[split.train], truth[split.train]), 1)
    others: Int64[np.ndarray, "f c"] = own.sum(axis=0) - own
    return others


def _majority(truth: Int64[np.ndarray, " n"], split: Split) -> Int64[np.ndarray, " n"]:
    """The most frequent class of each tile's training set; the first of equally frequent ones."""
    majority: Int64[np.ndarray, " n"] = _training_counts(truth, split).argmax(axis=1)[split.fold]
    return majority


def _missing_classes(truth: Int64[np.ndarray, " n"], split: Split, classes: int) -> tuple[str, ...]:
    counts = _training_counts(truth, split)[np.unique(split.fold[split.test])]
    folds = int((np.count_nonzero(counts, axis=1) < classes).sum())
    note = f"{folds} of {len(counts)} training sets lack a class, which can then never be answered"
    return (note,) if folds else ()


def _untrained(choice: Choice) -> tuple[str, ...]:
    return ("the encoder is untrained: the figures prove the machinery, nothing else",) if choice.untrained else ()


def _lines(result: KnnResult) -> list[str]:
    if result.tiles is None:
        return [f"k {result.k:>4}: none, {result.reason}"]
    return [
        f"k {result.k:>4} {what:<7} "
        + "  ".join(
            f"{name} {'none, ' + str(figure.reason) if figure.value is None else f'{figure.value:.3f}'}"
            + ("" if figure.baseline is None else f" ({figure.baseline:.3f})")
            for name, figure in (
                ("accuracy", metrics.accuracy),
                ("balanced", metrics.balanced_accuracy),
                ("AUROC", metrics.auroc),
            )
        )
        for what, metrics in (("tiles", result.tiles), ("sources", result.sources))
        if metrics is not None
    ]
