"""What all commands share: printing a result for a person or for a program."""

import json
from collections.abc import Callable
from typing import Annotated, Any

import typer

__all__ = ["Json", "show", "shown"]

Json = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout and nothing else there")]


def shown(name: str) -> str:
    """A name for a terminal, in one line: what would steer it, or cannot be encoded, is escaped."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in name)


def show(value: Any, text: Callable[[], str], as_json: bool) -> None:
    """Print a result for a program or for a person."""
    print(json.dumps(value) if as_json else text())
