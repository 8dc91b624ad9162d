"""Made-up slices and boxes of CTs in HU, for the gate of encoders that take them: no real CT ships with the package.

Ellipses of tissue with values as textbooks have them (air -1000, lung -850, fat -100, muscle 50, liver 60, vessels 150,
bone 300 to 900), noise, and air outside. They are good for one thing: to see whether two graphs of the same weights
agree. Nothing about a patient, a scanner or an encoder's worth follows from them.
"""

import numpy as np
from jaxtyping import Bool, Float64, Int16

__all__ = ["boxes", "phantoms"]

COUNT = 32
SEED = 20
BOXES = 4
BODIES = 8
NOISES = 16  # pictures of noise that are used over and over, not a multiple of three: all triples differ


def phantoms(pixels: int) -> Int16[np.ndarray, "32 p p 3"]:
    """Slices of p pixels per side, each of another body, the same at every call; all three channels are equal."""
    tiles = np.stack([_slice(pixels, np.random.default_rng((SEED, number))) for number in range(COUNT)])
    return np.repeat(np.round(tiles)[..., None], 3, axis=3).astype(np.int16)


def boxes(depth: int, pixels: int) -> Int16[np.ndarray, "4 depth p p"]:
    """Boxes of slices, the same at every call: each turns from one made-up body into the next, and has noise."""
    found = np.empty((BOXES, depth, pixels, pixels), np.int16)
    for number, box in enumerate(found):
        rng = np.random.default_rng((SEED, COUNT + number))
        bodies = np.stack([_slice(pixels, rng) for _ in range(BODIES)]).astype(np.float32)
        noise = 20 * rng.standard_normal((NOISES, pixels, pixels), np.float32)
        for row, place in enumerate(np.linspace(0, BODIES - 1, depth, dtype=np.float32)):
            above = min(int(place), BODIES - 2)
            hu = bodies[above] + (place - above) * (bodies[above + 1] - bodies[above]) + noise[row % NOISES]
            box[row] = hu.clip(-1024, 3071)
    return found


def _slice(pixels: int, rng: np.random.Generator) -> Float64[np.ndarray, "p p"]:
    y, x = np.mgrid[0:pixels, 0:pixels] * (2 / pixels) - (1 - 1 / pixels)  # -1..1

    def ellipse(down: float, along: float, height: float, width: float) -> Bool[np.ndarray, "p p"]:
        found: Bool[np.ndarray, "p p"] = ((y - down) / height) ** 2 + ((x - along) / width) ** 2 < 1
        return found

    height, width = rng.uniform(0.4, 0.65), rng.uniform(0.65, 0.92)
    rim = rng.uniform(0.03, 0.15)  # of fat
    hu = np.full((pixels, pixels), -1000.0)
    hu[ellipse(0, 0, height, width)] = rng.uniform(-115, -90)
    inside = ellipse(0, 0, height - rim, width - rim)
    hu[inside] = rng.uniform(40, 65)
    if rng.random() < 0.5:  # a chest: two lungs with vessels, and a heart
        for side in (-1, 1):
            lung = ellipse(-0.02, side * width * 0.45, height * 0.62, width * rng.uniform(0.26, 0.34))
            hu[lung] = rng.uniform(-900, -780)
            for _ in range(12):
                at = rng.uniform(-0.5, 0.5, 2) * (height, width * 0.4)
                hu[lung & ellipse(at[0], side * width * 0.45 + at[1], *rng.uniform(0.008, 0.03, 2))] = 30
        hu[ellipse(-0.08, -0.08, height * 0.36, width * 0.24)] = rng.uniform(40, 180)
    else:  # a belly: liver, kidneys, bowel with gas
        hu[inside & ellipse(-0.1, -0.3 * width, height * 0.55, width * 0.5)] = rng.uniform(50, 120)
        for side in (-1, 1):
            hu[ellipse(height * 0.35, side * width * 0.45, *rng.uniform(0.09, 0.15, 2))] = rng.uniform(30, 220)
        for _ in range(6):
            down, along = rng.uniform(-0.4, 0.3) * height, rng.uniform(0, 0.6) * width
            hu[inside & ellipse(down, along, *rng.uniform(0.04, 0.1, 2))] = rng.choice([-900, 10, 60])
    for side in np.linspace(0, 2 * np.pi, 14, endpoint=False) + rng.uniform(0, 0.4):  # ribs
        down, along = (height - rim) * 0.93 * np.sin(side), (width - rim) * 0.93 * np.cos(side)
        hu[ellipse(down, along, 0.025, 0.05)] = rng.uniform(300, 900)
    hu[ellipse(height * 0.55, 0, 0.13, 0.12)] = rng.uniform(500, 800)  # a vertebra: its shell, then its marrow
    hu[ellipse(height * 0.55, 0, 0.1, 0.09)] = rng.uniform(120, 250)
    hu[ellipse(height * 0.2, 0.06, 0.05, 0.05)] = rng.uniform(40, 300)  # the aorta, with contrast or without
    hu += rng.normal(0, rng.uniform(8, 40), hu.shape) * np.where(hu > -990, 1, 0.3)
    return hu.clip(-1024, 3071)
