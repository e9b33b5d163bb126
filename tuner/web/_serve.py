"""Serve a WSGI application; to this machine alone unless told otherwise."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tuner.errors import TunerError
from tuner.remote import is_loopback
from tuner.web._guards import loopback_only

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

BODY_LIMIT = 64 * 1024

log = logging.getLogger(__name__)


def serve(
    app: WSGIApplication,
    host: str = "127.0.0.1",
    port: int = 8080,
    *,
    allow_remote: bool = False,
    in_container: bool = False,
    announce: Callable[[str], None] = print,
) -> None:
    """Serve ``app`` until interrupted, and announce where.

    Raises:
        TunerError: See ``listen``.
    """
    server, url = listen(app, host, port, allow_remote=allow_remote, in_container=in_container)
    announce(f"dashboard  {url}\nreports    {url}report")
    server.run()


def listen(
    app: WSGIApplication,
    host: str,
    port: int,
    *,
    allow_remote: bool = False,
    in_container: bool = False,
) -> tuple[Any, str]:
    """Open the port and return waitress's server, not yet running, and its URL.

    Port 0 takes a free one. On a loopback address, and ``in_container`` on any, requests under
    other than this machine's loopback names are refused: a container listens on all of its
    addresses, and its host publishes the port on a loopback address.

    Raises:
        TunerError: The address is open to others without ``allow_remote``, or cannot be had.
    """
    import waitress

    local = is_loopback(host)
    if not local and not (allow_remote or in_container):
        raise TunerError(
            f"host {host!r} lets others reach the dashboard, and it has no login; serve on "
            "127.0.0.1 behind a proxy that asks for one, or give --allow-remote"
        )
    if not local and not in_container:
        log.warning("anybody who reaches %s can read every study; there is no login", host)
    # "localhost" may be two addresses, which would get two different free ports.
    address = "127.0.0.1" if host.lower() == "localhost" else host
    guarded = loopback_only(app) if local or in_container else app
    try:
        server = waitress.create_server(
            guarded, host=address, port=port, ident=None, max_request_body_size=BODY_LIMIT
        )
    except (OSError, ValueError, OverflowError) as error:
        raise TunerError(_why_not(error, host, port)) from None
    shown = f"[{address}]" if ":" in address else address
    return server, f"http://{shown}:{server.effective_port}/"


def _why_not(error: Exception, host: str, port: int) -> str:
    code = getattr(error, "errno", None)
    if code == errno.EADDRINUSE:
        return f"port {port} on {host} is in use; give another with --port (0 takes a free one)"
    if code == errno.EACCES:
        return f"port {port} is not yours to open; give one from 1024 on with --port"
    return f"cannot serve on {host}, port {port}: {error}"
