"""CT-Net against transformers' ResNet and torch's own layers, from the file that its training writes to the vectors."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import ResNetConfig, ResNetModel

from patchmill.encoders import CpuEncoder, box_of_encoder, ctnet, known, open_encoder, resolve, session
from patchmill.encoders.cards import card, read_card
from patchmill.encoders.checkpoints import load
from patchmill.encoders.gate import judge, reference_of
from patchmill.encoders.keys import layouts
from patchmill.encoders.layout import parameters, untrained
from patchmill.encoders.lint import tensorrt_findings
from patchmill.encoders.phantoms import boxes
from patchmill.encoders.runtimes import chunk_of
from patchmill.encoders.torchgraph import module_of
from patchmill.errors import EncoderError, UsageError
from patchmill.types import EncoderSpec, EncodeSettings, Intensity, View
from tests.encoders.test_field import named
from tests.encoders.test_meddinov3 import furthest
from tests.encoders.test_vit import assert_close, run

OUTPUTS = ("penultimate", "features")
SETTINGS = EncodeSettings(encoder="ctnet", untrained=0, precision="fp32")
# The least side whose maps the three convolutions over the volume can take, and two blocks in one stage.
FEW = {
    "slices": 12,
    "pixels": 192,
    "depths": (2, 1, 1, 1),
    "widths": (8, 16, 32, 64),
    "reduced": (7, 6, 5),
    "hidden": (9, 8),
}


class Oracle(nn.Module):
    """CT-Net as its authors wrote it, with transformers' ResNet in place of torchvision's; BatchNorms at random."""

    def __init__(self, arch, classes, features):
        super().__init__()
        config = {"depths": list(arch.depths), "hidden_sizes": list(arch.widths), "embedding_size": arch.widths[0]}
        self.features = ResNetModel(ResNetConfig(layer_type="basic", **config))
        first, second, third = arch.reduced
        self.reducingconvs = nn.Sequential(
            nn.Conv3d(arch.slices // 3, first, (3, 3, 3), (3, 1, 1)),
            nn.ReLU(),
            nn.Conv3d(first, second, (3, 3, 3), (3, 1, 1)),
            nn.ReLU(),
            nn.Conv3d(second, third, (3, 2, 2), (3, 2, 2)),
            nn.ReLU(),
        )
        one, two = arch.hidden
        self.classifier = nn.Sequential(
            nn.Linear(features, one),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(one, two),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(two, classes),
        )
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.2)
                nn.init.uniform_(module.bias, -0.3, 0.3)
                nn.init.uniform_(module.running_mean, -0.5, 0.5)
                nn.init.uniform_(module.running_var, 0.4, 1.6)
            elif isinstance(module, nn.Conv3d | nn.Linear):  # by default it would all but forget its input
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
        self.eval()

    def maps(self, hu):
        """Of triples [n, 3, h, w] in HU."""
        pixels = (torch.from_numpy(hu).float().clamp(-1000, 200) + 1000) / 1200 - 0.449
        return self.features(pixels).last_hidden_state

    def outputs(self, maps):
        """Of all maps of each box [b, n, c, h, w]."""
        features = self.reducingconvs(maps).flatten(1)
        return {"penultimate": self.classifier[:5](features).numpy(), "features": features.numpy()}

    def forward(self, hu):
        b, slices, h, w = hu.shape
        return self.outputs(self.maps(hu.reshape(-1, 3, h, w)).unflatten(0, (b, slices // 3)))

    def state(self):
        """The weights under the names of torchvision's ResNet in a sequence."""
        found = {}
        for name, tensor in self.state_dict().items():
            match name.split("."):
                case ["features", "embedder", _, kind, part]:
                    found[f"features.{0 if kind == 'convolution' else 1}.{part}"] = tensor
                case ["features", _, _, stage, _, block, "shortcut", kind, part]:
                    place = f"features.{4 + int(stage)}.{block}.downsample"
                    found[f"{place}.{0 if kind == 'convolution' else 1}.{part}"] = tensor
                case ["features", _, _, stage, _, block, _, number, kind, part]:
                    layer = {"convolution": "conv", "normalization": "bn"}[kind] + str(1 + int(number))
                    found[f"features.{4 + int(stage)}.{block}.{layer}.{part}"] = tensor
                case _:
                    found[name] = tensor
        return found

    def checkpoint(self, path, *, zipped=True):
        """What training writes: the weights as two GPUs hold them, and the optimiser's state, tensors as well."""
        model = nn.ParameterList([nn.Parameter(tensor.clone()) for tensor in self.classifier.parameters()])
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.99)
        sum(each.sum() for each in model).backward()
        optimizer.step()
        params = {f"module.{name}": tensor for name, tensor in self.state().items()}
        whole = {"params": params, "optimizer": optimizer.state_dict()}
        torch.save(whole, path, _use_new_zipfile_serialization=zipped)
        return path


def oracle_of(chosen, classes=83, seed=0):
    torch.manual_seed(seed)
    return Oracle(chosen.architecture, classes, chosen.outputs["features"]).requires_grad_(False)


@pytest.fixture(scope="module")
def chosen():
    """The card of a small CT-Net."""
    whole = card("ctnet")
    arch = replace(whole.architecture, **FEW)
    c, depth, rows, columns = arch.features
    outputs = {"penultimate": FEW["hidden"][-1], "features": c * depth * rows * columns}
    return replace(whole, architecture=arch, pixels=arch.pixels, outputs=outputs, parameters=None)


@pytest.fixture(scope="module")
def small(chosen, tmp_path_factory):
    """Its oracle, and the weights as they were read from the oracle's file."""
    oracle = oracle_of(chosen)
    return oracle, dict(load(oracle.checkpoint(tmp_path_factory.mktemp("ctnet") / "CTNet83"), chosen))


@pytest.fixture(scope="module")
def volumes():
    """Boxes of CTs, and whatever else int16 can hold."""
    wild = np.random.default_rng(0).integers(-32768, 32768, (1, 12, 192, 192)).astype(np.int16)
    return np.concatenate([boxes(12, 192), wild])


def spec_of(chosen, precision="fp32", weights="untrained:0"):
    arch = chosen.architecture
    return EncoderSpec(
        name="ctnet",
        architecture={},
        weights=weights,
        view=View(pixels=arch.pixels, dtype="int16", depth=arch.slices),
        precision=precision,
        outputs=chosen.outputs,
        license="none",
    )


def by_torch(model, volumes):
    with torch.inference_mode():
        return dict(zip(OUTPUTS, (each.numpy() for each in module_of(model)(torch.from_numpy(volumes))), strict=True))


def encoded(chosen, model, volumes, threads=2):
    encoder = CpuEncoder(spec_of(chosen), model, threads)
    try:
        return encoder(volumes)
    finally:
        encoder.close()


# --------------------------------------------------------------------------------------------------------- the vectors


def test_equals_its_oracle_whole_in_parts_and_in_torch(chosen, small, volumes):
    oracle, weights = small
    wanted = oracle(volumes)
    model = ctnet.build(chosen.architecture, weights)
    assert_close(run(model, volumes, OUTPUTS), wanted, 1e-4)
    assert_close(encoded(chosen, model, volumes), wanted, 1e-4)
    assert_close(by_torch(model, volumes), wanted, 1e-4)
    assert min(np.ptp(each, axis=0).max() for each in wanted.values()) > 0.05  # the boxes are told apart


def test_equals_its_oracle_at_full_size(tmp_path):
    """Of 134 triples five differ, which is all that the ResNet has to be run on."""
    whole = card("ctnet")
    oracle = oracle_of(whole)
    weights = load(oracle.checkpoint(tmp_path / "CTNet83"), whole)
    triples = boxes(15, 420)[0].reshape(5, 3, 420, 420)
    order = np.random.default_rng(0).integers(0, 5, 134)
    first, rest = ctnet.build(whole.architecture, weights).parts
    maps = run(first, triples.reshape(1, 15, 420, 420), (first.proto.graph.output[0].name,))
    (maps,) = maps.values()
    wanted = oracle.maps(triples)
    assert maps.shape == (5, 512, 14, 14)
    assert np.abs(maps - wanted.numpy()).max() <= 1e-4
    values = {rest.proto.graph.input[0].name: maps[order]}
    found = session.open_session("ctnet", rest, ["CPUExecutionProvider"]).run(list(OUTPUTS), values)
    assert_close(dict(zip(OUTPUTS, found, strict=True)), oracle.outputs(wanted[None, order]), 1e-4)


@pytest.mark.slow
def test_the_encoder_equals_its_oracle_at_full_size(tmp_path):
    """Of 134 triples ten differ, and no two that follow each other are the same."""
    oracle = oracle_of(card("ctnet"))
    path = oracle.checkpoint(tmp_path / "CTNet83")
    encoder = open_encoder(replace(SETTINGS, untrained=None, weights=str(path)))
    triples = boxes(30, 420)[0].reshape(10, 3, 420, 420)
    order = np.cumsum(np.random.default_rng(0).integers(1, 10, 134)) % 10
    try:
        found = encoder(triples[order].reshape(1, 402, 420, 420))
        assert_close(found, oracle.outputs(oracle.maps(triples)[None, order]), 1e-4)
    finally:
        encoder.close()


def test_three_neighbouring_slices_are_the_channels_of_a_picture_the_first_first(chosen, small):
    """What lies in the second triple alone reaches the second map alone; and the order within it counts."""
    first, _ = ctnet.build(chosen.architecture, small[1]).parts
    output = first.proto.graph.output[0].name
    empty = np.full((1, 12, 192, 192), -1000, np.int16)
    for row in (3, 4, 5):
        box = empty.copy()
        box[0, row] = 100
        maps, other = (run(first, each, (output,))[output] for each in (box, empty))
        differing = [number for number in range(4) if not np.array_equal(maps[number], other[number])]
        assert differing == [1]
        alone = empty[:, :3].copy()
        alone[0, row - 3] = 100
        assert np.array_equal(run(first, alone, (output,))[output][0], maps[1])


@pytest.mark.parametrize(("precision", "bound"), [("fp16", 0.02), ("bf16", 0.15)])
def test_half_precision_is_near_it(precision, bound, chosen, small, volumes):
    oracle, weights = small
    model = ctnet.build(chosen.architecture, weights, precision=precision)
    wanted, found = oracle(volumes), by_torch(model, volumes)
    for name in OUTPUTS:
        assert found[name].dtype == np.float32
        assert 0 < furthest(found[name], wanted[name]) < bound
    if precision == "fp16":
        assert furthest(encoded(chosen, model, volumes)["penultimate"], wanted["penultimate"]) < bound


def test_each_unit_counts_within_the_clip_and_none_beyond(chosen, small):
    for precision in ("fp32", "fp16", "bf16"):
        model = ctnet.build(chosen.architecture, small[1], precision=precision)
        values = np.array([199, 200, 3000, -999, -1000, -1024, -32768], np.int16)
        found = by_torch(model, np.broadcast_to(values[:, None, None, None], (7, 12, 192, 192)).copy())["features"]
        assert np.array_equal(found[1], found[2])
        assert np.array_equal(found[4], found[5])
        assert np.array_equal(found[4], found[6])
        if precision == "fp32":
            assert not np.array_equal(found[0], found[1])
            assert not np.array_equal(found[3], found[4])


def test_a_box_gives_the_same_bytes_whatever_came_with_it(chosen, small, volumes, monkeypatch):
    """And no call of the runtime sees more than three slices, which bounds its memory."""
    shapes = []

    def opened(name, model, providers, **options):
        real = session_open(name, model, providers, **options)

        class Counting:
            get_inputs = real.get_inputs

            def run(self, names, feeds):
                shapes.extend(each.shape for each in feeds.values())
                return real.run(names, feeds)

        return Counting()

    session_open = session.open_session
    monkeypatch.setattr(session, "open_session", opened)
    model = ctnet.build(chosen.architecture, small[1])
    whole = encoded(chosen, model, volumes)
    assert set(shapes) == {(1, 3, 192, 192), (4, 64, 6, 6)}
    for row in (0, 4):
        for threads in (1, 3):
            alone = encoded(chosen, model, volumes[row : row + 1], threads)
            assert all(np.array_equal(alone[name][0], whole[name][row]) for name in OUTPUTS)


def test_one_box_is_a_batch(chosen, small):
    encoder = CpuEncoder(spec_of(chosen), ctnet.build(chosen.architecture, small[1]), 2)
    assert encoder.batch == 1
    with pytest.raises(
        EncoderError, match=r"tiles are int16 \[1, 12, 192\], the encoder takes int16 \[b, 12, 192, 192"
    ):
        encoder(np.zeros((1, 12, 192), np.int16))
    encoder.close()
    with pytest.raises(EncoderError, match="the encoder is closed"):
        encoder(np.zeros((1, 12, 192, 192), np.int16))
    assert chunk_of((402, 420, 420), None) == 1
    assert (chunk_of((224, 224, 3), None), chunk_of((448, 448, 3), None)) == (128, 32)


# ------------------------------------------------------------------------------------------------------------ the file


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("classes", [83, 9, 1])
def test_a_file_of_any_number_of_classes_and_either_format_is_read(classes, zipped, chosen, tmp_path, volumes):
    oracle = oracle_of(chosen, classes, seed=classes)
    weights = load(oracle.checkpoint(tmp_path / "CTNet", zipped=zipped), chosen)
    found = by_torch(ctnet.build(chosen.architecture, weights), volumes[:1])
    assert_close(found, oracle(volumes[:1]), 1e-4)


def test_a_file_that_is_not_exactly_this_encoder_is_refused(chosen, small, tmp_path):
    state, path = small[0].state(), tmp_path / "other.pth"
    wide = {"classifier.0.weight": torch.zeros(9, 41)}
    for changed, says in (
        ({"features.5.0.downsample.1.running_var": None}, r"lacks features\.5\.0\.downsample\.1\.running_var"),
        ({"reducingconvs.4.bias": None}, r"lacks reducingconvs\.4\.bias"),
        ({"classifier.7.weight": torch.zeros(1)}, r"also holds classifier\.7\.weight"),
        ({"features.7.1.conv1.weight": torch.zeros(1)}, r"also holds features\.7\.1\.conv1\.weight"),
        (wide, r"classifier\.0\.weight is \[9, 41\], ctnet wants \[9, 10\]"),
        ({"features.1.running_mean": torch.full((8,), torch.nan)}, r"features\.1\.running_mean holds NaN"),
    ):
        torch.save({name: each for name, each in (state | changed).items() if each is not None}, path)
        with pytest.raises(EncoderError, match=says):
            dict(load(path, chosen))
    without = {name: each for name, each in state.items() if not name.startswith("classifier.6.")}
    torch.save(without, path)
    assert len(dict(load(path, chosen))) == len(small[1])


def test_every_tensor_is_known_by_name_and_shape_and_their_number_is_the_authors():
    whole = card("ctnet")
    oracle = oracle_of(whole)
    counted = sum(each.numel() for each in oracle.parameters())
    assert counted == 12_411_779
    norms = sum(each.num_features for each in oracle.modules() if isinstance(each, nn.BatchNorm2d))
    assert parameters(whole.architecture) == whole.parameters == counted - 83 * 97 - norms
    theirs = {name: tuple(each.shape) for name, each in oracle.state().items() if "num_batches" not in name}
    theirs = {name: shape for name, shape in theirs.items() if not name.startswith("classifier.6.")}
    assert named(layouts(whole.architecture)["ct-net-models"]) == theirs


# ------------------------------------------------------------------------------------------------------------ the gate


def test_boxes_of_the_gate_are_four_bodies_the_same_at_every_call():
    found = boxes(12, 64)
    assert (found.shape, found.dtype) == ((4, 12, 64, 64), np.int16)
    assert np.array_equal(found, boxes(12, 64))
    assert -1024 <= found.min() < -990
    assert 500 < found.max() < 3072
    assert len({each.tobytes() for each in found.reshape(-1, 64, 64)}) == 48
    near = np.abs(np.diff(found.astype(int), axis=1)).mean()
    assert 10 < near < np.abs(found[:, 0].astype(int) - found[:, 6]).mean()  # neighbours are alike, and not the same


def permuted(weights, name, order, axis=1):
    return weights | {name: np.take(weights[name], order, axis)}


MISTAKES = {
    "the triples upside down": lambda w, a: (permuted(w, "stem.weight", [2, 1, 0]), a),
    "the volume upside down": lambda w, a: (permuted(w, "reduce.0.weight", [3, 2, 1, 0]), a),
    "two triples exchanged": lambda w, a: (permuted(w, "reduce.0.weight", [0, 2, 1, 3]), a),
    "x for y": lambda w, a: (w | {"reduce.0.weight": w["reduce.0.weight"].swapaxes(3, 4)}, a),
    "the maps' channels upside down": lambda w, a: (w | {"reduce.1.weight": w["reduce.1.weight"][:, :, ::-1]}, a),
    "a BatchNorm's shift left out": lambda w, a: (w | {"stages.2.blocks.0.second.bias": np.zeros(32, np.float32)}, a),
    "a projection left out": lambda w, a: (
        w | {"stages.3.blocks.0.project.weight": 0 * w["stages.3.blocks.0.project.weight"]},
        a,
    ),
    "a clip at 300 HU": lambda w, a: (w, replace(a, hounsfield=(-1000.0, 300.0), centre=0.449 * 12 / 13)),
    "a clip at -900 HU": lambda w, a: (w, replace(a, hounsfield=(-900.0, 200.0))),
    "nothing taken from the pixels": lambda w, a: (w, replace(a, centre=0.0)),
    "a layer 1.01 times too large": lambda w, a: (w | {"hidden.0.weight": w["hidden.0.weight"] * np.float32(1.01)}, a),
}


@pytest.fixture(scope="module")
def reference(chosen, small):
    return reference_of(spec_of(chosen), ctnet.build(chosen.architecture, small[1]))


def reports(chosen, model, reference, precision="fp32"):
    """What the gate says, first of them as trained weights, then as untrained ones."""
    encoder = CpuEncoder(spec_of(chosen, precision), model, 2)
    try:
        found = []
        for identity in ("0" * 64, "untrained:0"):
            encoder.spec = replace(encoder.spec, weights=identity)
            found.append(judge(encoder, reference))
        return found
    finally:
        encoder.close()


def test_its_reference_is_what_the_oracle_gives(small, reference):
    assert_close(reference, small[0](boxes(12, 192)), 1e-4)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_true_graph_passes(precision, chosen, small, reference):
    model = ctnet.build(chosen.architecture, small[1], precision=precision)
    for report in reports(chosen, model, reference, precision):
        assert report.passed, report.text()
        assert report.finite
        assert report.batch_equal
        assert report.overlap == 1


@pytest.mark.parametrize("mistake", MISTAKES)
def test_no_spoilt_graph_passes(mistake, chosen, small, reference):
    weights, arch = MISTAKES[mistake](small[1], chosen.architecture)
    trained, other = reports(chosen, ctnet.build(arch, weights), reference)
    assert not other.passed, other.text()
    if mistake != "a layer 1.01 times too large":  # which keeps the directions of vectors
        assert not trained.passed, trained.text()


# ------------------------------------------------------------------------------------------------ settings and the card


def test_planning_can_ask_for_the_box_by_name():
    assert box_of_encoder("ctnet") == (402, 420, 0.8)
    assert box_of_encoder("dinov3-vits16") is None
    assert box_of_encoder("nobody") is None
    spec = resolve(SETTINGS)
    assert spec.input == (402, 420, 420)
    assert (spec.view.dtype, spec.view.depth) == ("int16", 402)
    assert tuple(spec.outputs) == OUTPUTS
    assert View.from_record(spec.view.record()) == spec.view
    (listed,) = [each for each in known() if each.name == "ctnet"]
    assert listed.tile == "boxes of 402 x 420 x 420 voxels of 0.8 mm"
    assert listed.precisions == ("fp32", "fp16", "bf16")
    assert "publishes no weights" in listed.found


def test_what_it_does_not_have_is_refused_by_name():
    window = Intensity(windows=((0.0, 1.0),))
    for given, error, says in (
        ({"pixels": 224}, EncoderError, "--pixels: ctnet cannot take 224 px; leave it at 420, its only size"),
        ({"tokens": True}, EncoderError, "--tokens: ctnet gives vectors of whole volumes, and no dense features"),
        ({"precision": "int8"}, EncoderError, "--precision: ctnet has no int8 graph; use auto or fp32, fp16, bf16"),
        ({"slab": 3}, UsageError, "--slab: this encoder takes boxes of Hounsfield units; leave it out"),
        ({"intensity": window}, UsageError, "--intensity: this encoder takes Hounsfield units as they are"),
    ):
        with pytest.raises(error) as caught:
            resolve(replace(SETTINGS, **given))
        assert says in str(caught.value)
    with pytest.raises(EncoderError, match="publishes no weights"):
        resolve(replace(SETTINGS, untrained=None))


def test_tensorrt_has_no_int16_and_takes_the_rest(chosen, small):
    for precision in ("fp32", "fp16"):
        model = ctnet.build(chosen.architecture, small[1], precision=precision)
        assert tensorrt_findings(model.float_first()) == ["int16 input (pixels)"]
        for value in model.proto.graph.input:  # the same of a type that it has
            value.type.tensor_type.elem_type = 10  # fp16
        assert tensorrt_findings(model.float_first()) == []


YAML = """
name: {name}
title: A small CT-Net
license: ours
architecture: {{family: ctnet, slices: {slices}, pixels: 192, depths: [2, 1, 1, 1], widths: {widths},
  reduced: [7, 6, 5], hidden: [9, 8], eps: 1.0e-5, hounsfield: {hounsfield}, centre: {centre}}}
pixels: {pixels}
outputs: {{{outputs}}}
expects: {{{expects}}}
weights: {{obtain: train it}}
"""


def yaml(**facts):
    usual = {
        "name": "mine",
        "slices": 12,
        "widths": "[8, 16, 32, 64]",
        "hounsfield": "[-1000, 200]",
        "centre": 0.449,
        "pixels": 192,
        "outputs": "penultimate: 8, features: 10",
        "expects": "spacing: 0.8",
    }
    return YAML.format(**{**usual, **facts})


def test_a_card_of_ones_own_is_read_and_contradictions_are_told(monkeypatch, tmp_path):
    (tmp_path / "mine.yaml").write_text(yaml())
    monkeypatch.setenv("PATCHMILL_ENCODERS", str(tmp_path))
    assert box_of_encoder("mine") == (12, 192, 0.8)
    assert untrained(card("mine").architecture, 0)["reduce.0.weight"].shape == (7, 4, 3, 3, 3)
    for facts, says in (
        ({"slices": 13}, "architecture.slices: a multiple of 3"),
        ({"pixels": 224}, "pixels: 192, as in the architecture"),
        ({"widths": "[8, 16, 32, 8]"}, "architecture: too few pixels, or channels"),
        ({"widths": "[8, 16, 32, 0]"}, "architecture.widths: 1 to"),
        ({"hounsfield": "[-2000, 200]"}, "architecture.hounsfield: two ends within -1024"),
        ({"hounsfield": "[200, -1000]"}, "architecture.std: greater than 0"),
        ({"centre": ".nan"}, "finite"),
        ({"outputs": "cls: 8"}, "outputs.cls: the widths are {'penultimate': 8, 'features': 10}"),
        ({"expects": "tile: 3"}, "expects.spacing: of an encoder of boxes"),
        ({"expects": "spacing: 0"}, "expects.spacing: greater than 0"),
    ):
        with pytest.raises(EncoderError, match="is no encoder") as caught:
            read_card("mine.yaml", yaml(**facts))
        assert says in str(caught.value)
    flat = yaml().replace("family: ctnet", "family: onnx, mean: [0, 0, 0], std: [1, 1, 1]")
    with pytest.raises(EncoderError, match="is no encoder"):
        read_card("flat.yaml", flat)
