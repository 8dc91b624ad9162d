"""The direct reader against OpenSlide, pixel by pixel: on a real slide, and on files of every kind that it takes."""

import io
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import tifffile
from PIL import Image

from patchmill import EncodeSettings, PlanSettings, RunSettings, api
from patchmill.errors import SourceError
from patchmill.plan.overview import read_overview
from patchmill.sources import OpenSlideSlide, TiffSlide, open_slide
from patchmill.sources.refused import Unsupported
from patchmill.sources.slides.jpeg import decode_jpeg
from patchmill.testing.contracts import SlideContract, assert_pixels_of_openslide
from patchmill.testing.encoders import null_doors
from patchmill.testing.slides import FormulaSlide, write_pyramid
from patchmill.types import SourceRef

REAL = Path(__file__).parents[3] / "shared" / "data" / "CMU-1-Small-Region.svs"
APERIO = "Aperio Image Library v11.2.1\r\n{w}x{h} [0,0 {w}x{h}] (240x240) JPEG/RGB Q=70|AppMag = 20|MPP = 0.4990"


def picture(height, width, seed=0):
    """Smooth colours with some noise, as tissue has: neither flat nor beyond what a codec is made for."""
    rng = np.random.default_rng(seed)
    rough = Image.fromarray(rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8))
    smooth = np.asarray(rough.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return np.clip(smooth + rng.integers(-9, 10, smooth.shape), 0, 255).astype(np.uint8)


def write(path, codec="jpeg", tile=(256, 256), sizes=((900, 1100), (225, 275)), **options):
    """A pyramid of directories, as OpenSlide's generic TIFF wants it; returns the path."""
    options = {"jpeg": {"compressionargs": {"level": 85}}}.get(codec, {}) | options
    with tifffile.TiffWriter(path, bigtiff=options.pop("bigtiff", False)) as file:
        for number, (height, width) in enumerate(sizes):
            file.write(
                picture(height, width, number),
                tile=tile,
                photometric=options.get("photometric", "rgb"),
                compression=None if codec == "none" else codec,
                subfiletype=int(number > 0),
                resolution=(20_000 / 4**number, 20_000 / 4**number),
                resolutionunit="CENTIMETER",
                metadata=None,
                **{key: value for key, value in options.items() if key != "photometric"},
            )
    return path


def write_svs(path, codec, sizes=((500, 700), (125, 175)), **options):
    """An Aperio file: a thumbnail, not tiled, between the levels."""
    with tifffile.TiffWriter(path) as file:
        for number, (height, width) in enumerate(sizes):
            text = APERIO.format(w=width, h=height) if number == 0 else "Aperio Image Library v11.2.1\r\n"
            file.write(
                picture(height, width), tile=(240, 240), compression=codec, description=text, metadata=None, **options
            )
            if number == 0:
                file.write(picture(64, 90), description="Aperio Image Library v11.2.1\r\n", metadata=None)
    return path


def ref(path, **more):
    return SourceRef(id="abc", path=str(path), **more)


def assert_equal_to_openslide(path):
    ours, theirs = TiffSlide(ref(path)), OpenSlideSlide(ref(path))
    assert (ours.mpp, ours.metadata) == (theirs.mpp, theirs.metadata)
    assert [(v.width, v.height, v.downsample) for v in ours.levels] == [
        (v.width, v.height, v.downsample) for v in theirs.levels
    ]
    assert_pixels_of_openslide(ours, path)
    # elsewhere OpenSlide places regions between pixels
    assert_pixels_of_openslide(theirs, path, [n for n, v in enumerate(ours.levels) if v.downsample.is_integer()])
    ours.close()
    theirs.close()


CM = {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}
KINDS = {
    "jpeg": {},
    "jpeg 4:2:0": {"subsampling": (2, 2)},
    "jpeg 4:2:2": {"subsampling": (2, 1)},
    "jpeg 4:4:4": {"subsampling": (1, 1)},
    "jpeg glaring": {"photometric": "ycbcr"},  # RGB that is called YCbCr: colours far beyond what RGB can show
    "jpeg big": {"bigtiff": True},
    "jpeg oblong": {"tile": (128, 272)},
    "lzw": {},
    "lzw predictor": {"predictor": True},
    "zlib": {},
    "zlib predictor": {"predictor": True},
    "none": {},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_equals_openslide(tmp_path, kind):
    assert_equal_to_openslide(write(tmp_path / "a.tiff", kind.split()[0], **KINDS[kind]))


@pytest.mark.parametrize("codec", [7, 33005])
def test_aperio_equals_openslide(tmp_path, codec):
    path = write_svs(tmp_path / "a.svs", codec)
    assert TiffSlide(ref(path)).metadata["vendor"] == "aperio"
    assert_equal_to_openslide(path)


@pytest.mark.skipif(not REAL.exists(), reason="the sample slides are not here")
def test_the_real_slide_equals_openslide():
    assert_equal_to_openslide(REAL)


def test_levels_of_our_own_pyramids_equal_openslide(tmp_path):
    for codec in ("jpeg", "deflate"):
        write_pyramid(tmp_path / "a.tiff", FormulaSlide(1300, 900, downsamples=(1, 4, 16)), codec=codec)
        assert_equal_to_openslide(tmp_path / "a.tiff")


PART = (
    "<DataObject ObjectType='PixelDataRepresentation'>"
    "<Attribute Name='DICOM_PIXEL_SPACING'>{0}</Attribute></DataObject>"
)
PHILIPS = (
    "<?xml version='1.0' ?><DataObject ObjectType='DPUfsImport'><Attribute Name='PIM_DP_SCANNED_IMAGES'><Array>"
    "<DataObject ObjectType='DPScannedImage'><Attribute Name='PIM_DP_IMAGE_TYPE'>WSI</Attribute>"
    "<Attribute Name='DICOM_PIXEL_SPACING'>{spacing}</Attribute>"
    "<Attribute Name='PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE'>"
    "<Array>{parts}</Array></Attribute></DataObject></Array></Attribute></DataObject>"
)


def write_philips(path, size=(1536, 1280), factors=(1, 2, 4, 8), holes=((0, 4, 11), (1,), (), ()), **options):
    """A Philips slide: padded directories, a label in strips; holes: which tiles of each level are left out."""
    spacings = ['"{0}" "{0}"'.format(0.00025 * factor) for factor in factors]
    text = PHILIPS.format(spacing=spacings[0], parts="".join(PART.format(each) for each in spacings))
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for number, factor in enumerate(factors):
            h, w = (-(-side // factor // 256) * 256 if number else side for side in size)
            file.write(
                picture(h, w, number),
                tile=(256, 256),
                photometric="rgb",
                compression=options.get("compression", "jpeg"),
                subsampling=options.get("subsampling"),
                subfiletype=int(number > 0),
                description=text if number == 0 else None,
                software="Philips DP v1.0",
                metadata=None,
            )
        file.write(picture(64, 90), description="Label", software=False, metadata=None)
    with tifffile.TiffFile(path, mode="r+b") as file:
        for page, left_out in zip(file.pages, holes, strict=False):
            for name in ("TileOffsets", "TileByteCounts") if left_out else ():
                tag = page.tags[name]
                tag.overwrite([0 if n in left_out else value for n, value in enumerate(tag.value)])
    return path


@pytest.mark.parametrize("subsampling", [(1, 1), (2, 2)])
@pytest.mark.parametrize("size", [(1536, 1280), (1500, 1100)])
def test_philips_equals_openslide(tmp_path, size, subsampling):
    """Holes and the padding beyond a level are white, in every rectangle; whole blocks can be shrunk."""
    path = write_philips(tmp_path / "a.tiff", size, subsampling=subsampling)
    ours, theirs = TiffSlide(ref(path)), OpenSlideSlide(ref(path))
    assert ours.metadata["vendor"] == "philips"
    assert (ours.mpp, ours.metadata) == (theirs.mpp, theirs.metadata)
    rng = np.random.default_rng(0)
    for number, (level, other) in enumerate(zip(ours.levels, theirs.levels, strict=True)):
        assert (level.width, level.height, level.downsample) == (other.width, other.height, other.downsample)
        assert (len(level.shrinks) == 3) == (number == 0 or level.width % 16 == level.height % 16 == 0)
        whole = ours.read(number, -30, -30, level.width + 700, level.height + 700)
        np.testing.assert_array_equal(whole, theirs.read(number, -30, -30, level.width + 700, level.height + 700))
        for x, y in rng.integers(-20, (level.width, level.height), (20, 2)).tolist():
            width, height = rng.integers(1, 400, 2).tolist()
            expected = theirs.read(number, x, y, width, height)
            np.testing.assert_array_equal(ours.read(number, x, y, width, height), expected)
    assert (ours.read(0, 0, 0, 256, 256) == 255).all()


def spoil(path, number):
    """Overwrite a tile of the first directory with zeros; returns its length."""
    with tifffile.TiffFile(path) as file:
        offset, length = file.pages[0].dataoffsets[number], file.pages[0].databytecounts[number]
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(bytes(length))
    return length


@pytest.mark.parametrize("damaged", [False, True])
def test_tiles_over_philips_holes_are_embedded_and_those_over_damage_unreadable(tmp_path, damaged):
    path = write_philips(tmp_path / "a.tiff")
    if damaged:
        spoil(path, 1)
    report = api.embed(
        [path],
        tmp_path / "archive",
        plan=PlanSettings(mpp=0.25, tile=64, tissue="none"),
        encode=EncodeSettings(encoder="null", precision="fp32", pixels=64),
        run=RunSettings(workers=0, shard_rows=256),
        doors=null_doors(),
    )
    assert [outcome.rows for outcome in report.outcomes] == [20 * 24]
    (holding,) = api.status(tmp_path / "archive").holdings
    assert (holding.rows, holding.unreadable) == (20 * 24, 16 * damaged)


def test_a_philips_hole_is_no_damage_and_damage_no_hole(tmp_path):
    path = write_philips(tmp_path / "a.tiff")
    length = spoil(path, 1)
    slide = open_slide(ref(path))
    assert slide.reader.startswith("tiff ")
    cells = np.array([[0, 0], [1, 0], [2, 0]], np.int32)
    fetched = slide.fetch(0, cells)
    assert [len(data) for data in fetched][:2] == [0, length]
    for shrink in slide.levels[0].shrinks:
        out = [np.zeros((256 // shrink, 256 // shrink, 3), np.uint8) for _ in cells]
        assert slide.decode(0, cells, fetched, out, shrink).tolist() == [True, False, True]
        assert (out[0] == 255).all()
    assert read_overview(slide).unknown.sum() == 0  # of a level that is whole
    assert read_overview(slide, 0.25).unknown.sum() == 256**2


def test_a_philips_slide_that_is_not_jpeg_or_whose_levels_do_not_grow_goes_to_openslide(tmp_path):
    for options in ({"compression": "zlib"}, {"factors": (1, 2, 2), "holes": ()}):
        assert open_slide(ref(write_philips(tmp_path / "a.tiff", **options))).reader.startswith("openslide ")


def test_ome_pyramids_give_their_levels_and_mpp(tmp_path):
    """OpenSlide sees level 0 alone: the others hang from it."""
    path = tmp_path / "a.ome.tif"
    pictures = [picture(600, 800), picture(300, 400, 1), picture(150, 200, 2)]
    facts = {
        "axes": "YXS",
        "PhysicalSizeX": 250,
        "PhysicalSizeXUnit": "nm",
        "PhysicalSizeY": 250,
        "PhysicalSizeYUnit": "nm",
    }
    with tifffile.TiffWriter(path, ome=True) as file:
        file.write(pictures[0], subifds=2, tile=(128, 128), compression="zlib", photometric="rgb", metadata=facts)
        for each in pictures[1:]:
            file.write(each, subfiletype=1, tile=(128, 128), compression="zlib", photometric="rgb")
    slide = open_slide(ref(path))
    assert slide.reader.startswith("tiff ")
    assert slide.mpp == pytest.approx(0.25)
    assert [level.downsample for level in slide.levels] == [1, 2, 4]
    for number, each in enumerate(pictures):
        np.testing.assert_array_equal(slide.read(number, 0, 0, each.shape[1], each.shape[0]), each)


def test_an_ome_stack_is_left_to_openslide(tmp_path):
    """Its first plane alone would pass for the slide."""
    path = tmp_path / "stack.ome.tif"
    stack = np.stack([picture(300, 300, seed) for seed in range(2)])
    facts = {"axes": "ZYXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
    tifffile.imwrite(path, stack, tile=(128, 128), photometric="rgb", metadata=facts, **CM)
    with pytest.raises(Unsupported, match="several planes"):
        TiffSlide(ref(path))


class TestTiffSlide(SlideContract):
    @pytest.fixture(params=["jpeg", "zlib", "philips"])
    def slide(self, tmp_path, request):
        if request.param == "philips":
            return TiffSlide(ref(write_philips(tmp_path / "a.tiff")))
        return TiffSlide(ref(write(tmp_path / "a.tiff", request.param)))


@pytest.mark.parametrize("kind", ["jpeg", "jpeg 4:2:0"])
@pytest.mark.parametrize("shrink", [2, 4])
def test_decoding_at_reduced_scale_is_near_to_the_mean(tmp_path, kind, shrink):
    slide = TiffSlide(ref(write(tmp_path / "a.tiff", "jpeg", **KINDS[kind])))
    level = slide.levels[0].shrunk(shrink)
    exact = slide.read(0, 0, 0, level.width * shrink, level.height * shrink)
    means = exact.reshape(level.height, shrink, level.width, shrink, 3).mean(axis=(1, 3))
    small = slide.read(0, 0, 0, level.width, level.height, shrink)
    assert np.abs(small - means).mean() < 2
    assert (slide.read(0, level.width - 5, level.height - 5, 20, 20, shrink)[5:, 5:] == 255).all()


# ------------------------------------------------------------------------------------------------------- what fails


def test_what_it_cannot_decode_exactly_goes_to_openslide_by_name(tmp_path):
    strips = tmp_path / "strips.tif"
    tifffile.imwrite(strips, picture(300, 300), photometric="rgb", metadata=None, **CM)
    grey = tmp_path / "grey.tif"
    tifffile.imwrite(grey, picture(300, 300)[..., 0], tile=(128, 128), metadata=None, **CM)
    for path in (strips, grey):
        with pytest.raises(Unsupported):
            TiffSlide(ref(path))
        with pytest.raises(SourceError, match="the reader tiff cannot take it"):
            open_slide(ref(path, reader="tiff"))
    tiled = write(tmp_path / "a.tiff")
    assert open_slide(ref(tiled)).reader.startswith("tiff ")
    assert open_slide(ref(tiled, reader="openslide")).reader.startswith("openslide ")


def test_tiles_with_an_adobe_marker_that_contradicts_the_directory_go_to_openslide(tmp_path):
    file = io.BytesIO()
    Image.fromarray(picture(256, 256, 9)).save(file, "JPEG", keep_rgb=True, quality=60)
    path = write_philips(tmp_path / "a.tiff", holes=())
    place = path.stat().st_size
    with tifffile.TiffFile(path, mode="r+b") as opened:
        for name, value in (("TileOffsets", place), ("TileByteCounts", len(file.getvalue()))):
            tag = opened.pages[0].tags[name]
            tag.overwrite([value, *tag.value[1:]])
    path.write_bytes(path.read_bytes()[:place].ljust(place) + file.getvalue())
    assert open_slide(ref(path)).reader.startswith("openslide ")


def test_holes_are_left_to_openslide(tmp_path):
    path = write(tmp_path / "a.tiff")
    with tifffile.TiffFile(path, mode="r+b") as file:
        tag = file.pages[0].tags["TileByteCounts"]
        tag.overwrite([0, *tag.value[1:]])
    assert open_slide(ref(path)).reader.startswith("openslide ")


@pytest.mark.parametrize("codec", ["jpeg", "zlib", "lzw", "jpeg2000"])
@pytest.mark.parametrize("how", ["zeros", "noise", "half"])
def test_a_damaged_tile_is_unreadable_and_its_neighbours_are_not(tmp_path, codec, how):
    path = write_svs(tmp_path / "a.svs", 33005) if codec == "jpeg2000" else write(tmp_path / "a.tiff", codec)
    whole = TiffSlide(ref(path))
    cells = np.array([[0, 0], [1, 0], [2, 0]], np.int32)
    w, h = whole.levels[0].tile
    before = [np.empty((h, w, 3), np.uint8) for _ in cells]
    assert whole.decode(0, cells, whole.fetch(0, cells), before).all()
    with tifffile.TiffFile(path) as file:
        offset, length = file.pages[0].dataoffsets[1], file.pages[0].databytecounts[1]
    data = bytearray(Path(path).read_bytes())
    good = bytes(data[offset : offset + length])
    bad = {
        "zeros": bytes(length),
        "noise": np.random.default_rng(0).bytes(length),
        "half": good[: length // 2] + bytes(length - length // 2),
    }[how]
    data[offset : offset + length] = bad
    Path(path).write_bytes(data)
    slide = TiffSlide(ref(path))
    after = [np.empty((h, w, 3), np.uint8) for _ in cells]
    found = slide.decode(0, cells, slide.fetch(0, cells), after)
    assert found.tolist()[::2] == [True, True]
    assert np.array_equal(after[0], before[0])
    assert np.array_equal(after[2], before[2])
    for shrink in slide.levels[0].shrinks[1:]:
        small = [np.empty((h // shrink, w // shrink, 3), np.uint8) for _ in cells]
        assert slide.decode(0, cells, slide.fetch(0, cells), small, shrink).tolist() == [True, False, True]
    if not (how == "half" and codec == "jpeg2000"):  # OpenJPEG decodes what there is of a layered stream
        assert not found[1]
        with pytest.raises(SourceError, match="undecodable at level 0"):
            slide.read(0, w + 5, 5, 20, 20)


def test_jpeg_2000_that_lacks_a_part_is_unreadable(tmp_path):
    """OpenJPEG leaves black what is not there."""
    file = io.BytesIO()
    Image.fromarray(picture(240, 240)).save(file, "JPEG2000", tile_size=(128, 128), irreversible=False, no_jp2=True)
    whole = file.getvalue()
    last = whole.rindex(b"\xff\x90\0\x0a")
    description = APERIO.format(w=480, h=240)
    with tifffile.TiffWriter(tmp_path / "a.svs") as writer:
        parts = iter([whole, whole[:last] + b"\xff\xd9"])
        size = {"shape": (240, 480, 3), "dtype": np.uint8, "tile": (240, 240)}
        writer.write(parts, **size, compression=33005, photometric="rgb", description=description, metadata=None)
    slide = TiffSlide(ref(tmp_path / "a.svs"))
    cells = np.array([[0, 0], [1, 0]], np.int32)
    out = [np.empty((240, 240, 3), np.uint8) for _ in cells]
    assert slide.decode(0, cells, slide.fetch(0, cells), out).tolist() == [True, False]
    np.testing.assert_array_equal(out[0], picture(240, 240))


def test_a_file_that_is_cut_while_it_is_open_fails_as_a_whole(tmp_path):
    path = write(tmp_path / "a.tiff")
    slide = TiffSlide(ref(path))
    with open(path, "r+b") as file:
        file.truncate(5000)
    with pytest.raises(SourceError, match="became shorter"):
        slide.read(0, 600, 600, 300, 300)


def test_a_tile_of_another_size_than_the_directory_says_is_unreadable(tmp_path):
    path = write(tmp_path / "a.tiff", photometric="ycbcr")
    slide = TiffSlide(ref(path))
    for side in (64, 512):
        file = io.BytesIO()
        Image.fromarray(picture(side, side)).save(file, "JPEG")
        for shrink in (1, 2, 4):
            out = np.empty((256 // shrink, 256 // shrink, 3), np.uint8)
            data = [memoryview(file.getvalue())]
            assert not slide.decode(0, np.zeros((1, 2), np.int32), data, [out], shrink)[0]


def test_superfluous_bytes_within_a_scan_harm_nothing():
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "JPEG", restart_marker_blocks=4)
    data = file.getvalue()
    restart = data.index(b"\xff\xd3")
    padded = data[:restart] + b"\x00\x00" + data[restart:]
    with pytest.raises(ValueError, match="2 extraneous bytes before marker"):
        simplejpeg.decode_jpeg(padded, "RGB")
    for shrink in (1, 2, 4):
        expected, found = (np.empty((128 // shrink, 128 // shrink, 3), np.uint8) for _ in range(2))
        assert decode_jpeg(data, expected, shrink)
        assert decode_jpeg(padded, found, shrink)
        assert np.array_equal(found, expected)


def test_tifffile_says_nothing_of_its_own(tmp_path, caplog):
    whole = tmp_path / "whole.tif"
    tifffile.imwrite(whole, picture(600, 600), tile=(256, 256), photometric="rgb", metadata=None)
    (tmp_path / "cut.tif").write_bytes(whole.read_bytes()[:8] + b"\xff" * 99)
    (tmp_path / "far.tif").write_bytes(whole.read_bytes()[:4] + (1 << 30).to_bytes(4, "little") + bytes(99))
    for name in ("cut.tif", "far.tif"):
        with pytest.raises((Unsupported, SourceError)):
            TiffSlide(ref(tmp_path / name))
    assert not caplog.records
