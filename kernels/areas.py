"""What every implementation of `tissue_fraction` demands of its arguments."""

import math

__all__ = ["check_areas"]


def check_areas(shape: tuple[int, ...], scale: float, span: float) -> None:
    """Raises ValueError for a mask of that shape without pixels, and for lengths that are not above 0."""
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"no mask has the shape {shape}")
    for length in (scale, span):
        if not (math.isfinite(length) and length > 0):
            raise ValueError(f"{length} px is no length")
