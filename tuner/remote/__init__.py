"""The way to a storage through ``tuner proxy``: grpc://HOST:PORT instead of a database URL."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

from tuner.errors import StorageError
from tuner.remote._address import (
    PORT,
    TOKEN,
    address,
    is_host,
    is_loopback,
    is_remote,
    shown,
    token,
)

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

__all__ = [
    "PORT",
    "TOKEN",
    "address",
    "is_host",
    "is_loopback",
    "is_remote",
    "open_remote",
    "require_grpc",
    "shown",
    "token",
]


def open_remote(url: str) -> BaseStorage:
    """Optuna's storage behind the proxy at ``url``; what it says of studies can be read.

    Raises:
        StorageError: The address is none, gRPC is not installed, or no proxy answers there.
    """
    require_grpc()
    from tuner.remote._channel import channel_to, wait_until_ready
    from tuner.remote._optuna import storage_through

    wait_until_ready(url)
    return storage_through(channel_to(url))


def require_grpc() -> None:
    """Refuse with the way out where gRPC is missing; call it before gRPC is imported.

    Raises:
        StorageError: It is not installed.
    """
    # It would write lines of its own beside our messages, about every connection that ends.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        importlib.import_module("grpc")
        importlib.import_module("google.protobuf")
    except ImportError:
        raise StorageError(
            "the proxy needs gRPC, which is not installed: pip install 'tuner[proxy]'"
        ) from None
