"""A PostgreSQL server of our own, on a free port, that may be restarted and killed."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from relay import free_port


def binaries() -> Path | None:
    """Folder of ``initdb`` and ``pg_ctl``; None when PostgreSQL's server is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    on_path = shutil.which("initdb")
    if found:
        return found[-1].parent
    return Path(on_path).parent if on_path else None


class OwnPostgres:
    """A server in a folder of its own; what it keeps is on disk as a real one's."""

    def __init__(self, bin_folder: Path, folder: Path, addresses: str = "127.0.0.1") -> None:
        self.bin, self.folder, self.addresses = bin_folder, folder, addresses
        self.port = free_port()
        self._run("initdb", "-D", str(folder), "-A", "trust", "-U", "postgres", "-N")
        with (folder / "pg_hba.conf").open("a") as file:
            file.write("host all all 0.0.0.0/0 trust\n")

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        options = (
            f"-p {self.port} -c listen_addresses='{self.addresses}' "
            f"-c unix_socket_directories='' -c max_connections=100"
        )
        log = str(self.folder / "log")
        self._run("pg_ctl", "-D", str(self.folder), "-w", "-l", log, "-o", options, "start")

    def stop(self, mode: str = "fast") -> None:
        self._run("pg_ctl", "-D", str(self.folder), "-w", "-m", mode, "stop")

    def restart(self, mode: str = "immediate") -> None:
        """Go down without a word to anybody, and come back."""
        self.stop(mode)
        self.start()

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self.bin / program), *arguments]
        if os.getuid() == 0:
            # The server refuses to run as root.
            command = ["runuser", "-u", "postgres", "--", *command]
        subprocess.run(command, check=True, capture_output=True, cwd="/")


@contextmanager
def own_postgres(bin_folder: Path, addresses: str = "127.0.0.1") -> Iterator[OwnPostgres]:
    """A fresh server that is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="tuner-postgres-"))
    if os.getuid() == 0:
        user = pwd.getpwnam("postgres")
        os.chown(folder, user.pw_uid, user.pw_gid)
    try:
        server = OwnPostgres(bin_folder, folder, addresses)
        server.start()
        yield server
    finally:
        with suppress(Exception):
            server.stop("immediate")
        shutil.rmtree(folder, ignore_errors=True)
