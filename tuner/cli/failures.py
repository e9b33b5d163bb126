"""What a command says of an error that its user can cure, or wait for."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from tuner.cli.secrets import without_storage
from tuner.errors import DataError, TunerError


@contextlib.contextmanager
def naming(where: Path | str) -> Iterator[None]:
    """Let errors of data begin with the study file or the study that asks for them.

    Raises:
        DataError: One was raised inside.
    """
    try:
        yield
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def curable(error: Exception) -> TunerError | None:
    """An error as one message without a password; None when it is nobody's but ours.

    A database may go away at any moment, in any command: here its errors become messages.
    """
    if isinstance(error, TunerError):
        return error
    if "sqlalchemy" not in sys.modules:
        return None
    from tuner.storage import failure, storage_url

    return failure(error, storage_url(without_storage(sys.argv[1:])[1]))
