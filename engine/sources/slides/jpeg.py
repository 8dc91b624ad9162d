"""JPEG as OpenSlide decodes it, with the accurate integer inverse DCT and smooth ("fancy") chroma upsampling."""

import numpy as np
import simplejpeg
from jaxtyping import UInt8

__all__ = ["ADOBE", "RGB", "YCBCR", "contradicts", "decode_jpeg"]

RGB, YCBCR = 2, 6  # colours, as TIFF's photometric interpretation numbers them
ADOBE = {  # the marker that tells libjpeg which colours the stream holds
    RGB: b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00",
    YCBCR: b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x01",
}


def contradicts(stream: bytes, colours: int) -> bool:
    """Whether the markers of a JPEG stream tell libjpeg other colours than these, RGB or YCBCR."""
    head = stream.partition(b"\xff\xda")[0]  # up to the scan
    adobe = head.find(b"Adobe")
    return (colours == RGB and b"JFIF" in head[:32]) or (
        adobe >= 0 and head[adobe + 11 : adobe + 12] != ADOBE[colours][-1:]
    )


def decode_jpeg(data: bytes, out: UInt8[np.ndarray, "h w 3"], shrink: int, *, lenient: bool = True) -> bool:
    """Decode a whole JPEG stream into an array that it must fill exactly; False where pixels of it are missing.

    libjpeg goes on over damage and leaves grey; that is no pixel of the slide. Superfluous bytes between the markers
    of a scan harm nothing, and some scanners write them; they are let pass if `lenient`.
    """
    h, w, _ = out.shape
    size = {"min_height": h, "min_width": w, "min_factor": shrink} if shrink > 1 else {}
    for strict in (True, False) if lenient else (True,):
        try:  # a larger picture is refused at full scale for want of room, but could be shrunk into it
            if shrink > 1 and simplejpeg.decode_jpeg_header(data, strict=False)[:2] != (h * shrink, w * shrink):
                return False
            pixels = simplejpeg.decode_jpeg(data, "RGB", buffer=out, strict=strict, **size)
            return bool(pixels.shape == out.shape)
        except (ValueError, KeyError) as error:  # KeyError: simplejpeg's, for what has no header
            if "extraneous bytes" not in str(error):
                return False
    return False
