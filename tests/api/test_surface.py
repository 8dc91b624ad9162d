"""The public surface: small, sorted, lazy, and the same for type checkers as at run time."""

import ast
import inspect
import pickle
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import patchmill
from patchmill import api, errors

HEAVY = ("dask", "distributed", "faiss", "numba", "onnx", "onnxruntime", "openslide", "sklearn", "torch", "zarr")


def in_a_fresh_interpreter(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_all_is_sorted_and_says_everything():
    assert patchmill.__all__ == sorted(set(patchmill.__all__))
    assert set(patchmill.__all__) == set(patchmill._HOME)
    assert dir(patchmill) == patchmill.__all__


@pytest.mark.parametrize("name", patchmill.__all__)
def test_every_name_resolves_and_is_documented(name):
    value = getattr(patchmill, name)
    assert value is getattr(import_module(patchmill._HOME[name]), name)
    assert inspect.getdoc(value)


def test_every_verb_of_the_api_is_public():
    functions = {name for name in api.__all__ if inspect.isfunction(getattr(api, name))}
    assert functions == {name for name, home in patchmill._HOME.items() if home == "patchmill.api"}
    assert api.__all__ == sorted(api.__all__)


def test_type_checkers_are_told_the_same_homes():
    tree = ast.parse(Path(patchmill.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    told = {alias.name: node.module for node in block.body for alias in node.names}
    assert told == patchmill._HOME


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'patchmill' has no attribute 'embedd'"):
        patchmill.embedd  # noqa: B018


def test_importing_loads_nothing_heavy():
    loaded = in_a_fresh_interpreter("import sys, patchmill; print(*sorted(sys.modules))").split()
    assert "patchmill" in loaded
    assert not {name.partition(".")[0] for name in loaded} & {*HEAVY, "numpy", "typer"}


def test_help_loads_no_runtime():
    code = "import sys; from patchmill.cli import main; main(['embed', '--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Usage: patchmill embed" in done.stdout
    assert not {name.partition(".")[0] for name in done.stderr.split()} & set(HEAVY)


def test_names_load_on_first_use():
    show = "print('zarr' in sys.modules)"
    code = f"import sys, patchmill; patchmill.PlanSettings(); {show}; patchmill.Archive; {show}"
    assert in_a_fresh_interpreter(code).split() == ["False", "True"]


def tree(kind: type) -> list[type]:
    return [kind, *(each for child in kind.__subclasses__() for each in tree(child))]


def test_the_tree_of_errors_is_public_and_documented():
    ours = {kind for kind in tree(errors.PatchmillError) if kind.__module__ == "patchmill.errors"}
    assert {kind.__name__ for kind in ours} == set(errors.__all__)
    assert errors.__all__ == sorted(errors.__all__)
    assert all(f" {name} " in f" {errors.__doc__} ".replace("\n", " ") for name in errors.__all__)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", errors.__all__)
def test_errors_survive_the_way_back_from_a_worker(name, protocol):
    error = getattr(errors, name)("--mpp", "0 is no resolution", "use 0.5")
    again = pickle.loads(pickle.dumps(error, protocol))
    assert type(again) is type(error)
    assert (again.where, again.wrong, again.do) == ("--mpp", "0 is no resolution", "use 0.5")
    assert str(again) == str(error) == "--mpp: 0 is no resolution; use 0.5"
