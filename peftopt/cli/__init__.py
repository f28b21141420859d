"""The command line. Each verb parses, calls one function, prints. Heavy imports stay inside the verbs."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated

import typer

from peftopt import __version__
from peftopt.cli.shared import app
from peftopt.errors import (
    BAD_INPUT,
    BUG,
    CLOSED_PIPE,
    ENVIRONMENT,
    INTERRUPTED,
    SYSTEM,
    BadRecipe,
    PeftoptError,
    unusable,
)

VERBS = (
    "job",
    "compare",
    "gate",
    "merge",
    "bake",
    "quantize",
    "compile",
    "bench",
    "load",
    "serve",
    "adapters",
    "watch",
    "export",
    "canary",
    "diagnose",
    "sweep",
    "importing",
    "around",
    "kept",
    "data",
    "schema",
    "env",
)
"""The files of verbs, in the order of --help."""

for _module in VERBS:
    importlib.import_module(f"peftopt.cli.{_module}")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"peftopt {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the verb."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; every PeftoptError becomes its message and its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # half a character of a server's cannot be printed
        sys.stdout.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a CI timeout is an interrupt like Ctrl-C
    as_json = "--json" in (sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(arguments, standalone_mode=False)
    except PeftoptError as error:
        code = _told(error, as_json)
    except (KeyboardInterrupt, typer.Abort):
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # who asks again does not wait for the end of threads
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        code = _failed(INTERRUPTED, "interrupted", as_json)
    except SystemExit as ended:  # so typer and rich end where nobody reads on, with the code of a rejection
        code = CLOSED_PIPE if isinstance(ended.__context__, BrokenPipeError) else ended.code
    except Exception as error:  # noqa: BLE001 (the last resort, so that a bug has its own exit code)
        code = _unexpected(error, as_json)
    if code == INTERRUPTED:  # typer may have made an exit code of the interrupt already
        with _perhaps_unread():
            print("interrupted", file=sys.stderr)
    sys.exit(_read_to_its_end(code or 0))


def _read_to_its_end(code: int | str) -> int | str:
    """The exit code, once all that was printed has been taken. CLOSED_PIPE where nobody reads on, ENVIRONMENT where the
    disk takes no more. What a full disk does not take of errors is lost."""
    nothing = open(os.devnull, "w")  # noqa: PTH123, SIM115 (for the interpreter's own flush at its end)
    try:
        sys.stdout.flush()
    except OSError as error:
        sys.stdout = nothing
        if isinstance(error, BrokenPipeError):
            code = CLOSED_PIPE
        elif code != ENVIRONMENT:  # which was told already
            code = _told(unusable(error), as_json=False)
    try:
        sys.stderr.flush()
    except OSError:
        sys.stderr = nothing
    return code


def _told(error: PeftoptError, as_json: bool) -> int:
    """Say what is wrong and what to do, to people, and with --json to programs; the exit code."""
    from peftopt.cli.console import Console, print_error

    with _perhaps_unread():
        Console().error(error)
    if as_json:
        problems = error.problems if isinstance(error, BadRecipe) else ()
        with _perhaps_unread():
            print_error(error.exit_code, error.message, error.hint, problems)
    return error.exit_code


@contextlib.contextmanager
def _perhaps_unread() -> Iterator[None]:
    """Say something on an output that may take no more: the exit code says it all the same."""
    with contextlib.suppress(OSError, SystemExit):
        yield


def _failed(exit_code: int, message: str, as_json: bool) -> int:
    """The exit code; with --json, programs are told the message too."""
    if as_json:
        from peftopt.cli.console import print_error

        with _perhaps_unread():
            print_error(exit_code, message)
    return exit_code


def _unexpected(error: Exception, as_json: bool) -> int:
    """Usage errors are the user's (2); a broken pipe is the reader's; a full or forbidden disk is the machine's (4);
    anything else is a bug (5)."""
    import traceback

    from peftopt.cli.console import print_text

    usage_error = typer.BadParameter.__base__  # typer carries its own click, and does not export the class
    if usage_error and isinstance(error, usage_error):
        error.show(told := io.StringIO())  # type: ignore[attr-defined]
        with _perhaps_unread():
            print_text(told.getvalue(), end="", stderr=True)
        return _failed(BAD_INPUT, error.format_message(), as_json)  # type: ignore[attr-defined]
    if isinstance(error, BrokenPipeError):
        return CLOSED_PIPE
    if isinstance(error, OSError) and error.errno in SYSTEM:
        return _told(unusable(error), as_json)
    with _perhaps_unread():
        print_text("".join(traceback.format_exception(error)), end="", stderr=True)
        print("this is a bug in peftopt; please report it with the lines above", file=sys.stderr)
    return _failed(BUG, f"a bug: {type(error).__name__}: {error}", as_json)
