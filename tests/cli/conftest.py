"""The command line in this process, two stained slides, and an archive of them that tests copy."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from patchmill.archive import Archive
from patchmill.cli import main
from patchmill.testing.slides import FormulaSlide, write_pyramid

ENCODER = ("--encoder", "efficientnet-lite0", "--workers", "0")
REAL = Path(__file__).parents[2].parent / "shared" / "data" / "CMU-1-Small-Region.svs"


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The only line on stderr; nothing is on stdout."""
        (line,) = self.err.splitlines()
        assert self.out == ""
        assert line.startswith("patchmill: ")
        return line


@pytest.fixture
def patchmill(capfd):
    """Runs one command and returns its exit code, stdout and stderr."""
    mask = os.umask(0o022)

    def run(*argv: object) -> Ran:
        capfd.readouterr()
        code = main([str(each) for each in argv])
        return Ran(code, *capfd.readouterr())

    yield run
    os.umask(mask)


@pytest.fixture
def embed(patchmill):
    """Runs `embed` with the encoder whose weights can be installed, in this process."""

    def run(archive: Path, *argv: object) -> Ran:
        return patchmill("embed", *argv, "--archive", archive, *ENCODER)

    return run


@pytest.fixture(scope="session")
def slides(tmp_path_factory):
    """A folder of two slides, of 22 and 21 tiles."""
    folder = tmp_path_factory.mktemp("slides")
    write_pyramid(folder / "a.tif", FormulaSlide(1344, 1120, 0.5, (1, 4)))
    write_pyramid(folder / "b.tif", FormulaSlide(1120, 1120, 0.5, (1, 4), seed=7))
    return folder


@pytest.fixture(scope="session")
def made(slides, tmp_path_factory):
    """An archive of the two slides; copy it before changing it."""
    archive = tmp_path_factory.mktemp("made") / "archive"
    assert main(["embed", str(slides), "--archive", str(archive), *ENCODER]) == 0
    return archive


@pytest.fixture
def archive(made, tmp_path):
    """A copy of the archive of the two slides."""
    return copied(made, tmp_path)


def copied(archive: Path, folder: Path) -> Path:
    for name in ("archive", "archive.private"):
        shutil.copytree(archive.with_name(name), folder / name)
    return folder / "archive"


@pytest.fixture(scope="session")
def copy():
    return copied


@pytest.fixture(scope="session")
def digests():
    """Of an archive: source id -> the digest of its only embedding, None if it is not complete."""

    def read(archive: Path) -> dict[str, str | None]:
        opened = Archive.open(archive)
        stores = {source: opened.source(source) for source in opened.source_ids()}
        done = {source: [store.completion(*pair) for pair in store.embedded()] for source, store in stores.items()}
        return {source: completions[0].digest if completions else None for source, completions in done.items()}

    return read


@pytest.fixture
def real_slide():
    if not REAL.is_file():
        pytest.skip("the real slide is not here")
    return REAL
