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
    if isinstance(sys.stdout, io.TextIOWrapper):  # a server may send half a character, which no stream takes
        sys.stdout.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a CI timeout is an interrupt like Ctrl-C
    as_json = "--json" in (sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(arguments, standalone_mode=False)
    except PeftoptError as error:
        code = _report(error, as_json)
    except (KeyboardInterrupt, typer.Abort):
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends at once, threads or not
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        code = _report_as_json(INTERRUPTED, "interrupted", as_json)
    except SystemExit as ended:  # typer and rich end so on a closed pipe, with code 1
        code = CLOSED_PIPE if isinstance(ended.__context__, BrokenPipeError) else ended.code
    except Exception as error:  # noqa: BLE001 (the last resort, so that a bug has its own exit code)
        code = _report_unexpected(error, as_json)
    if code == INTERRUPTED:  # typer may have turned the interrupt into its exit code
        with _unless_closed():
            print("interrupted", file=sys.stderr)
    sys.exit(_flush(code or 0))


def _flush(code: int | str) -> int | str:
    """Flush stdout and stderr, and return the exit code: CLOSED_PIPE when the pipe is closed, ENVIRONMENT when the disk
    is full. Error text that a full disk does not take is lost."""
    nothing = open(os.devnull, "w")  # noqa: PTH123, SIM115 (for the interpreter's own flush at its end)
    try:
        sys.stdout.flush()
    except OSError as error:
        sys.stdout = nothing
        if isinstance(error, BrokenPipeError):
            code = CLOSED_PIPE
        elif code != ENVIRONMENT:  # that error has been reported
            code = _report(unusable(error), as_json=False)
    try:
        sys.stderr.flush()
    except OSError:
        sys.stderr = nothing
    return code


def _report(error: PeftoptError, as_json: bool) -> int:
    """Print what is wrong and what to do; with --json, print it as JSON too. Returns the exit code."""
    from peftopt.cli.console import Console, print_error

    with _unless_closed():
        Console().error(error)
    if as_json:
        problems = error.problems if isinstance(error, BadRecipe) else ()
        with _unless_closed():
            print_error(error.exit_code, error.message, error.hint, problems)
    return error.exit_code


@contextlib.contextmanager
def _unless_closed() -> Iterator[None]:
    """Ignore a closed or full output while printing a message: the exit code still tells."""
    with contextlib.suppress(OSError, SystemExit):
        yield


def _report_as_json(exit_code: int, message: str, as_json: bool) -> int:
    """With --json, print the message as JSON. Returns the exit code."""
    if as_json:
        from peftopt.cli.console import print_error

        with _unless_closed():
            print_error(exit_code, message)
    return exit_code


def _report_unexpected(error: Exception, as_json: bool) -> int:
    """Print an exception that is not a PeftoptError, and return its exit code: 2 for a usage error, 141 for a closed
    pipe, 4 for a full or forbidden disk, 5 for a bug."""
    import traceback

    from peftopt.cli.console import print_text

    usage_error = typer.BadParameter.__base__  # typer carries its own click, and does not export the class
    if usage_error and isinstance(error, usage_error):
        error.show(usage := io.StringIO())  # type: ignore[attr-defined]
        with _unless_closed():
            print_text(usage.getvalue(), end="", stderr=True)
        return _report_as_json(BAD_INPUT, error.format_message(), as_json)  # type: ignore[attr-defined]
    if isinstance(error, BrokenPipeError):
        return CLOSED_PIPE
    if isinstance(error, OSError) and error.errno in SYSTEM:
        return _report(unusable(error), as_json)
    with _unless_closed():
        print_text("".join(traceback.format_exception(error)), end="", stderr=True)
        print("this is a bug in peftopt; please report it with the lines above", file=sys.stderr)
    return _report_as_json(BUG, f"a bug: {type(error).__name__}: {error}", as_json)
