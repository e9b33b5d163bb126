"""A gRPC channel to the proxy: the secret goes with every call, and no call hangs."""

from __future__ import annotations

import os
from functools import cache
from typing import Any, NamedTuple

import grpc

from tuner.engines import UnreachableError
from tuner.errors import StorageError
from tuner.remote._address import TOKEN, address, is_host, shown, token

OPEN_SECONDS = 10.0
CALL_SECONDS = 30.0
TOKEN_KEY = "tuner-token"
PASSING = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.CANCELLED,
}
OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # A proxy that was restarted is found within two seconds, not two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # A connection whose other end vanished is noticed.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.enable_http_proxy", 0),
]


class _Details(NamedTuple):
    """A call's facts; gRPC reads them by name."""

    method: str
    timeout: float | None
    metadata: Any
    credentials: Any
    wait_for_ready: bool | None
    compression: Any


class _Calls(grpc.UnaryUnaryClientInterceptor):
    """Completes every call, and says in our words when nobody answered."""

    def __init__(self, where: str, secret: str | None) -> None:
        self.where = where
        self.metadata = [(TOKEN_KEY, secret)] if secret else []

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        """See ``grpc.UnaryUnaryClientInterceptor``."""
        own = _Details(
            details.method,
            details.timeout or CALL_SECONDS,
            [*(details.metadata or ()), *self.metadata],
            details.credentials,
            details.wait_for_ready,
            details.compression,
        )
        call = continuation(own, request)
        error = call.exception()
        if isinstance(error, grpc.RpcError):
            self._translate(call, str(details.method))
        return call

    def _translate(self, call: Any, method: str) -> None:
        code, details = call.code(), call.details()
        if code in PASSING:
            raise UnreachableError(f"no answer from the proxy {self.where}: {details}")
        if code == grpc.StatusCode.UNKNOWN and method.startswith("/optuna."):
            # Optuna's side of the proxy says no more of a database that did not answer it.
            raise UnreachableError(f"the proxy {self.where} has trouble: {details}")
        if code == grpc.StatusCode.UNAUTHENTICATED:
            raise StorageError(f"the proxy {self.where} asks for its secret; set {TOKEN} to it")
        if code == grpc.StatusCode.PERMISSION_DENIED:
            raise StorageError(f"the proxy {self.where} refuses: {details}")
        if code == grpc.StatusCode.UNIMPLEMENTED:
            raise StorageError(
                f"what answers at {self.where} is no tuner proxy of this version; start one "
                "there: tuner proxy"
            )


def channel_to(url: str) -> grpc.Channel:
    """The channel of this process to the proxy at ``url``."""
    return _channel(url, token(), os.getpid())


@cache
def _channel(url: str, secret: str | None, process: int) -> grpc.Channel:
    """Channels do not survive a fork, so each process has its own."""
    where = shown(*address(url))
    plain = grpc.insecure_channel(where, options=OPTIONS)
    return grpc.intercept_channel(plain, _Calls(where, secret))


def wait_until_ready(url: str, seconds: float = OPEN_SECONDS) -> None:
    """Wait until something listens at ``url``.

    Raises:
        StorageError: Nothing did within ``seconds``.
    """
    where = shown(*address(url))
    with grpc.insecure_channel(where, options=OPTIONS) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=seconds)
        except grpc.FutureTimeoutError:
            raise StorageError(
                f"no proxy answers at {where}; start it there with tuner proxy, or name another "
                "storage with --storage or TUNER_STORAGE",
                passes=is_host(address(url)[0]),
            ) from None
