import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter
from skimage import data

from patchmill.plan.overview import Overview, read_overview
from patchmill.plan.tissue import tissue_in, tissue_mask
from patchmill.sources import open_slide
from patchmill.testing.slides import FormulaSlide, reduced
from patchmill.types import SourceRef

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
GLASS = (243, 242, 241)
PENS = {
    "blue": (40, 60, 160),
    "light blue": (90, 130, 210),
    "green": (40, 140, 80),
    "light green": (150, 215, 165),
    "red": (205, 35, 45),
    "light red": (230, 60, 70),
    "black": (25, 25, 28),
    "grey": (60, 55, 70),
}
STAINED = {  # colours as they are seen at 8 µm per pixel
    "pale eosin": (232, 214, 226),
    "eosin": (220, 150, 190),
    "dense eosin": (190, 68, 91),
    "haematoxylin": (140, 95, 160),
    "lymphocytes": (110, 55, 115),
    "pale haematoxylin": (200, 205, 225),
    "DAB": (160, 110, 70),
    "dense DAB": (95, 60, 40),
}


def mask_of(rgb, mpp=8.0):
    return tissue_in(Overview(np.ascontiguousarray(rgb), np.zeros(rgb.shape[:2], bool), 16.0, mpp))


def noisy(picture, seed=0, amount=3.0):
    """As a scanner gives it: a little blur, a little noise."""
    blurred = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(1)))
    noise = np.random.default_rng(seed).normal(0, amount, picture.shape)
    return (blurred + noise).clip(0, 255).astype(np.uint8)


def glass(height=300, width=400, colour=GLASS):
    return np.full((height, width, 3), colour, np.uint8)


@pytest.mark.parametrize("colour", [(255, 255, 255), GLASS, (240, 228, 205), (215, 220, 225), (234, 226, 236)])
@pytest.mark.parametrize("amount", [0.0, 1.0, 3.0])
def test_blank_glass_is_no_tissue(colour, amount):
    assert not mask_of(noisy(glass(colour=colour), amount=amount)).any()


def test_uneven_light_is_no_tissue():
    light = np.linspace(0.8, 1, 400)[None, :, None] * np.linspace(0.9, 1, 300)[:, None, None]
    assert not mask_of((glass() * light).astype(np.uint8)).any()


@pytest.mark.parametrize("black", [(0, 0, 0), (4, 2, 6), (20, 18, 24)])
def test_black_borders_and_edges_are_no_tissue(black):
    picture = glass()
    picture[:, :40] = black
    picture[-30:] = black
    picture[:, 380:383] = (120, 120, 124)
    assert not mask_of(noisy(picture)).any()
    assert not mask_of(noisy(glass(colour=black))).any()


@pytest.mark.parametrize("pen", PENS)
def test_ink_is_no_tissue(pen):
    image = Image.fromarray(glass())
    draw = ImageDraw.Draw(image)
    draw.line([(30, 40), (200, 260), (350, 60)], fill=PENS[pen], width=25)
    draw.ellipse([30, 200, 80, 250], outline=PENS[pen], width=15)
    assert not mask_of(noisy(np.array(image))).any()


@pytest.mark.parametrize("pen", PENS)
def test_ink_over_tissue_takes_away_no_more_than_itself(pen):
    image = Image.fromarray(glass())
    draw = ImageDraw.Draw(image)
    draw.rectangle([100, 50, 299, 249], fill=STAINED["eosin"])
    draw.line([(0, 150), (400, 150)], fill=PENS[pen], width=30)
    mask = mask_of(noisy(np.array(image)))
    assert not mask[140:160].any()
    assert mask[60:120, 110:290].all()
    assert mask[180:240, 110:290].all()


@pytest.mark.parametrize("stain", STAINED)
def test_stained_tissue_is_tissue(stain):
    picture = glass()
    picture[60:200, 80:300] = STAINED[stain]
    mask = mask_of(noisy(picture))
    assert mask[65:195, 85:295].all()
    away = np.ones_like(mask)
    away[54:206, 74:306] = False
    assert not mask[away].any()


def test_pale_tissue_is_found_beside_dense_tissue():
    picture = glass()
    picture[30:130, 30:130] = STAINED["lymphocytes"]
    picture[30:130, 200:300] = STAINED["pale eosin"]
    mask = mask_of(noisy(picture, amount=1.0))  # a pixel of 8 µm is the mean of a hundred: its noise is small
    assert mask[35:125, 35:125].all()
    assert mask[35:125, 205:295].mean() > 0.98


def test_a_picture_full_of_pale_tissue_is_not_taken_for_glass():
    pale = np.random.default_rng(0).normal(0, 2, (200, 200, 1)) + np.array([230, 212, 226])
    assert mask_of(pale.astype(np.uint8)).mean() > 0.99


def test_walls_of_fat_are_tissue():
    picture = glass()
    picture[50:250, 50:350] = STAINED["eosin"]
    for y in range(53, 240, 12):
        for x in range(53, 340, 12):
            picture[y : y + 9, x : x + 9] = GLASS  # cells 72 µm wide between walls of 24 µm
    assert mask_of(picture)[55:245, 55:345].mean() > 0.98


def test_a_slide_full_of_tissue_is_all_tissue():
    picture = np.random.default_rng(0).integers(-20, 21, (200, 200, 1)) + np.array(STAINED["eosin"])
    assert mask_of(picture.clip(0, 255).astype(np.uint8)).all()


def test_dust_goes_and_small_holes_are_filled():
    picture = glass()
    picture[50:200, 50:200] = STAINED["eosin"]
    picture[100:110, 100:110] = GLASS  # 80 µm: filled
    picture[130:170, 130:170] = GLASS  # 320 µm: stays
    picture[250:256, 300:306] = STAINED["eosin"]  # 48 µm: dust
    mask = mask_of(picture)
    assert mask[100:110, 100:110].all()
    assert not mask[135:165, 135:165].any()
    assert not mask[240:, 290:].any()


def test_sizes_are_in_micrometres():
    picture = glass()
    picture[50:58, 50:58] = STAINED["eosin"]
    assert not mask_of(picture, mpp=8.0).any()  # 64 µm
    assert mask_of(picture, mpp=16.0).any()  # 128 µm


def test_immunohistochemistry_is_found():
    picture = glass(96, 96, (228, 227, 226))
    picture[16:80, 16:80] = reduced(data.immunohistochemistry()[..., :3], 8)
    mask = mask_of(picture)
    brown = picture[..., 0].astype(int) - picture[..., 2] > 40
    assert mask[brown].mean() > 0.97
    assert not mask[:10].any()


def test_the_disc_of_a_formula_is_found():
    slide = FormulaSlide(8000, 6000, 0.5, (1, 4, 16))
    mask = tissue_mask(slide)
    y, x = np.indices(mask.tissue.shape)
    disc = np.hypot((x + 0.5) * mask.scale - 4000, (y + 0.5) * mask.scale - 3000) <= 2700
    assert (mask.tissue != disc).mean() < 0.01


needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="the folder of sample data is not here")


@needs_data
def test_a_real_slide():
    overview = read_overview(open_slide(SourceRef(id="s1", path=str(SHARED / "CMU-1-Small-Region.svs"))))
    mask = tissue_in(overview)
    assert 0.33 < mask.mean() < 0.43
    density = 245 - overview.rgb.min(axis=2).astype(int)
    assert mask[density > 60].mean() > 0.97
    assert mask[density < 5].mean() < 0.06


def tiles_in(name):
    with zipfile.ZipFile(SHARED / name) as archive:
        for member in archive.namelist():
            if member.lower().endswith((".tif", ".png", ".jpg")):
                yield member, np.asarray(Image.open(io.BytesIO(archive.read(member))).convert("RGB"))


@needs_data
def test_real_tiles_of_tissue_are_tissue():
    shares = {name: mask_of(reduced(tile, 16)).mean() for name, tile in tiles_in("crc-val-he-7k-70.zip")}
    assert len(shares) == 70
    assert min(shares.values()) > 0.95


@needs_data
def test_real_bone_and_dense_eosin_are_tissue():
    for name, tile in tiles_in("osteosarcoma-60.zip"):
        small = reduced(tile, 8)
        stained = 245 - small.min(axis=2).astype(int) > 60
        if stained.mean() > 0.3:
            assert mask_of(small)[stained].mean() > 0.9, name
