"""Where a proxy is, who can reach it, and the secret it may ask for."""

from __future__ import annotations

import ipaddress
import os
import socket
from urllib.parse import urlsplit

from tuner.errors import StorageError

SCHEME = "grpc"
PORT = 13000
TOKEN = "TUNER_PROXY_TOKEN"


def is_remote(url: str) -> bool:
    """Whether a storage URL names a proxy."""
    return url.startswith(f"{SCHEME}:")


def address(url: str) -> tuple[str, int]:
    """Host and port of ``grpc://HOST:PORT``; the port is 13000 unless given.

    Raises:
        StorageError: It is no such address, or holds more than that.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or parts.username or parts.path.strip("/") or parts.query:
        # The address is not repeated: it may hold a password.
        raise StorageError(
            f"a proxy is addressed as grpc://HOST:PORT and nothing more; a secret goes into {TOKEN}"
        )
    return host, PORT if port is None else port


def shown(host: str, port: int) -> str:
    """A host and a port as gRPC takes them and people read them."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_host(name: str | None) -> bool:
    """Whether a name stands for a machine; while no name server says otherwise, it may."""
    try:
        socket.getaddrinfo(name, None)
    except socket.gaierror as error:
        return error.errno == socket.EAI_AGAIN
    except (OSError, UnicodeError):
        return False
    return True


def token() -> str | None:
    """The secret that proxy and workers share, if there is one.

    Raises:
        StorageError: It cannot travel in a header.
    """
    secret = os.environ.get(TOKEN)
    if secret and not (secret.isascii() and secret.isprintable() and secret == secret.strip()):
        raise StorageError(f"{TOKEN} must be printable ASCII without spaces around it")
    return secret or None


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine and is reachable from it alone."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
