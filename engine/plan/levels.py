"""Which level of a pyramid tiles are read from, and how much they are shrunk."""

from collections.abc import Sequence
from dataclasses import dataclass

from patchmill.errors import SourceError
from patchmill.types import Level

__all__ = ["Reading", "choose_level", "is_near"]

TOLERANCE = 0.05  # a level whose mpp is this near to the target is taken as it is: scanners' own mpp vary as much


@dataclass(frozen=True, slots=True)
class Reading:
    """How tiles at the target mpp come out of a pyramid."""

    level: int
    ratio: float  # decoded pixels per tile pixel; exactly 1 where tiles are copied
    mpp: float  # micrometres that a tile pixel really spans
    shrink: int = 1  # cells are decoded this much smaller than they are


def choose_level(levels: Sequence[Level], mpp: float, target: float, source: str, scaled: bool = True) -> Reading:
    """The coarsest level that is at least as fine as the target, within 5 %; pixels are only ever shrunk.

    mpp: micrometres per level-0 pixel. target: micrometres per tile pixel. scaled: whether a codec may shrink, by the
    largest factor that the level offers and that leaves a whole ratio, or 1 within 5 %. (After any other, the mean of
    means is blurred: at a ratio of 2.2, half of it by the codec, pixels were 4 grey levels off and embeddings at cosine
    0.98.) Raises SourceError where every level is coarser than the target.
    """
    fine = [i for i, level in enumerate(levels) if mpp * level.downsample <= target * (1 + TOLERANCE)]
    if not fine:
        raise SourceError(
            source,
            f"its finest level has {mpp:g} µm/px, {target:g} would enlarge it",
            f"use --mpp {mpp:g} or more, or leave the slide out",
        )
    level = max(fine, key=lambda i: levels[i].downsample)
    own = mpp * levels[level].downsample
    if is_near(own, target):
        return Reading(level, 1.0, own)
    ratio = round(target / own, 9)  # 0.3 / 0.1 is 3, not 2.9999999999999996
    shrinks = [each for each in levels[level].shrinks if scaled or each == 1]
    for shrink in sorted(shrinks, reverse=True):
        if is_near(own * shrink, target):
            return Reading(level, 1.0, own * shrink, shrink)
        if shrink == 1 or (shrink <= ratio and (ratio / shrink).is_integer()):
            break
    return Reading(level, ratio / shrink, target, shrink)


def is_near(mpp: float, target: float) -> bool:
    """Whether pixels are taken as they are."""
    return target * (1 - TOLERANCE) <= mpp <= target * (1 + TOLERANCE)
