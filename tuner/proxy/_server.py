"""The server: Optuna's service and ours on one port, behind a secret if there is one."""

from __future__ import annotations

import hmac
import logging
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from tuner.engines import make_engine
from tuner.errors import StorageError, TunerError
from tuner.ledger import prepare, prepared
from tuner.proxy._service import LedgerService
from tuner.remote import PORT, TOKEN, is_loopback, is_remote, shown, token
from tuner.remote._channel import TOKEN_KEY
from tuner.remote._optuna import add_service, is_refused
from tuner.storage import exclusive, open_storage, opening
from tuner.urls import masked

CONNECTIONS = 8
STOPPING_SECONDS = 5.0
LARGEST_REQUEST = 64 * 2**20
OPTIONS = [
    ("grpc.max_receive_message_length", LARGEST_REQUEST),
    ("grpc.max_send_message_length", -1),
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
]

log = logging.getLogger(__name__)


class _Door(grpc.ServerInterceptor):
    """Lets nobody in without the secret, and nobody write trials without a lease."""

    def __init__(self, secret: str | None) -> None:
        self.secret = None if secret is None else secret.encode()

    def intercept_service(
        self, continuation: Callable[..., Any], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """See ``grpc.ServerInterceptor``."""
        given = dict(handler_call_details.invocation_metadata or ()).get(TOKEN_KEY, "")
        offered = given if isinstance(given, bytes) else given.encode()
        if self.secret is not None and not hmac.compare_digest(offered, self.secret):
            return _refusal(grpc.StatusCode.UNAUTHENTICATED, f"{TOKEN} is missing or wrong")
        if is_refused(handler_call_details.method):
            return _refusal(
                grpc.StatusCode.PERMISSION_DENIED,
                "through the proxy, studies are read and trials are written with a lease; "
                "create and delete studies with the database's URL",
            )
        return continuation(handler_call_details)


def _refusal(code: grpc.StatusCode, reason: str) -> Any:
    def refuse(_: bytes, context: grpc.ServicerContext) -> bytes:
        context.abort(code, reason)
        raise AssertionError("abort raises")

    return grpc.unary_unary_rpc_method_handler(refuse)


def listen(
    url: str,
    host: str = "127.0.0.1",
    port: int = PORT,
    *,
    connections: int = CONNECTIONS,
    allow_remote: bool = False,
) -> tuple[grpc.Server, str]:
    """Start to answer calls for the storage at ``url``; the server and its own URL.

    Port 0 takes a free one. ``connections`` to the database are shared by all who call.

    Raises:
        TunerError: The address is open to others without ``allow_remote``, or cannot be had.
        StorageError: The storage cannot be opened.
    """
    if is_remote(url):
        raise StorageError("a proxy stands before a database; name that with --storage")
    secret = token()
    _refuse_open_door(host, allow_remote, secret)
    storage, engine = open_storage(url, create=False), make_engine(url, connections)
    with opening(url):
        if not prepared(engine):
            with exclusive(url):
                prepare(engine)
    server = grpc.server(
        ThreadPoolExecutor(connections, thread_name_prefix="call"),
        handlers=[LedgerService(engine)],
        interceptors=[_Door(secret)],
        options=OPTIONS,
    )
    add_service(storage, server)
    try:
        bound = server.add_insecure_port(shown(host, port))
    except RuntimeError:
        bound = 0
    if not bound:
        raise TunerError(f"cannot listen on {host}, port {port}; give another with --port")
    server.start()
    return server, f"grpc://{shown(host, bound)}"


def _refuse_open_door(host: str, allow_remote: bool, secret: str | None) -> None:
    if is_loopback(host):
        return
    if not allow_remote:
        raise TunerError(
            f"host {host!r} lets others reach the proxy, and who reaches it can change every "
            "study; serve on 127.0.0.1 and let workers come through SSH, or give --allow-remote"
        )
    if secret is None:
        log.warning("anybody who reaches %s can change every study; %s asks for one", host, TOKEN)
    else:
        log.warning("the secret and all else travels unencrypted; keep %s within your net", host)


def serve(
    url: str,
    host: str = "127.0.0.1",
    port: int = PORT,
    *,
    connections: int = CONNECTIONS,
    allow_remote: bool = False,
    announce: Callable[[str], None] = print,
) -> None:
    """Answer calls until SIGINT or SIGTERM; those at hand are finished. See ``listen``."""
    over = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: over.set())
    server, own = listen(url, host, port, connections=connections, allow_remote=allow_remote)
    announce(f"{own} answers for {masked(url)}, {connections} calls at a time")
    over.wait()
    server.stop(STOPPING_SECONDS).wait()
