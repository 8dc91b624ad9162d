"""For all tests: what the machine remembers is theirs alone."""

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """A gate that one test has passed need not be repeated by the next; worker processes inherit the place."""
    before = os.environ.get("PATCHMILL_CACHE")
    os.environ["PATCHMILL_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["PATCHMILL_CACHE"]
    else:
        os.environ["PATCHMILL_CACHE"] = before
