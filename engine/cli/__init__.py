"""The command line: arguments and printing, no logic. Exit codes: 0 all done, 1 some sources failed, 2 wrong usage."""

import os
import sys
from collections.abc import Sequence

__all__ = ["main"]

INTERRUPTED = 130  # the shell's code for Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. argv: the arguments after the program's name, sys.argv's by default."""
    import typer
    from typer.exceptions import TyperException

    from patchmill.cli.app import app
    from patchmill.errors import NoSpaceError, PatchmillError

    os.umask(0o077)  # an archive is personal data
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        code = app(arguments, prog_name="patchmill", standalone_mode=False) or 0
        if code == INTERRUPTED:  # what the parser makes of a KeyboardInterrupt
            raise KeyboardInterrupt
        return code
    except TyperException as error:  # the parser's own errors
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "patchmill"
        return _say(f"{error.format_message().rstrip('.')}; see {command} --help", 2)
    except NoSpaceError as error:
        return _say(str(error), 1)
    except PatchmillError as error:
        return _say(str(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        return _say("stopped; all that was acknowledged is kept, and the same command goes on from there", INTERRUPTED)


def _say(line: str, code: int) -> int:
    from patchmill.cli.common import shown

    print(f"patchmill: {shown(' '.join(line.split()))}", file=sys.stderr)
    return code
