"""A way to a server that can be cut, and be there again."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from types import TracebackType

from sqlalchemy.engine import URL, make_url


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Relay:
    """Hands bytes on between a port of this machine and a server, unless it is cut."""

    def __init__(self, url: str, port: int = 0) -> None:
        target: URL = make_url(url)
        default = 5432 if target.get_backend_name() == "postgresql" else 3306
        self.target = (target.host or "127.0.0.1", target.port or default)
        self.listener = socket.create_server(("127.0.0.1", port))
        self.port = self.listener.getsockname()[1]
        self.url = target.set(host="127.0.0.1", port=self.port).render_as_string(False)
        self.open: list[socket.socket] = []
        self.is_cut = False
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Relay:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.listener.close()
        self.cut()

    def cut(self) -> None:
        """End all connections, and let nobody through from now on."""
        self.is_cut = True
        while self.open:
            with contextlib.suppress(OSError):
                self.open.pop().shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        """Let everybody through again."""
        self.is_cut = False

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            if self.is_cut:
                return
            with socket.create_connection(self.target) as server:
                self.open += [client, server]
                other = {client: server, server: client}
                while True:
                    for ready in select.select(list(other), [], [])[0]:
                        content = ready.recv(65536)
                        if not content:
                            return
                        other[ready].sendall(content)
