"""Image sets: folders, tars and MedMNIST's `.npz` files, each one source of many pictures.

The order of images is part of an archive, so it follows from the names alone, or from the file's own numbers.
"""

import os
import stat
from collections.abc import Mapping, Sequence
from typing import Any

import imagecodecs
import numpy as np
import PIL
import simplejpeg
from jaxtyping import Bool, UInt8

from patchmill.errors import SourceError
from patchmill.sources.files import failure
from patchmill.sources.images.folder import folder
from patchmill.sources.images.holding import Unreadable
from patchmill.sources.images.npz import is_zip, npz
from patchmill.sources.images.pictures import decode_picture, fit_picture
from patchmill.sources.images.tar import tar
from patchmill.types import Fit, SourceRef

__all__ = ["ImageSetSource"]


class ImageSetSource:
    """An image set that is open for reading. Satisfies `ImageSet`; safe to read from several threads at once.

    A folder: its pictures (PNG, JPEG, TIFF and DICOM, by the endings in `PICTURES`) and those in its subfolders, named
    by their path within it, with forward slashes. Hidden files and folders are left out, and links that lead out of it;
    links to folders are not followed. A tar: its members that are pictures, named as in the tar, hidden ones left out;
    a name that leads out of it (`../a.png`, `/a.png`) is a name like others, since nothing is unpacked. Of two of one
    name the last counts, as when it is unpacked. An `.npz` in MedMNIST's layout: arrays `train_images`, `val_images`
    and `test_images` of 8 bits, [n, h, w] or [n, h, w, 3], named as train/00000, in the order train, val, test.

    A folder is listed anew whenever it is opened: who goes by numbers must compare the names.
    """

    def __init__(self, ref: SourceRef) -> None:
        """Open the set. Raises SourceError or TransientError that name ref.id: missing, damaged, no image in it."""
        self._ref = ref
        try:
            status = os.stat(ref.path)
            if stat.S_ISDIR(status.st_mode):
                self._holding = folder(ref.path)
            elif not stat.S_ISREG(status.st_mode):  # a pipe would block for ever
                raise SourceError(ref.id, "it is no regular file", "name a folder, a tar or an .npz file")
            else:
                self._holding = npz(ref) if is_zip(ref.path) else tar(ref)
        except Unreadable as error:
            raise SourceError(ref.id, *error.args) from error
        except OSError as error:
            raise failure(ref.id, error) from error
        self.names: Sequence[str] = self._holding.names
        if not self.names:
            self.close()
            raise SourceError(ref.id, "it holds no pictures", "it should have PNG, JPEG, TIFF or DICOM files")
        versions = f"pillow {PIL.__version__}, simplejpeg {simplejpeg.__version__}"
        self.reader = f"{versions}, imagecodecs {imagecodecs.__version__}"
        self.metadata: Mapping[str, str | int | float] = {"images": len(self.names)}

    def fetch(self, numbers: Sequence[int]) -> list[Any]:
        """The encoded bytes of images, or their pixels where a file holds bare ones; None for those that are missing.

        Missing are also those of more than 512 MiB, and those that this user may not read. Raises TransientError if the
        storage fails, and SourceError if the file turns out to be damaged as a whole.
        """
        try:
            return [self._holding.get(int(number)) for number in numbers]
        except OSError as error:
            raise failure(self._ref.id, error) from error

    def decode(self, fetched: Sequence[Any], fit: Fit, out: UInt8[np.ndarray, "n p p 3"]) -> Bool[np.ndarray, " n"]:
        """Decode what was fetched into squares; see `fit_picture`. False for images that cannot be decoded."""
        decoded = np.zeros(len(fetched), np.bool_)
        for number, data in enumerate(fetched):
            if isinstance(data, np.ndarray):
                fit_picture(data, fit, out[number])
                decoded[number] = True
            elif data is not None:
                decoded[number] = decode_picture(data, fit, out[number])
        return decoded

    def close(self) -> None:
        """Release what is open."""
        self._holding.close()
