"""Which runtime is taken, and that nothing else runs in its place."""

import sys
from types import SimpleNamespace

import pytest

from patchmill.encoders import open_encoder, opening, runtimes, vit
from patchmill.encoders.runtimes import missing, runtime_for
from patchmill.encoders.session import open_session
from patchmill.errors import EncoderError
from patchmill.types import EncodeSettings


@pytest.fixture
def here(monkeypatch):
    """Makes a machine with GPUs, and with what each runtime lacks."""

    def make(gpus=1, **lacking):
        monkeypatch.setattr(runtimes, "gpus", lambda: gpus)
        monkeypatch.setattr(runtimes, "missing", lambda runtime: lacking.get(runtime, ""))

    return make


@pytest.mark.parametrize(
    ("lacking", "precision", "taken"),
    [
        ({}, "auto", "torch"),
        ({"torch": "not installed"}, "auto", "cuda"),
        ({"torch": "not installed", "cuda": "other build"}, "auto", "cpu"),
        ({}, "fp16", "torch"),
        ({}, "int8", "cpu"),  # the one that has it
        ({"torch": "not installed"}, "bf16", None),  # which the others lack
    ],
)
def test_auto_takes_the_first_that_is_ready_and_has_the_precision(here, lacking, precision, taken):
    here(**lacking)
    if taken is None:
        with pytest.raises(EncoderError, match="bf16 cannot run here"):
            runtime_for("auto", precision)
    else:
        assert runtime_for("auto", precision)[0] == taken


def test_a_gpu_that_stays_idle_is_told(here):
    here(torch="torch is not installed", cuda="this is the other build")
    assert runtime_for("auto", "auto") == (
        "cpu",
        ", the GPU is not used (torch: torch is not installed; cuda: this is the other build)",
    )
    here(gpus=0, torch="no GPU", cuda="no GPU")
    assert runtime_for("auto", "auto") == ("cpu", "")


@pytest.mark.parametrize("runtime", ["torch", "cuda", "tensorrt"])
def test_what_was_asked_for_and_is_not_here_is_an_error(here, runtime):
    here(**{runtime: "it lacks something"})
    with pytest.raises(EncoderError, match=f"{runtime} cannot run here: it lacks something"):
        open_encoder(EncodeSettings(untrained=0, precision="fp16", runtime=runtime))
    here()
    with pytest.raises(EncoderError, match=f"int8 does not run on {runtime}"):
        open_encoder(EncodeSettings(untrained=0, precision="int8", runtime=runtime))


def test_what_a_runtime_lacks_is_named(monkeypatch):
    monkeypatch.setattr(runtimes, "gpus", lambda: 0)
    assert missing("cpu") == ""
    assert missing("torch") == missing("cuda") == "there is no NVIDIA GPU here"
    monkeypatch.setattr(runtimes, "gpus", lambda: 1)
    monkeypatch.setattr(runtimes.onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert missing("cuda") == "this ONNX Runtime has no CUDAExecutionProvider"
    monkeypatch.setattr(runtimes.onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    assert missing("cuda") == ""
    fake = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False))
    monkeypatch.setitem(sys.modules, "torch", fake)
    monkeypatch.setattr(runtimes, "find_spec", lambda name: object())
    assert "without CUDA" in missing("torch")
    fake.cuda.is_available = lambda: True
    assert missing("torch") == ""
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    assert missing("torch") == "torch is not installed"


def test_a_gpus_precisions_are_tried_from_the_fastest_on(here):
    asked = EncodeSettings(untrained=0)
    tried = [precision for precision, _ in opening._precisions_to_try(asked, "torch")]
    assert tried == ["fp16", "bf16", "fp32"]
    lite = EncodeSettings(encoder="efficientnet-lite0", untrained=0)
    assert [precision for precision, _ in opening._precisions_to_try(lite, "torch")] == ["fp32"]


@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
@pytest.mark.parametrize("provider", ["CUDAExecutionProvider", "TensorrtExecutionProvider"])
def test_a_provider_that_falls_back_is_refused_by_name(small, small_weights, provider):
    """ONNX Runtime itself, here without that provider, takes the CPU and only warns."""
    model = vit.build(small.architecture, small_weights, 32)
    with pytest.raises(EncoderError, match=r"ONNX Runtime refuses|was asked for"):
        open_session(small.name, model, [(provider, {})], alone=True)


def test_the_driver_is_asked_and_may_be_absent(monkeypatch):
    class Driver:
        def cuInit(self, flags):  # noqa: N802
            return 0

        def cuDeviceGetCount(self, count):  # noqa: N802
            count._obj.value = 3
            return 0

    def absent(name):
        raise OSError(name)

    for library, count in ((lambda name: Driver(), 3), (absent, 0)):
        runtimes.gpus.cache_clear()
        monkeypatch.setattr(runtimes.ctypes, "CDLL", library)
        assert runtimes.gpus() == count
    runtimes.gpus.cache_clear()
