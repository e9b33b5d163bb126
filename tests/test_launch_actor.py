"""A worker in Ray's process, without Ray: what it waits for, and what ends it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator

import pytest
import sqlalchemy as sa

from tuner.errors import StorageError
from tuner.launch import Place, _actor
from tuner.launch._actor import TRIES, Worker
from tuner.launch._cluster import Crew
from tuner.slots import own_cores, slots_on_device
from tuner.stores import StoreError

PLACE = Place("tiny", {"TUNER_STORAGE": "postgresql://someone@127.0.0.1:1/tuner"})


class Storage:
    """Answers with an error so many times, and then lets the worker do its work."""

    def __init__(self, error: Callable[[], Exception], times: int) -> None:
        self.error, self.times, self.asked = error, times, 0

    def __call__(self, *_: object) -> None:
        self.asked += 1
        if self.asked <= self.times:
            raise self.error()


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    """A worker that hardly pauses between its tries."""
    for name in ("TUNER_STORAGE", "TUNER_CORES", "TUNER_SLOTS_ON_DEVICE"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(_actor, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(_actor, "LONGEST_PAUSE", 0.001)
    monkeypatch.setattr(_actor, "TICK", 0.001)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield Worker("crew/0")
    for number, handler in before.items():
        signal.signal(number, handler)


def run(worker: Worker, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> str | None:
    monkeypatch.setattr(worker, "_work", storage)
    return worker.run(PLACE, "cpu", 1)


def closed() -> Exception:
    return StorageError("cannot open the storage", passes=True)


def dropped() -> Exception:
    return sa.exc.OperationalError("SELECT 1", {}, Exception("server closed the connection"))


@pytest.mark.parametrize("error", [closed, dropped])
def test_storage_that_is_away_for_long_is_waited_for(
    error: Callable[[], Exception], worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(error, times=10 * TRIES)
    assert run(worker, storage, monkeypatch) is None
    assert storage.asked == 10 * TRIES + 1


@pytest.mark.parametrize("error", [StorageError, StoreError])
def test_what_is_wrong_rather_than_away_ends_a_worker_after_a_few_tries(
    error: type[Exception], worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(lambda: error("no such study"), times=10 * TRIES)
    assert run(worker, storage, monkeypatch) == "no such study"
    assert storage.asked == TRIES


def test_who_waits_for_the_storage_hears_that_it_must_stop(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_actor, "FIRST_PAUSE", 600.0)

    def told() -> Exception:
        worker.stop()
        return closed()

    began = time.monotonic()
    assert run(worker, Storage(told, times=2), monkeypatch) is None
    assert time.monotonic() - began < 60


def test_real_server_that_is_down_counts_as_away(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rests: list[float] = []

    def rest(seconds: float) -> None:
        rests.append(seconds)
        worker.told = len(rests) > TRIES

    monkeypatch.setattr(worker, "_rest", rest)
    assert worker.run(PLACE, "cpu", 1) is None
    assert len(rests) == TRIES + 1
    assert "cannot open the storage postgresql://someone@127.0.0.1:1" in caplog.text


def test_worker_keeps_to_the_cores_and_the_share_of_a_gpu_that_ray_gave_it(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_work", lambda *_: None)
    assert worker.run(PLACE, "cpu", 3, 2) is None
    assert (own_cores(), slots_on_device()) == (3, 2)
    shares = [Crew("crew", 4, gpus=gpus).on_device for gpus in (0.0, 1.0, 0.5, 0.25)]
    assert shares == [1, 1, 2, 4]
