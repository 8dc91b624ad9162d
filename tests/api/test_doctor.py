"""What doctor finds: nothing wrong here, and everything that would be wrong elsewhere."""

import sys

import pytest

from patchmill import api
from patchmill.api import diagnosis

HERE = dict.fromkeys(diagnosis.NEEDED, "1.0")


@pytest.fixture
def installed(monkeypatch):
    """Makes these distributions the installed ones, and gives what is found wrong then, by name."""

    def wrong(found: dict[str, str]) -> dict[str, api.Finding]:
        monkeypatch.setattr(diagnosis, "installed", lambda: found)
        return {finding.name: finding for finding in api.doctor() if finding.state == "wrong"}

    return wrong


def test_nothing_is_wrong_here():
    findings = api.doctor()
    assert [finding for finding in findings if finding.state == "wrong"] == []
    assert {*diagnosis.NEEDED, "python", "OpenSlide library", "providers"} <= {finding.name for finding in findings}
    assert all(finding.text and "\n" not in finding.text + finding.do for finding in findings)


def test_every_encoder_is_found_or_named_as_missing():
    findings = {finding.name: finding for finding in api.doctor()}
    missing = findings["weights"].text.removeprefix("not found for ").split(", ")
    assert findings["weights"].state == "note"
    for card in api.list_encoders():
        assert (card.name in missing) == (card.weights is None)
        assert (card.name in findings) == (card.weights is not None)
        if card.weights is not None:
            assert findings[card.name].state == "ok"
            assert card.found in findings[card.name].text


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("onnxruntime", ["onnxruntime", "onnxruntime-gpu"]),
        ("onnxruntime", ["onnxruntime-gpu", "onnxruntime-openvino"]),
        ("faiss", ["faiss-cpu", "faiss-gpu-cuvs"]),
    ],
)
def test_two_builds_of_one_module_are_wrong_and_both_are_named(installed, module, names):
    wrong = installed({**HERE, **dict.fromkeys(names, "1.0")})
    assert module in wrong
    text = wrong[module].text + wrong[module].do
    assert all(name in text.split() or f"{name}," in text.split() for name in names)
    assert "pip uninstall" in wrong[module].do


def test_one_build_is_enough_whichever_it_is(installed):
    others = {name: "1.0" for name in HERE if name != "onnxruntime"}
    assert installed({**others, "onnxruntime-gpu": "1.0"}) == {}


@pytest.mark.parametrize("name", diagnosis.NEEDED)
def test_a_missing_package_is_named(installed, name):
    wrong = installed({other: "1.0" for other in HERE if other != name})
    assert wrong.keys() == {name}
    assert "not installed" in wrong[name].text
    assert wrong[name].do


def test_two_owners_of_patchmill_are_named(monkeypatch):
    owners = {"patchmill": ["patchmill", "patchmill-fork", "patchmill"]}
    monkeypatch.setattr(diagnosis, "packages_distributions", lambda: owners)
    (finding,) = [finding for finding in api.doctor() if finding.state == "wrong"]
    assert "patchmill, patchmill-fork" in finding.text
    assert finding.do == "uninstall all but one"


def test_an_openslide_that_cannot_be_loaded_is_wrong(monkeypatch):
    monkeypatch.setitem(sys.modules, "openslide", None)  # as if its import failed
    (finding,) = [finding for finding in api.doctor() if finding.state == "wrong"]
    assert (finding.name, finding.do) == ("OpenSlide library", "pip install openslide-bin")


def test_a_gpu_that_no_runtime_can_use_is_noted(monkeypatch):
    monkeypatch.setattr(diagnosis.runtimes, "gpus", lambda: 2)
    monkeypatch.setattr(diagnosis.runtimes, "gpu", lambda: diagnosis.runtimes.Gpu("Some GPU", "13.0"))
    monkeypatch.setattr(diagnosis.runtimes, "missing", lambda runtime: f"no {runtime}")
    told = {finding.name: finding for finding in api.doctor() if finding.name.startswith(("GPU", "runtime"))}
    assert told["runtime torch"].text == "no torch"
    assert (told["GPU"].state, told["GPU"].text) == ("note", "encoders will run on the CPU")
    monkeypatch.setattr(diagnosis.runtimes, "missing", lambda runtime: "" if runtime == "torch" else "lacking")
    (finding,) = [finding for finding in api.doctor() if finding.name == "GPU"]
    assert (finding.state, finding.text) == ("ok", "2 of Some GPU, CUDA 13.0")


def test_a_full_temporary_folder_is_noted(monkeypatch):
    usage = diagnosis.shutil.disk_usage("/")
    monkeypatch.setattr(diagnosis.shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    (finding,) = [finding for finding in api.doctor() if finding.name == "temporary folder"]
    assert (finding.state, finding.text) == ("note", "1 MiB free")
    assert "TMPDIR" in finding.do
