"""A gate that was passed on this machine is not repeated, and nothing else is taken for it."""

from dataclasses import replace
from pathlib import Path

import pytest

from patchmill import api
from patchmill.encoders import open_gated, opening, session, vit
from patchmill.encoders.graph import Graph
from patchmill.errors import EncoderError
from patchmill.types import EncodeSettings

SETTINGS = EncodeSettings(encoder="efficientnet-lite0", precision="fp32", threads=1, pixels=32)


@pytest.fixture
def judged(monkeypatch) -> list[str]:
    """Names of the encoders that were judged."""
    names: list[str] = []
    real = opening.judge

    def judge(encoder, reference, why=""):
        names.append(encoder.spec.name)
        return real(encoder, reference, why)

    monkeypatch.setattr(opening, "judge", judge)
    return names


def opened(settings: EncodeSettings, **options):
    encoder, report = open_gated(settings, **options)
    encoder.close()
    return report


def test_the_second_start_takes_the_first_ones_word(judged):
    first, second = opened(SETTINGS), opened(replace(SETTINGS, batch=3))
    assert judged == ["efficientnet-lite0"]
    assert second == first


def test_whatever_could_change_the_numbers_is_judged_anew(judged, monkeypatch):
    opened(SETTINGS)
    for changed in (replace(SETTINGS, pixels=64), replace(SETTINGS, threads=2), replace(SETTINGS, untrained=1)):
        judged.clear()
        opened(changed)
        assert judged, changed
    with monkeypatch.context() as patch:
        patch.setattr(session, "cpu_instructions", lambda: "avx2")  # of the same model, in a virtual machine
        judged.clear()
        opened(SETTINGS)
        assert judged
    judged.clear()
    real = Graph.finish

    def finish(self, inputs, outputs):
        model = real(self, inputs, outputs)
        model.proto.graph.doc_string = "another author"
        return model

    monkeypatch.setattr(Graph, "finish", finish)
    opened(SETTINGS)
    assert judged


def test_a_check_that_was_asked_for_is_made(judged):
    opened(SETTINGS)
    api.check_encoder(SETTINGS)
    assert len(judged) == 2


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]", b'{"encoder": 3', b"\xff\xfe", b"[" * 200_000])
def test_a_damaged_report_is_made_anew(damage, judged, tmp_path):
    opened(SETTINGS)
    (file,) = (tmp_path / "cache" / "gates").iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage)
    opened(SETTINGS)
    assert len(judged) == 2
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert len(file.read_bytes()) > len(whole) // 2


def test_a_report_that_says_something_else_is_made_anew(judged, tmp_path):
    opened(SETTINGS)
    (file,) = (tmp_path / "cache" / "gates").iterdir()
    for old, new in ((b'"passed": true', b'"passed": "no"'), (b'"passed": true', b'"passed": false')):
        whole = file.read_bytes()
        assert old in whole
        file.write_bytes(whole.replace(old, new))
        opened(SETTINGS)
    assert len(judged) == 3


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(judged, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("PATCHMILL_CACHE", str(tmp_path / "file"))
    opened(SETTINGS)
    opened(SETTINGS)
    assert len(judged) == 2


def test_what_was_refused_is_not_remembered(judged, monkeypatch, tmp_path):
    real = vit._rope_contrib
    monkeypatch.setattr(vit, "_rope_contrib", lambda author, x: real(author, x) if x.endswith(".k") else x)
    settings = EncodeSettings(encoder="dinov3-vits16", precision="fp32", untrained=0, threads=1, pixels=32)
    for _ in range(2):
        with pytest.raises(EncoderError, match="the gate refuses fp32"):
            opened(settings)
    assert len(judged) == 2
    assert not (tmp_path / "cache").exists()


def test_it_lies_where_the_system_keeps_such_things(monkeypatch, tmp_path):
    monkeypatch.delenv("PATCHMILL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    opened(SETTINGS)
    (file,) = (tmp_path / "xdg" / "patchmill" / "gates").iterdir()
    assert file.stat().st_mode & 0o077 == 0
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    opened(SETTINGS)
    assert list((Path.home() / ".cache" / "patchmill" / "gates").iterdir())
