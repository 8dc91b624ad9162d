"""A plan to look at: the slide, small, with the outline of its tissue and the squares of its tiles."""

import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from patchmill.plan.overview import read_overview
from patchmill.plan.tissue import TissueMask
from patchmill.types import Slide, SlidePlan, many

__all__ = ["draw_plan"]

SIDE = 1600  # pixels of the longer side, at most
CAPTION = 32
PAPER, INK = "#ffffff", "#1a1a1a"
TILE, OUTLINE = (31, 119, 180), (214, 39, 40)


def draw_plan(slide: Slide, plan: SlidePlan, mask: TissueMask | None, title: str = "") -> Image.Image:
    """The slide's picture, tiles in blue, the edge of the mask in red; up to 1,600 px per side, and a line of text.

    mask: None where the plan has none. Raises what reading the slide raises.
    """
    level = slide.levels[0]
    overview = read_overview(slide, max(slide.mpp, max(level.width, level.height) * slide.mpp / SIDE))
    pixels = overview.rgb.copy()
    if mask is not None:
        pixels[edge_of(mask, overview.scale, pixels.shape[:2])] = OUTLINE
    sheet = Image.new("RGB", (pixels.shape[1], pixels.shape[0] + CAPTION), PAPER)
    sheet.paste(Image.fromarray(pixels), (0, CAPTION))
    draw = ImageDraw.Draw(sheet)
    side = plan.extent * plan.downsample / overview.scale
    for x, y in (plan.coords / overview.scale).tolist():
        draw.rectangle((x, y + CAPTION, x + side - 1, y + side - 1 + CAPTION), outline=TILE)
    draw.text((6, 6), title or many(plan.rows, "tile"), INK, ImageFont.load_default(16))
    return sheet


def edge_of(mask: TissueMask, scale: float, shape: tuple[int, ...]) -> Bool[np.ndarray, "h w"]:
    """The rim of the tissue, two pixels wide, on a picture of `scale` level-0 pixels per pixel."""
    row, column = (
        np.minimum(((np.arange(size) + 0.5) * scale / mask.scale).astype(int), held - 1)
        for size, held in zip(shape, mask.tissue.shape, strict=True)
    )
    tissue = mask.tissue[np.ix_(row, column)]
    rim: Bool[np.ndarray, "h w"] = tissue & ~ndimage.binary_erosion(tissue, iterations=2)
    return rim
