"""Plans for encoders that take a volume whole, and refusals where plan and encoder do not fit."""

from dataclasses import replace

import pytest

from patchmill.api import choosing
from patchmill.api.choosing import boxed
from patchmill.archive.records import settings_from, settings_record
from patchmill.cluster.run import _check_view
from patchmill.errors import UsageError
from patchmill.testing.encoders import null_spec
from patchmill.types import PlanSettings, View, VolumeSettings

BOX = VolumeSettings(slices=12, tile=16, spacing=1.0)
FLAT, DEEP = null_spec(View(pixels=16)), null_spec(View(pixels=16, dtype="int16", depth=12))


@pytest.fixture(autouse=True)
def one_encoder_of_boxes(monkeypatch):
    monkeypatch.setattr(choosing, "box_of_encoder", lambda name: (12, 16, 1.0) if name == "deep" else None)


def test_the_encoder_decides_its_plan():
    assert boxed(VolumeSettings(tissue="none"), "deep") == VolumeSettings(
        slices=12, tile=16, spacing=1.0, tissue="none"
    )
    assert boxed(BOX, "deep") is BOX
    for settings in (VolumeSettings(every=3), PlanSettings()):
        assert boxed(settings, "flat") is settings


def test_a_box_is_nothing_for_an_encoder_of_pictures_and_another_box_nothing_for_its_own():
    with pytest.raises(UsageError, match="--encoder: flat takes pictures, and the plan is a box"):
        boxed(BOX, "flat")
    with pytest.raises(UsageError, match="--slices: deep takes each volume as one box of 12 x 16 x 16 voxels of 1 mm"):
        boxed(VolumeSettings(slices=9, tile=16, spacing=1.0), "deep")


def test_a_run_refuses_what_does_not_fit_whoever_chose_it():
    _check_view(BOX, DEEP)
    _check_view(VolumeSettings(), FLAT)
    for settings, spec in (
        (BOX, FLAT),
        (VolumeSettings(), DEEP),
        (replace(BOX, tile=20), DEEP),
    ):
        with pytest.raises(UsageError, match=r"--encoder: null takes .*, and the plan is: "):
            _check_view(settings, spec)


def test_a_plan_without_a_box_is_stored_as_it_was():
    assert "slices" not in settings_record(VolumeSettings())
    for settings in (VolumeSettings(), BOX):
        assert settings_from(settings_record(settings)) == settings
