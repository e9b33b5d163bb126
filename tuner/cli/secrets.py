"""Keeps a password in ``--storage`` from standing in the list of processes."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

OPTION = "--storage"
# In the address, or as a parameter of the driver.
PASSWORD = re.compile(r"://[^:/]*:.+@|[?&][^=&]*(pass|secret|token)[^=&]*=[^&]", re.IGNORECASE)


def hide_password() -> None:
    """Start over with the storage in ``TUNER_STORAGE`` if the command line tells its password.

    ``ps`` shows every user's arguments to everybody, but variables only to their owner. The
    process keeps its number.
    """
    kept, url = without_storage(sys.argv[1:])
    if os.name != "posix" or url is None or not PASSWORD.search(url):
        return
    end = len(sys.orig_argv) - len(sys.argv) + 1
    if sys.orig_argv[end:] != sys.argv[1:]:
        # Somebody else's program: its arguments are not ours.
        return
    os.environ["TUNER_STORAGE"] = url
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:end], *kept])


def without_storage(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """The arguments but for the storage, and the storage if there is one."""
    kept: list[str] = []
    url = None
    rest = iter(arguments)
    for argument in rest:
        if argument == "--":
            return [*kept, argument, *rest], url
        name, equals, value = argument.partition("=")
        if name != OPTION:
            kept.append(argument)
        elif (given := value if equals else next(rest, None)) is not None:
            url = given
        else:
            kept.append(argument)
    return kept, url
