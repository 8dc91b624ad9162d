"""The gate lets the true graph in at every precision and keeps every spoilt one out, with its figures."""

import json
from dataclasses import asdict, replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchmill.encoders import CpuEncoder, gate_tiles, vit
from patchmill.encoders.gate import THRESHOLDS, judge, reference_of, refusal, shown_to
from patchmill.testing.encoders import NullEncoder
from patchmill.types import EncoderSpec, Intensity, View

TRAINED, UNTRAINED = "0" * 64, "untrained:5"
SIDE = 64  # pixels per side in most tests: a tenth of the work


def spec_of(precision="fp32", weights=UNTRAINED, pixels=SIDE, outputs=None) -> EncoderSpec:
    return EncoderSpec(
        name="small",
        architecture={},
        weights=weights,
        view=View(pixels=pixels),
        precision=precision,
        outputs=outputs or {"cls": 384, "mean": 384},
        license="none",
    )


def reference_at(arch, weights, pixels):
    return reference_of(spec_of(pixels=pixels), vit.build(arch, weights, pixels, target="plain"))


def reports(arch, weights, reference, precision, pixels=SIDE):
    """What the gate says of the graph of these weights, first as trained ones, then as untrained ones."""
    encoder = CpuEncoder(spec_of(precision, pixels=pixels), vit.build(arch, weights, pixels, precision=precision))
    try:
        found = []
        for identity in (TRAINED, UNTRAINED):
            encoder.spec = replace(encoder.spec, weights=identity)
            found.append(judge(encoder, reference, "planted"))
        return found
    finally:
        encoder.close()


# --------------------------------------------------------------------------------------------------- real graphs


@pytest.fixture(scope="module")
def reference(small, small_weights):
    return reference_at(small.architecture, small_weights, SIDE)


def test_the_reference_is_what_transformers_gives(small, small_weights, reference, oracle):
    wanted = oracle.vit_outputs(oracle.vit(small.architecture, small_weights), gate_tiles(SIDE))
    assert reference.keys() == {"cls", "mean"}
    for name, vectors in reference.items():
        assert np.abs(vectors - wanted[name]).max() < 1e-4


@pytest.mark.parametrize(("precision", "pixels"), [("fp32", SIDE), ("fp16", SIDE), ("int8", SIDE), ("int8", 224)])
def test_the_true_graph_passes(small, small_weights, reference, precision, pixels):
    if pixels != SIDE:
        reference = reference_at(small.architecture, small_weights, pixels)
    found = reports(small.architecture, small_weights, reference, precision, pixels)
    for trained, report in zip((True, False), found, strict=True):
        assert report.passed, report.text()
        assert report.finite
        assert report.batch_equal
        assert report.trained is trained
        assert (report.encoder, report.precision, report.why) == ("small", precision, "planted")
        assert report.thresholds == asdict(THRESHOLDS[precision])
        assert report.tiles_per_second > 0
        assert json.loads(json.dumps(asdict(report), allow_nan=False)) == asdict(report)  # it is stored


def heads_swapped(weights, parts, projection=False):
    """The first two heads exchanged in some of q, k, v (0, 1, 2) of the first block."""
    changed = {name: weights[f"blocks.0.{name}"].copy() for name in ("qkv.weight", "qkv.bias", "proj.weight")}
    first, second = slice(0, 64), slice(64, 128)
    for part in parts:
        for name in ("qkv.weight", "qkv.bias"):
            rows = changed[name].reshape(3, 384, -1)[part]
            rows[first], rows[second] = rows[second].copy(), rows[first].copy()
    if projection:
        columns = changed["proj.weight"]
        columns[:, first], columns[:, second] = columns[:, second].copy(), columns[:, first].copy()
    return weights | {f"blocks.0.{name}": array for name, array in changed.items()}


def times(weights, factor, *names):
    return weights | {name: weights[name] * np.float32(factor) for name in names}


def cls_and_a_register_exchanged(weights):
    cls, registers = weights["cls"], weights["registers"].copy()
    weights = weights | {"cls": registers[0].copy(), "registers": registers}
    registers[0] = cls
    return weights


# Mistakes that graphs and runtimes make. Each takes weights and architecture, and gives spoilt ones.
MISTAKES = {
    "heads of q swapped": lambda w, a: (heads_swapped(w, [0]), a),
    "heads of q, k and v swapped, not of the projection": lambda w, a: (heads_swapped(w, [0, 1, 2]), a),
    "an MLP without effect": lambda w, a: (times(w, 0, "blocks.1.fc2.weight", "blocks.1.fc2.bias"), a),
    "a layer scale left out": lambda w, a: (w | {"blocks.1.scale1": np.ones(384, np.float32)}, a),
    "CLS and a register exchanged": lambda w, a: (cls_and_a_register_exchanged(w), a),
    "another normalisation": lambda w, a: (w, replace(a, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))),
    "blue for red": lambda w, a: (w | {"patch.weight": w["patch.weight"][:, ::-1]}, a),
    "x for y in a patch": lambda w, a: (w | {"patch.weight": w["patch.weight"].swapaxes(2, 3)}, a),
    "another base of the positions": lambda w, a: (w, replace(a, rope_base=10_000.0)),
}
# Too small for int8, whose own rounding moves vectors as much.
SLIPS = {
    "a layer scale 1.1 times too large": lambda w, a: (times(w, 1.1, "blocks.1.scale1"), a),
    "a wrong epsilon": lambda w, a: (w, replace(a, eps=0.01)),
}


def assert_refused(report):
    assert not report.passed
    line = str(refusal(report))
    assert "\n" not in line
    assert line.startswith(f"small: the gate refuses {report.precision} on this machine: ")
    figures = f"cosine {report.cosine_min:.5f}", f"overlap {report.overlap:.3f}", f"error {report.error_max:.2g}"
    for figure, least in zip(figures, ("cosine", "overlap", "error"), strict=True):
        assert f"{figure} ({'most' if least == 'error' else 'least'} {report.thresholds[least]})" in line
    assert ("--precision fp32" in line) == (report.precision != "fp32")


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_spoilt_graph_is_refused(small, small_weights, reference, mistake, precision):
    weights, arch = MISTAKES[mistake](small_weights, small.architecture)
    for report in reports(arch, weights, reference, precision):
        assert_refused(report)
        assert report.batch_equal


@pytest.mark.parametrize("slip", SLIPS)
def test_fp32_is_held_to_small_slips_too(small, small_weights, reference, slip):
    weights, arch = SLIPS[slip](small_weights, small.architecture)
    for report in reports(arch, weights, reference, "fp32"):
        assert_refused(report)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_nan_is_refused_and_said(small, small_weights, reference, precision):
    spoilt = small_weights["blocks.1.fc1.weight"].copy()
    spoilt[3, 3] = np.nan
    for report in reports(small.architecture, small_weights | {"blocks.1.fc1.weight": spoilt}, reference, precision):
        assert_refused(report)
        assert not report.finite
        assert "NOT finite" in report.text()
        json.dumps(asdict(report), allow_nan=False)


def test_another_way_to_write_the_same_model_passes(small, small_weights, reference):
    """Heads have no order and registers no place, so to permute either everywhere changes nothing but rounding."""
    permuted = heads_swapped(small_weights, [0, 1, 2], projection=True)
    permuted = permuted | {"registers": np.roll(small_weights["registers"], 1, axis=0)}
    for report in reports(small.architecture, permuted, reference, "fp32"):
        assert report.passed, report.text()


# ------------------------------------------------------------------------------------------------- given vectors


@cache
def numbers():
    return {tile.tobytes(): row for row, tile in enumerate(gate_tiles(16))}


class Table:
    """An encoder that knows a vector for each of the gate's tiles, and adds what `extra` says of a batch."""

    provenance: dict[str, str] = {}  # noqa: RUF012
    batch, parallel = 16, 1

    def __init__(self, vectors, precision="fp32", weights=TRAINED, extra=lambda rows: 0.0):
        self.spec = spec_of(precision, weights, 16, {"mean": vectors.shape[1]})
        self.known = numbers()
        self.vectors, self.extra = vectors, extra

    def __call__(self, pixels):
        rows = [self.known[tile.tobytes()] for tile in pixels]
        return {"mean": (self.vectors[rows] + self.extra(np.arange(len(rows)))).astype(np.float32)}

    def close(self):
        pass


def judged(found, wanted, **settings):
    return judge(Table(found, **settings), {"mean": wanted.astype(np.float32)})


def drawn(seed=0, width=6):
    return np.random.default_rng(seed).standard_normal((32, width)) + 5.0


@pytest.mark.parametrize(
    "extra",
    [
        lambda rows: 1e-5 * len(rows),  # the size of the batch
        lambda rows: 1e-5 * (rows[:, None] > 0),  # the place in it
        lambda rows: 1e-5 * (rows[:, None] >= 24),
    ],
)
def test_vectors_that_depend_on_the_batch_are_refused_however_near_they_are(extra):
    wanted = drawn()
    assert judged(wanted, wanted).passed
    report = judged(wanted, wanted, extra=extra)
    assert not report.batch_equal
    assert not report.passed
    assert report.cosine_min > THRESHOLDS["fp32"].cosine
    assert "batch of 1 NOT equal" in str(refusal(report))


def test_a_batch_is_filled_and_every_place_in_it_is_looked_at():
    """A GPU's batch is larger than the set of tiles."""
    wanted = drawn()
    encoder = Table(wanted, extra=lambda rows: 1e-5 * (rows[:, None] == 70))
    assert judge(encoder, {"mean": wanted.astype(np.float32)}).passed
    encoder.batch = 100
    report = judge(encoder, {"mean": wanted.astype(np.float32)})
    assert not report.batch_equal
    assert not report.passed


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 999), noise=st.floats(0, 3))
def test_figures_equal_their_definition(seed, noise):
    wanted = drawn(seed).astype(np.float32)
    found = (wanted + noise * drawn(seed + 1000)).astype(np.float32)
    report = judged(found, wanted, precision="int8")
    a, b = (vectors.astype(np.float64) - wanted.mean(axis=0, dtype=np.float64) for vectors in (found, wanted))

    def cosine(x, y):
        return float(x @ y / np.sqrt((x @ x) * (y @ y)))

    def nearest(vectors, row):
        others = sorted(set(range(32)) - {row}, key=lambda other: -cosine(vectors[row], vectors[other]))
        return set(others[:10])

    spread = np.mean([np.sqrt(y @ y) for y in b])
    assert report.cosine_min == pytest.approx(min(cosine(x, y) for x, y in zip(a, b, strict=True)), abs=1e-6)
    assert report.overlap == pytest.approx(np.mean([len(nearest(a, r) & nearest(b, r)) / 10 for r in range(32)]))
    assert report.error_max == pytest.approx(max(np.linalg.norm(x - y) for x, y in zip(a, b, strict=True)) / spread)


@pytest.mark.parametrize("precision", THRESHOLDS)
def test_trained_weights_answer_for_directions_and_neighbours_untrained_ones_for_errors(precision):
    wanted = drawn()
    centre = wanted.mean(axis=0)
    longer = centre + 1.5 * (wanted - centre)  # every direction and neighbour kept, every length wrong
    assert judged(longer, wanted, precision=precision).passed
    assert not judged(longer, wanted, precision=precision, weights=UNTRAINED).passed

    wanted[0] = 0
    wanted[0] = wanted.sum(axis=0) / 31 + 1e-5  # a tile near the mean of all: a hair's breadth turns it around
    turned = wanted.copy()
    turned[0] -= 1e-4
    assert judged(turned, wanted, precision=precision, weights=UNTRAINED).passed
    report = judged(turned, wanted, precision=precision)
    assert report.cosine_min < 0
    assert not report.passed


@pytest.mark.parametrize("precision", THRESHOLDS)
def test_lost_neighbours_are_refused_though_every_vector_is_near(precision):
    """Two tight crowds: whoever mixes up the tiles within a crowd has the same cosines and other neighbours."""
    crowds = np.repeat([[9.0] * 6, [1.0] * 6], 16, axis=0)
    wanted, found = (crowds + 0.005 * drawn(seed) for seed in (1, 2))
    report = judged(found, wanted, precision=precision)
    assert report.cosine_min > report.thresholds["cosine"]
    assert report.overlap < report.thresholds["overlap"]
    assert not report.passed


def test_a_coarser_precision_has_to_reach_less():
    by_precision = [THRESHOLDS[precision] for precision in ("fp32", "fp16", "bf16", "int8")]
    assert len(THRESHOLDS) == 4
    for figure, sign in (("cosine", -1), ("overlap", -1), ("error", 1)):
        bounds = [sign * getattr(limits, figure) for limits in by_precision]
        assert bounds == sorted(set(bounds))


# --------------------------------------------------------------------------------------------------------- tiles


@pytest.mark.parametrize("show", ["histology", "mri", "both"])
@pytest.mark.parametrize("pixels", [224, 16, 112, 160, 448])
def test_tiles_are_the_same_32_pictures_at_every_size(pixels, show):
    tiles = gate_tiles(pixels, show)
    assert tiles.shape == (32, pixels, pixels, 3)
    assert tiles.dtype == np.uint8
    assert tiles.flags.c_contiguous
    assert np.array_equal(tiles, gate_tiles(pixels, show))
    assert len({tile.tobytes() for tile in tiles}) == 32
    means = [each.reshape(32, -1, 3).mean(axis=1) for each in (tiles, gate_tiles(224, show))]
    assert np.abs(means[0] - means[1]).max() < 2  # of 255: the same place, not another


def test_tiles_have_something_to_tell_apart():
    tiles = gate_tiles(224).astype(np.int64)
    assert (tiles.std(axis=(1, 2)).max(axis=1) > 8).all()
    down, across = (np.abs(np.diff(tiles, axis=axis)).mean(axis=(0, 3, 3 - axis)) for axis in (1, 2))
    # As smooth down as across, and at the edges as inside: no tile reaches over into its neighbour in the mosaic.
    assert max(down.max(), across.max()) < 3 * min(down.min(), across.min())


def test_tiles_show_what_the_encoder_will_see():
    window = Intensity(windows=((0.0, 1.0),))
    for view, show in (
        (View(pixels=32), "histology"),
        (View(pixels=32, intensity=window), "mri"),
        (View(pixels=32, intensity=window, slab=3), "mri"),
        (View(pixels=32, fit="pad"), "both"),
        (View(pixels=32, dtype="int16"), "hounsfield"),
    ):
        assert shown_to(view) == show
    grey = [np.ptp(tile.astype(int), axis=2).max() < 3 for tile in gate_tiles(64, "both")]
    assert grey == [False, True] * 16


class Recording(NullEncoder):
    """A null encoder that keeps what it is given."""

    def __call__(self, pixels):
        self.seen = [*getattr(self, "seen", []), pixels]
        return super().__call__(pixels)


def test_an_encoder_of_greys_is_judged_on_greys():
    encoder = Recording(view=View(pixels=32, intensity=Intensity(windows=((0.0, 1.0),))))
    wanted = encoder(gate_tiles(32, "mri"))
    assert judge(encoder, wanted).error_max == 0
    assert len(encoder.seen) > 2
    assert all(np.ptp(tiles.astype(int), axis=3).max() < 3 for tiles in encoder.seen)
