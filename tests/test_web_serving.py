"""The dashboard answers this machine only, unless told otherwise."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from typing import Any

import pytest
from wsgi_client import send

from tuner.errors import TunerError
from tuner.web import listen, loopback_only, serve


def hello(_environ: Any, start: Any) -> list[bytes]:
    start("200 OK", [("Content-Length", "5")])
    return [b"hello"]


class TestLoopback:
    @pytest.mark.parametrize(
        "host", ["localhost", "LOCALHOST:80", "127.0.0.1:8080", "127.1.2.3", "[::1]:8080", "[::1]"]
    )
    def test_requests_under_this_machines_own_names_pass(self, host: str) -> None:
        assert send(loopback_only(hello), "/", HTTP_HOST=host).status == 200

    @pytest.mark.parametrize(
        "host",
        [
            "evil.example",
            "evil.example:8080",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "localhost@evil.example",
            "192.168.0.1",
            "[::2]",
            "[::1",
            "",
        ],
    )
    def test_requests_under_other_names_are_refused(self, host: str) -> None:
        answer = send(loopback_only(hello), "/", HTTP_HOST=host)
        assert answer.status == 403
        assert "localhost only" in answer.json["reason"]


@pytest.fixture
def served() -> Iterator[HTTPConnection]:
    server, url = listen(hello, "localhost", 0)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    connection = HTTPConnection(url.removeprefix("http://").rstrip("/"))
    yield connection
    connection.close()
    server.task_dispatcher.shutdown()
    server.close()
    thread.join(5)


# waitress may still be selecting on the socket that the fixture closes.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
class TestServing:
    def test_a_free_port_is_found_and_answers(self, served: HTTPConnection) -> None:
        served.request("GET", "/")
        answer = served.getresponse()
        assert answer.read() == b"hello"
        assert answer.getheader("Server") is None

    def test_other_host_names_are_refused_on_the_wire(self, served: HTTPConnection) -> None:
        served.request("GET", "/", headers={"Host": "evil.example"})
        assert served.getresponse().status == 403

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1", "example.org"])
    def test_an_address_open_to_others_needs_permission(self, host: str) -> None:
        with pytest.raises(TunerError, match="--allow-remote"):
            listen(hello, host, 0)

    def test_with_permission_any_host_name_is_answered(self) -> None:
        server, _ = listen(hello, "0.0.0.0", 0, allow_remote=True)
        try:
            answer = send(server.application, "/", HTTP_HOST="example.org", REMOTE_ADDR="::1")
            assert answer.status == 200
        finally:
            server.close()

    def test_container_listens_to_all_and_answers_to_loopback_names_only(self) -> None:
        server, _ = listen(hello, "0.0.0.0", 0, in_container=True)
        try:
            statuses = [
                send(server.application, "/", HTTP_HOST=host, REMOTE_ADDR="::1").status
                for host in ("localhost:8080", "127.0.0.1:8080", "evil.example")
            ]
        finally:
            server.close()
        assert statuses == [200, 200, 403]

    def test_a_port_in_use_is_named_with_the_way_out(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            with pytest.raises(TunerError, match=f"port {port} on 127.0.0.1 is in use.*--port"):
                listen(hello, "127.0.0.1", port)

    def test_the_addresses_are_announced(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import waitress

        class Server:
            effective_port = 4321

            def run(self) -> None: ...

        monkeypatch.setattr(waitress, "create_server", lambda *_, **__: Server())
        said: list[str] = []
        serve(hello, "127.0.0.1", 0, announce=said.append)
        assert "http://127.0.0.1:4321/report" in said[0]
