"""From an image set to its plan: every image is one tile."""

from collections.abc import Callable

import numpy as np

from patchmill.types import ImagePlan, ImageSet, ImageSettings

__all__ = ["plan_images"]


def plan_images(images: ImageSet, settings: ImageSettings, item_id: Callable[[str], str]) -> ImagePlan:
    """The images of a set in their order.

    item_id: the keyed hash of a name, 32 hex digits, which is all that is kept of it.
    """
    hashes = b"".join(bytes.fromhex(item_id(name)) for name in images.names)
    return ImagePlan(
        settings=settings,
        coords=np.arange(len(images.names), dtype=np.int32)[:, None],
        items=np.frombuffer(hashes, np.uint8).reshape(-1, 16),
    )
