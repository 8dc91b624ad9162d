"""Where a slide holds tissue: Otsu's threshold on the colour of the optical density, with physical bounds.

Method. Light that passes a stain falls off exponentially (Beer and Lambert), so the optical density OD = -ln(I / I0) of
each channel adds up over stains (Ruifrok & Johnston, Anal Quant Cytol Histol 2001; 23:291-299). Glass, dust, shadows,
coverslip edges and black borders absorb all channels alike; stains do not. So the measure is the spread of OD over the
channels, max - min, on a picture of about 8 µm per pixel. It is cut by Otsu's method (IEEE Trans SMC 1979; 9:62-66),
which needs no training, but held within bounds: below 0.05 lies the tint and noise of glass, so that a blank slide has
no tissue; above 0.07 pale eosin and mucus would be lost, as they are with Otsu alone on a slide with dense nuclei.

Ink is told from stains by the ratios of their channels, which do not depend on how much there is of either. Ruifrok &
Johnston's stain vectors (R, G, B) are haematoxylin (0.65, 0.70, 0.29), eosin (0.07, 0.99, 0.11) and DAB (0.27, 0.57,
0.78): every mixture of them absorbs less red than green. Blue and green ink absorb more red than green, black ink
absorbs all alike, and red ink absorbs green and blue alike and no red.

Made for H&E and for DAB over haematoxylin. Blue and green special stains (Masson, Alcian) pass for ink: plan those
slides with tissue "none".
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from scipy import ndimage
from skimage.filters import threshold_otsu

from patchmill.plan.overview import Overview, read_overview
from patchmill.types import Slide

__all__ = ["TissueMask", "tissue_in", "tissue_mask"]

LEAST_SPREAD, MOST_SPREAD = 0.05, 0.07  # bounds of the threshold, in OD
DARKEST = 16  # intensities below are noise of the sensor, whose logarithm would look like colour
BRIGHT = 180  # glass is brighter than this in every channel
FLAT = 4  # grey levels within which glass varies; tissue varies more
PINK = 0.055  # OD of green above the least, where green is the darkest: glass of TCGA has up to 0.048, mucus 0.067
DUST_UM2 = 5_000.0  # smaller islands are dropped: 70 µm square
HOLE_UM2 = 20_000.0  # smaller holes are filled: lumina and fat cells up to 160 µm wide
FRINGE_UM = 40.0  # ink is blurred this far
INK_UM2 = 10_000.0  # smaller patches of ink's colour are stray pixels of tissue: pens draw lines of 300 µm and more
DIAGONAL = np.ones((3, 3), bool)  # pixels that touch at a corner belong together
STRIP = 256  # rows whose logarithms are held at once


@dataclass(frozen=True, slots=True, eq=False)
class TissueMask:
    """Which pixels of a small picture of the slide are tissue."""

    tissue: Bool[np.ndarray, "h w"]
    scale: float  # level-0 pixels per pixel of the mask


def tissue_mask(slide: Slide) -> TissueMask:
    """Find the tissue of a slide; may be none. Raises SourceError where the slide cannot be read.

    What lies on damaged parts of the file counts as tissue: its tiles are planned, and told to be unreadable or read
    from another level, but never left out in silence.
    """
    overview = read_overview(slide)
    return TissueMask(tissue_in(overview) | overview.unknown, overview.scale)


def tissue_in(overview: Overview) -> Bool[np.ndarray, "h w"]:
    """The tissue in a small picture. Deterministic; blank glass, ink and black borders hold none."""
    glass = glass_colour(overview.rgb)
    spread = np.empty(overview.rgb.shape[:2], np.float32)
    inked = np.empty(overview.rgb.shape[:2], bool)
    for top in range(0, len(spread), STRIP):
        density = optical_density(overview.rgb[top : top + STRIP], glass)
        strip = slice(top, top + len(density))
        inked[strip] = is_ink(density)
        spread[strip] = np.where(is_stained(density), greatest(density) - least(density), 0)
    if spread.max() <= LEAST_SPREAD:
        return np.zeros(spread.shape, bool)
    otsu: float = threshold_otsu(spread)  # type: ignore[no-untyped-call]
    threshold = min(max(otsu, LEAST_SPREAD), MOST_SPREAD)
    tissue = spread > threshold
    del spread  # the largest array here, of no more use
    return tidy(tissue, inked, overview.mpp)


def glass_colour(rgb: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "3"]:
    """I0: the commonest bright colour if a tenth of the slide has it, else white.

    Tissue has texture, and stains leave green the darkest channel: a flat tenth without that tint is glass, and a
    picture full of pale tissue is left as it is.
    """
    white = np.full(3, 255, np.float32)
    rgb = rgb[::2, ::2]  # a quarter of the pixels has the same modes
    bright = rgb[least(rgb) > BRIGHT]
    if not len(bright):
        return white
    mode = np.array([np.bincount(bright[:, channel]).argmax() for channel in range(3)], np.int16)
    flat = ((bright >= mode - FLAT) & (bright <= mode + FLAT)).all(axis=1)
    pink = mode[1] == mode.min() and np.log(mode.max() / mode[1]) > PINK
    if pink or np.count_nonzero(flat) * 10 < rgb.shape[0] * rgb.shape[1]:
        return white
    return mode.astype(np.float32)


def optical_density(rgb: UInt8[np.ndarray, "h w 3"], glass: Float32[np.ndarray, "3"]) -> Float32[np.ndarray, "h w 3"]:
    """OD per channel, at least 0: what is brighter than glass absorbs nothing."""
    table = np.log(glass[None, :] / np.maximum(np.arange(256, dtype=np.float32), DARKEST)[:, None])
    table = np.maximum(table, 0).astype(np.float32)
    return np.stack([table[rgb[..., channel], channel] for channel in range(3)], axis=2)


def greatest(channels: np.ndarray) -> np.ndarray:
    """Over three channels, many times faster than a reduction along so short an axis."""
    most: np.ndarray = np.maximum(np.maximum(channels[..., 0], channels[..., 1]), channels[..., 2])
    return most


def least(channels: np.ndarray) -> np.ndarray:
    """Likewise."""
    fewest: np.ndarray = np.minimum(np.minimum(channels[..., 0], channels[..., 1]), channels[..., 2])
    return fewest


def is_stained(density: Float32[np.ndarray, "h w 3"]) -> Bool[np.ndarray, "h w"]:
    """Whether a colour can be a mixture of stains: neither neutral nor green."""
    most = greatest(density)
    neutral = most - least(density) < 0.25 * most  # black ink, borders, shadows; dense nuclei have 0.4, dense DAB 0.3
    stained: Bool[np.ndarray, "h w"] = ~neutral & (density[..., 0] <= 1.8 * density[..., 1])
    return stained


def is_ink(density: Float32[np.ndarray, "h w 3"]) -> Bool[np.ndarray, "h w"]:
    """Whether a colour is ink for certain: dense, and in proportions that no mixture of stains has."""
    red, green, blue = density[..., 0], density[..., 1], density[..., 2]
    darkest, palest = greatest(density), least(density)
    spread = darkest - palest
    # Pale haematoxylin may be a little bluer than its vector, so blue counts as ink where it is dense.
    blue_or_green = (red > 1.2 * green) & (spread > 0.3)
    red_ink = (red < 0.13 * green) & (blue > 0.8 * green) & (green > 0.5)  # dense eosin and blood stay below 0.78
    black = (palest > 1.2) & (spread < 0.25 * darkest)
    ink: Bool[np.ndarray, "h w"] = blue_or_green | red_ink | black
    return ink


def tidy(tissue: Bool[np.ndarray, "h w"], inked: Bool[np.ndarray, "h w"], mpp: float) -> Bool[np.ndarray, "h w"]:
    """Take off ink with its blurred fringe, close cracks, fill small holes, drop threads and dust."""
    pixel = mpp * mpp
    inked = larger(ndimage.binary_closing(np.pad(inked, 1), DIAGONAL)[1:-1, 1:-1], INK_UM2 / pixel)
    inked = ndimage.binary_dilation(inked, iterations=max(1, round(FRINGE_UM / mpp))) if inked.any() else inked
    padded = np.pad(tissue & ~inked, 2)  # closing must not eat into tissue at the edge of the picture
    tissue = ndimage.binary_closing(padded, iterations=2)[2:-2, 2:-2]
    holes = ~tissue
    tissue = tissue | (holes & ~larger(holes, HOLE_UM2 / pixel))  # before thin walls go: fat is nothing but those
    tissue = ndimage.binary_opening(np.pad(tissue, 1, mode="edge"))[1:-1, 1:-1]
    return larger(tissue & ~inked, DUST_UM2 / pixel)


def larger(mask: Bool[np.ndarray, "h w"], pixels: float) -> Bool[np.ndarray, "h w"]:
    """The connected parts of a mask that have at least so many pixels."""
    labels, count = ndimage.label(mask, DIAGONAL)
    if not count:
        return mask
    sizes = np.zeros(count + 1, np.int64)
    for top in range(0, len(labels), STRIP):  # counting all at once makes a copy of 8 bytes per pixel
        sizes += np.bincount(labels[top : top + STRIP].ravel(), minlength=count + 1)
    keep = sizes >= pixels
    keep[0] = False
    kept: Bool[np.ndarray, "h w"] = keep[labels]
    return kept
