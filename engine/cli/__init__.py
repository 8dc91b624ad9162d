"""The command line: arguments and printing, no logic. Exit codes: 0 all done, 1 some sources failed, 2 wrong usage."""

import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["main", "script"]

INTERRUPTED = 130  # the shell's code for Ctrl-C
ENDING = 10.0  # seconds after a Ctrl-C in which no other is heard, so that what it has stopped ends in order


def script() -> int:
    """The console command: `main`, in a process that hears one Ctrl-C and then ends in order; returns its exit code."""
    hears = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # nohup and the like ignore it
    if hears:
        signal.signal(signal.SIGINT, _interrupts())
    code = main()
    if hears:  # Python's own end would answer a further one with a traceback
        signal.signal(signal.SIGINT, signal.SIG_IGN if code == INTERRUPTED else signal.default_int_handler)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. argv: the arguments after the program's name, sys.argv's by default."""
    try:
        return _run(argv)
    except KeyboardInterrupt:
        return _say("stopped; all that was acknowledged is kept, and the same command goes on from there", INTERRUPTED)


def _interrupts() -> Callable[[int, Any], None]:
    """A handler that raises KeyboardInterrupt, but not again within ENDING; later it does, as one may get lost."""
    heard = -ENDING

    def interrupt(number: int, frame: Any) -> None:
        nonlocal heard
        if time.monotonic() - heard >= ENDING:
            heard = time.monotonic()
            raise KeyboardInterrupt

    return interrupt


def _run(argv: Sequence[str] | None) -> int:
    """Run one command; returns its exit code. Raises KeyboardInterrupt."""
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
        sys.stdout.flush()  # what fails only when Python ends is a traceback
        return code
    except TyperException as error:  # the parser's own errors
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "patchmill"
        return _say(f"{error.format_message().rstrip('.')}; see {command} --help", 2)
    except NoSpaceError as error:
        return _say(str(error), 1)
    except PatchmillError as error:
        return _say(str(error), 2)
    except OSError as error:
        if error.filename is not None or not _stdout_fails():
            if error.errno not in NoSpaceError.FULL:
                raise
            return _say(str(NoSpaceError.of(str(error.filename or "a file"), error)), 1)
        if isinstance(error, BrokenPipeError):  # whoever read it has seen enough
            return 1
        wrong = f"cannot be written ({errno.errorcode.get(error.errno or 0, type(error).__name__)})"
        return _say(f"stdout: {wrong}; see to its disk, what was done is kept", 1)
    except typer.Abort as error:
        raise KeyboardInterrupt from error


def _stdout_fails() -> bool:
    """Whether stdout takes not even an empty line. What it holds is dropped then: Python would try it once more."""
    try:
        print(flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _say(line: str, code: int) -> int:
    from patchmill.cli.common import shown

    print(f"patchmill: {shown(' '.join(line.split()))}", file=sys.stderr)
    return code
