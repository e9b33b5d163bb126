"""A WSGI client: calls an application as a server would, without a port."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any
from wsgiref.util import setup_testing_defaults


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def send(app: Any, path: str, method: str = "GET", **environ: str) -> Answer:
    """Send a request to the application ``app``."""
    query = {"PATH_INFO": path, "REQUEST_METHOD": method, **environ}
    setup_testing_defaults(query)
    query.setdefault("CONTENT_TYPE", "application/json")
    said: dict[str, Any] = {}

    def start(status: str, headers: list[tuple[str, str]], *_: Any) -> None:
        said.update(status=int(status.split()[0]), headers=dict(headers))

    body = b"".join(app(query, start))
    return Answer(said["status"], said["headers"], body)
