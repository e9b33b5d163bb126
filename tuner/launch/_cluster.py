"""A Ray cluster, and how many workers it has room for."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tuner.errors import TunerError

CONNECT_SECONDS = 10.0
STORE_BYTES = 100_000_000

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Crew:
    """Which workers to place: how many, each with what share of GPUs and processors.

    ``name`` begins their names, ``name/0``, ``name/1``, …; the same name gets its trials back.
    """

    name: str
    workers: int
    gpus: float = 1.0
    cpus: float = 1.0
    device: str | None = None

    @property
    def names(self) -> list[str]:
        """The name of every worker."""
        return [f"{self.name}/{index}" for index in range(self.workers)]

    @property
    def on_device(self) -> int:
        """How many of them Ray may place on one GPU."""
        return int(1 / self.gpus) if 0 < self.gpus < 1 else 1


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """Ray, connected to the cluster at ``address``; ``local`` starts one on this machine.

    A connection that was there before is used, and left as it is.

    Raises:
        TunerError: Ray is not installed, or there is no such cluster.
    """
    if address == "local" and "ray" not in sys.modules:
        # Ray reads these when it is imported: who is on this machine needs a token to use it.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise TunerError("Ray is not installed: pip install 'tuner[ray]'") from None
    if ray.is_initialized():
        yield ray
        return
    own: dict[str, Any] = {}
    if address not in ("auto", "local"):
        check_address(address)
    if address == "local":
        # Nothing is stored in Ray, and its dashboard would be one more open door.
        own = {"include_dashboard": False, "object_store_memory": STORE_BYTES}
    try:
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=True, **own)
    except (ConnectionError, ImportError, RuntimeError, ValueError) as error:
        raise TunerError(
            f"--address {address}: {shortened(error)} (local starts Ray here)"
        ) from None
    try:
        yield ray
    finally:
        ray.shutdown()


def shortened(error: BaseException) -> str:
    """First and last line of an error of Ray's, which may hold a traceback of another process."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " … ".join(dict.fromkeys((lines[0], lines[-1]))) if lines else type(error).__name__


def check_address(address: str) -> None:
    """See that somebody answers there: Ray itself would try for a quarter of an hour.

    Raises:
        TunerError: Nobody does, or it is no address.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise TunerError(
            f"--address {address}: {error}; give HOST:PORT, ray://HOST:PORT, auto or local"
        ) from None


def room(nodes: list[dict[str, Any]], crew: Crew) -> int:
    """How many workers of ``crew`` the machines of a cluster hold at once, were they idle."""
    return sum(_fit(node["Resources"], crew) for node in nodes)


def _fit(resources: dict[str, float], crew: Crew) -> int:
    fits = [crew.workers]
    if crew.cpus:
        fits.append(math.floor(resources.get("CPU", 0.0) / crew.cpus + 1e-6))
    if crew.gpus:
        # A worker's share is of one GPU, never of two.
        fits.append(int(resources.get("GPU", 0.0)) * math.floor(1 / crew.gpus + 1e-6))
    return min(fits)


def check_room(nodes: list[dict[str, Any]], crew: Crew, *, alone: bool) -> None:
    """Say when there is not room for all workers of ``crew``.

    Raises:
        TunerError: There is none at all, and Ray runs on this machine ``alone``.
    """
    found = room(nodes, crew)
    share = f"{crew.gpus:g} GPU and {crew.cpus:g} CPU"
    if found == 0 and alone:
        raise TunerError(
            f"Ray finds no room here for a worker with {share}; with --gpus-per-worker 0 it is on "
            "the processor"
        )
    if found < crew.workers:
        log.warning(
            "there is room for %d of %d workers with %s each; the others wait in Ray",
            *(found, crew.workers, share),
        )
