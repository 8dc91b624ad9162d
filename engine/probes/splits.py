"""Which tiles are judged by which: train and test as given, or each group by all others."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64

from patchmill.errors import UsageError
from patchmill.types import many

__all__ = ["Split", "make_split"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Split:
    """A test tile is judged by the training tiles whose fold differs from its own."""

    rule: str  # in words
    train: Bool[np.ndarray, " n"]
    test: Bool[np.ndarray, " n"]
    fold: Int64[np.ndarray, " n"]  # 0, 1, ...; a training tile never judges a test tile of its own fold
    notes: tuple[str, ...]  # what a reader must know: leaks

    @property
    def smallest(self) -> int:
        """Size of the smallest training set of any test tile."""
        sizes = np.bincount(self.fold[self.train], minlength=self.fold.max() + 1)
        return int(self.train.sum() - sizes[self.fold[self.test]].max())


def make_split(split: Sequence[str | None], group: Sequence[str], origin: Sequence[str]) -> Split:
    """The split of n tiles: by their `split` where they have one, else leave one group out, else leave one tile out.

    Raises UsageError if train or test would be empty.
    """
    n = len(group)
    names, member = np.unique(np.array(group), return_inverse=True)
    everywhere = np.ones(n, bool)
    if any(part is not None for part in split):
        train, test = (np.array([part == side for part in split]) for side in ("train", "test"))
        for side, part in (("train", train), ("test", test)):
            if not part.any():
                raise UsageError("--labels", f"the split has no tile to {side} with", f"mark some as {side}")
        both = np.intersect1d(member[train], member[test])
        pieces = np.array(origin)
        shared = np.intersect1d(pieces[train], pieces[test])
        # No tile is in train and in test, so the folds need only tell the two apart.
        return Split(
            rule="train and test as given",
            train=train,
            test=test,
            fold=test.astype(np.int64),
            notes=_leaks(len(both), "group is in train and in test", "groups are in train and in test")
            or _leaks(
                len(shared),
                "source or patient is in train and in test, by groups of its own",
                "sources or patients are in train and in test, by groups of their own",
            ),
        )
    if len(names) > 1:
        spread = _spread(member, origin)
        return Split(
            rule=f"leave one of {len(names)} groups out",
            train=everywhere,
            test=everywhere,
            fold=member.astype(np.int64),
            notes=_leaks(spread, "", "groups hold tiles of one and the same source or patient"),
        )
    return Split(
        rule="leave one tile out",
        train=everywhere,
        test=everywhere,
        fold=np.arange(n),
        notes=(
            "all tiles are of one group: a tile is judged by its neighbours on the same slide, "
            "so the figures leak and are too good",
        ),
    )


def _spread(member: Int64[np.ndarray, " n"], origin: Sequence[str]) -> int:
    """Number of groups that share an origin with another group."""
    groups: dict[str, set[int]] = {}
    for name, number in zip(origin, member.tolist(), strict=True):
        groups.setdefault(name, set()).add(number)
    return len(set().union(*(numbers for numbers in groups.values() if len(numbers) > 1)))


def _leaks(count: int, one: str, several: str) -> tuple[str, ...]:
    return (f"{many(count, one, several)}: neighbours leak and the figures are too good",) if count else ()
