"""The commands: parse, call one function, print; logging is set up here and nowhere else."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from typing import Annotated

import typer
from typer.models import CommandInfo

from tuner import __version__
from tuner.cli.failures import curable
from tuner.cli.secrets import hide_password

ORDER = (
    "check",
    "run",
    "create",
    "worker",
    "status",
    "trials",
    "best",
    "report",
    "export",
    "train",
)

app = typer.Typer(
    help="Find the training recipe that serves the rare classes of imbalanced data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class _StandardError(logging.Handler):
    """Writes to what is standard error at the moment: progress bars make way for lines."""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))


def say(line: str) -> None:
    """Write a line to standard error; when nobody reads it any more, work goes on in silence."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _version(asked: bool) -> None:
    if asked:
        print(f"tuner {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="One line per epoch.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only errors.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Tracebacks of all errors.")] = False,
) -> None:
    level = logging.ERROR if quiet else logging.DEBUG if verbose else logging.INFO
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[_StandardError()], force=True
    )
    logging.captureWarnings(True)
    # Pillow's, of large photos; it refuses those of twice that size by an error of its own.
    warnings.filterwarnings("ignore", message="Image size .* exceeds limit")
    logging.getLogger("tuner").setLevel(level)
    _state["debug"] = debug


_state = {"debug": False}


def _by_use(command: CommandInfo) -> int:
    """Where a command stands in the help: in the order in which most are needed."""
    name = command.name or getattr(command.callback, "__name__", "")
    return ORDER.index(name) if name in ORDER else len(ORDER)


def main() -> None:
    """Run the command line; what the user can cure becomes one message and exit code 1."""
    hide_password()
    from tuner.cli import (  # noqa: F401  (their commands)
        fleet,
        launch,
        make,
        read,
        run,
        service,
        slot,
        trials,
        work,
    )

    app.registered_commands.sort(key=_by_use)
    try:
        app()
    except KeyboardInterrupt:
        print("tuner: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except Exception as error:
        known = curable(error)
        if _state["debug"] or known is None:
            raise
        print(f"tuner: {known}", file=sys.stderr)
        sys.exit(1)
