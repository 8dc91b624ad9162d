"""Data flows one way: the imports keep the contracts of pyproject.toml, and a planted breach of each one is caught."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

TOP = Path(__file__).parents[1]
CONTRACTS = tomllib.loads((TOP / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
BREACHES = {  # contract -> a module, and what it must not import
    "data flows one way": ("patchmill/archive/planted.py", "patchmill.api"),
    "kernels import nothing of ours": ("patchmill/kernels/planted.py", "patchmill.types"),
    "encoders and the archive never read pixels from files": ("patchmill/encoders/planted.py", "patchmill.sources"),
    "sources never know models": ("patchmill/sources/planted.py", "patchmill.encoders"),
    "readers of one kind of source know nothing of the others": (
        "patchmill/sources/volumes/planted.py",
        "patchmill.sources.slides.tiff",
    ),
    "the index reads the archive alone": ("patchmill/index/planted.py", "patchmill.sources"),
    "a query embeds and reads tiles, but runs no pipeline": ("patchmill/query/planted.py", "patchmill.stream"),
    "probes read embeddings alone": ("patchmill/probes/planted.py", "patchmill.encoders"),
}


@pytest.fixture
def tree(tmp_path):
    """A copy of the packages under their import names, as tests/lint.sh links them."""
    junk = shutil.ignore_patterns("__pycache__")
    shutil.copytree(TOP / "engine", tmp_path / "patchmill", ignore=junk)
    (linked,) = re.findall("for name in ([^;]+); do", (TOP / "tests" / "lint.sh").read_text())
    for name in linked.split():
        shutil.copytree(TOP / name, tmp_path / "patchmill" / name, ignore=junk)
    return tmp_path


def lint(tree: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("lint-imports")
    command = [program, "--config", TOP / "pyproject.toml", "--no-cache"]
    env = {**os.environ, "PYTHONPATH": ".", "COLUMNS": "200"}
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, check=False)


def test_the_tree_as_it_is_keeps_every_contract(tree):
    done = lint(tree)
    assert done.returncode == 0, done.stdout
    assert f"{len(CONTRACTS)} kept, 0 broken" in done.stdout


def test_every_contract_catches_a_planted_import(tree):
    assert BREACHES.keys() == {contract["name"] for contract in CONTRACTS}
    for module, forbidden in BREACHES.values():
        (tree / module).write_text(f'"""Planted."""\n\nimport {forbidden}\n')
    done = lint(tree)
    assert done.returncode == 1
    for name, (module, forbidden) in BREACHES.items():
        planted = module.removesuffix(".py").replace("/", ".")
        assert f"{name} BROKEN" in done.stdout
        assert f"{planted} -> {forbidden}" in done.stdout


def test_one_forbidden_import_breaks_its_contract_and_names_it(tree):
    (tree / "patchmill" / "sources" / "planted.py").write_text(
        '"""Planted."""\n\nfrom patchmill.encoders import known\n'
    )
    done = lint(tree)
    assert done.returncode == 1
    assert "sources never know models BROKEN" in done.stdout
    assert "patchmill.sources.planted -> patchmill.encoders" in done.stdout
