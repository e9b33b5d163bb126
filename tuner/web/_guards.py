"""WSGI middleware: refuse what would change something, and what comes from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from tuner.remote import is_loopback

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

READING = ("GET", "HEAD")
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "SAMEORIGIN",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
"""Sent with every answer that has no such header itself; pages bring their own policy."""


def read_only(app: WSGIApplication) -> WSGIApplication:
    """Let reading requests through and answer all others with 405."""

    def guarded(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] in READING:
            return app(environ, start_response)
        reason = "this dashboard is read-only; change a study with the tuner command"
        return json_answer(
            start_response,
            HTTPStatus.METHOD_NOT_ALLOWED,
            {"reason": reason},
            ("Allow", ", ".join(READING)),
        )

    return guarded


def loopback_only(app: WSGIApplication) -> WSGIApplication:
    """Refuse requests made to another name than this machine's loopback names.

    A web site can let its own name point to 127.0.0.1 and so have its visitors' browsers read
    what only they can reach (DNS rebinding); the Host header then tells that name.
    """

    def guarded(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if is_loopback(_host(environ.get("HTTP_HOST", ""))):
            return app(environ, start_response)
        reason = "this dashboard answers to localhost only; open it by that name"
        return json_answer(start_response, HTTPStatus.FORBIDDEN, {"reason": reason})

    return guarded


def with_headers(app: WSGIApplication) -> WSGIApplication:
    """Add ``HEADERS`` to every answer, and take out permission to read it from other sites."""

    def guarded(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        def start(status: str, headers: list[tuple[str, str]], *exc_info: Any) -> Any:
            own = [(k, v) for k, v in headers if k.lower() != "access-control-allow-origin"]
            present = {name.lower() for name, _ in own}
            missing = [(k, v) for k, v in HEADERS.items() if k.lower() not in present]
            return start_response(status, own + missing, *exc_info)

        return app(environ, start)

    return guarded


def answer(
    start_response: StartResponse,
    status: HTTPStatus,
    body: str,
    *headers: tuple[str, str],
    kind: str = "text/html",
) -> list[bytes]:
    """A whole answer in UTF-8."""
    content = body.encode()
    own = [("Content-Type", f"{kind}; charset=utf-8"), ("Content-Length", str(len(content)))]
    start_response(f"{status.value} {status.phrase}", [*own, *headers])
    return [content]


def json_answer(
    start_response: StartResponse,
    status: HTTPStatus,
    values: dict[str, Any],
    *headers: tuple[str, str],
) -> list[bytes]:
    """A whole answer in JSON."""
    body = json.dumps(values)
    return answer(start_response, status, body, *headers, kind="application/json")


def _host(header: str) -> str:
    """The host of a Host header, without port and brackets; empty when it is malformed."""
    host, colon, port = header.rpartition(":")
    if not colon or not port.isdigit():
        host = header
    if host.startswith("["):
        return host[1:-1] if host.endswith("]") else ""
    return host
