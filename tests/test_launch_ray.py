"""Two machines' worth of workers under Ray, with GPUs that are only said to be there."""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import REQUIRED, MakeSession
from optuna.trial import TrialState

from tuner import session as sessions
from tuner.errors import TunerError
from tuner.launch import Place
from tuner.launch._cluster import Crew, connected, room
from tuner.launch._ray import Placement
from tuner.rungs.outcome import Outcome
from tuner.session import Session
from tuner.stores import FolderStore

pytestmark = pytest.mark.timeout(900)
with_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None and not REQUIRED, reason="Ray is not installed"
)

PATIENCE = 300.0
PASSWORD = "sesame-open-yourself"
MACHINE = {"num_cpus": 2, "num_gpus": 2, "object_store_memory": 80_000_000}
LONG: dict[str, Any] = {
    "budget": {"trials": 12, "epochs": 60},
    "search": {"pruner": "none"},
    "model": {"name": "mlp", "width": 128},
}
ENDLESS: dict[str, Any] = LONG | {"budget": {"trials": 6, "epochs": 100_000}}


def patiently(start: Callable[[], Any]) -> Any:
    """Ray gives itself 30 s to start, which a machine that runs other tests may not have."""
    for _ in range(3):
        try:
            return start()
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
    return start()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster of one machine with two GPUs, and Ray connected to it."""
    folder = tempfile.mkdtemp(prefix="ray")
    # Ray notes the cluster's address here too, and does not make the folder.
    Path("/tmp/ray").mkdir(exist_ok=True)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        from ray.cluster_utils import Cluster

        head = {**MACHINE, "include_dashboard": False, "temp_dir": folder}
        made: Any = patiently(lambda: Cluster(initialize_head=True, head_node_args=head))
        made.folder = folder
        with connected(made.address) as ray:
            made.ray = ray
            yield made
        made.shutdown()
    signal.signal(signal.SIGTERM, handler)
    shutil.rmtree(folder, ignore_errors=True)


def until(condition: Callable[[], Any], running: Future[Any] | None = None) -> Any:
    """What ``condition`` says once it says something."""
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline
        assert running is None or not running.done(), running.result()
        time.sleep(0.1)
    return found


class Launch:
    """Workers of half a GPU on a study, followed from a thread of its own."""

    def __init__(
        self, cluster: Any, session: Session, folder: Path, url: str, *, workers: int
    ) -> None:
        self.stop, self.workers = threading.Event(), workers
        self.said: list[Outcome] = []
        here = sessions.join("tiny", url, FolderStore(folder / "artifacts"))
        self.session = here
        place = Place.here("tiny", url, None, str(folder / "artifacts"))
        # Who dies on this machine is found by its process. A lease that a worker can lose while
        # a loaded machine lets it wait would only blur the count of what was lost.
        given = place.given | {"TUNER_LEASE": "600"}
        self.place = replace(place, given=given, credentials={"PGPASSWORD": PASSWORD})
        self.placement = Placement(
            cluster.ray,
            session,
            self.place,
            Crew("crew", workers, gpus=0.5, cpus=1.0),
            stop=self.stop.is_set,
            on_trial=self.said.append,
        )
        self.pool = ThreadPoolExecutor(1)
        self.running = self.pool.submit(self.placement.run)

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.pool.shutdown()

    def training(self) -> dict[str, dict[str, Any]]:
        """Rows of the workers that train, by name."""
        rows = self.session.ledger.workers()
        return {row["worker_id"]: row for row in rows if row["state"] == "training"}

    def wait_for_all(self) -> dict[str, dict[str, Any]]:
        """Wait until all of them trained an epoch."""

        def found() -> dict[str, dict[str, Any]] | None:
            rows = self.training()
            there = len(rows) == self.workers and all(
                row["epoch"] is not None for row in rows.values()
            )
            return rows if there else None

        return dict(until(found, self.running))


def parent(pid: int) -> int:
    """Number of the process that started this one: of Ray's workers, their machine's raylet."""
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("PPid"))
    return int(line.split()[1])


@pytest.mark.long
@with_ray
def test_workers_and_machines_that_die_cost_no_trial(
    cluster: Any, make_session: MakeSession, tmp_path: Path, sqlite: str
) -> None:
    session = make_session(**LONG)
    second = cluster.add_node(**MACHINE)
    with Launch(cluster, session, tmp_path, sqlite, workers=4) as launch:
        rows = launch.wait_for_all()
        raylet = second.all_processes["raylet"][0].process.pid
        first = [row for row in rows.values() if parent(row["pid"]) != raylet]
        assert len(first) == 2, "two workers on either machine"
        assert all(row["facts"]["gpu"] in ("0", "1") for row in rows.values()), "each sees one GPU"

        killed, told = first
        os.kill(killed["pid"], signal.SIGKILL)
        os.kill(told["pid"], signal.SIGTERM)
        cluster.remove_node(second, allow_graceful=False)
        cluster.add_node(**MACHINE)
        assert launch.running.result(PATIENCE) == "over"

    trials = session.trials()
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 12, "the budget, to the trial"
    attempts = session.ledger.attempts()
    assert all(attempt["end"] is not None for attempt in attempts)
    completed = Counter(a["trial_id"] for a in attempts if a["end"] == "complete")
    assert completed == {t._trial_id: 1 for t in trials}, "nothing lost, nothing twice"
    ends = Counter(attempt["end"] for attempt in attempts)
    assert 1 <= ends["lost"] <= 3
    assert ends["preempted"] <= 1
    assert len(attempts) == 12 + ends["lost"] + ends["preempted"]
    for trial in trials:
        epochs = [row["epoch"] for row in session.ledger.epochs(trial._trial_id)]
        assert epochs == list(range(60))
    back = {row["worker_id"]: row for row in session.ledger.workers()}
    assert sorted(back) == ["crew/0", "crew/1", "crew/2", "crew/3"], "no name is new"
    assert back[killed["worker_id"]]["generation"] == 2
    assert back[told["worker_id"]]["generation"] == 2
    assert all(row["state"] == "left" for row in back.values())
    assert sorted(outcome.number for outcome in launch.said) == list(range(12))


@pytest.mark.long
@with_ray
def test_nothing_secret_is_in_rays_files(cluster: Any) -> None:
    files = [path for path in Path(cluster.folder).rglob("*") if path.is_file()]
    assert any("worker" in path.name for path in files)
    assert not [path for path in files if PASSWORD.encode() in path.read_bytes()]


@pytest.mark.long
@with_ray
def test_workers_that_are_told_to_stop_keep_their_trials(
    cluster: Any, make_session: MakeSession, tmp_path: Path, sqlite: str
) -> None:
    session = make_session(**ENDLESS)
    with Launch(cluster, session, tmp_path, sqlite, workers=2) as launch:
        launch.wait_for_all()
        launch.stop.set()
        assert launch.running.result(PATIENCE) is None
    assert {t.state for t in session.trials()} == {TrialState.WAITING}
    ends = [(a["end"], a["reason"]) for a in session.ledger.attempts()]
    assert ends == [("preempted", "signal")] * 2
    assert all(row["state"] == "left" for row in session.ledger.workers())


@pytest.mark.long
@with_ray
def test_what_the_user_can_cure_ends_a_worker_and_is_said(
    cluster: Any, make_session: MakeSession, tmp_path: Path, sqlite: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    session = make_session()
    place = Place.here("tiny", sqlite, None, str(tmp_path / "artifacts"))
    broken = replace(place, given=place.given | {"TUNER_LEASE": "soon"})
    placement = Placement(cluster.ray, session, broken, Crew("crew", 2, gpus=0, cpus=0.5))
    with pytest.raises(TunerError, match="every worker ended"):
        placement.run()
    assert "TUNER_LEASE = 'soon'" in caplog.text
    assert session.ledger.workers() == []


@pytest.mark.long
@with_ray
def test_machine_without_room_for_a_worker_is_refused_when_it_is_the_only_one(
    cluster: Any, make_session: MakeSession, sqlite: str, caplog: pytest.LogCaptureFixture
) -> None:
    session = make_session()
    place = Place.here("tiny", sqlite, None, None)
    with pytest.raises(TunerError, match="no room here for a worker with 1 GPU and 99 CPU"):
        Placement(cluster.ray, session, place, Crew("crew", 1, cpus=99.0), alone=True)
    Placement(cluster.ray, session, place, Crew("crew", 9, gpus=0, cpus=1.0))
    assert "there is room for 4 of 9 workers" in caplog.text


@pytest.mark.parametrize(
    ("gpus", "cpus", "expected"),
    [(1.0, 1.0, 3), (0.5, 1.0, 6), (0.3, 1.0, 9), (0.0, 1.0, 12), (0.5, 4.0, 3), (0.4, 0.0, 6)],
)
def test_room_counts_shares_of_whole_gpus(gpus: float, cpus: float, expected: int) -> None:
    nodes = [
        {"Resources": {"CPU": 8.0, "GPU": 2.0}},
        {"Resources": {"CPU": 4.0, "GPU": 1.0}},
    ]
    assert room(nodes, Crew("crew", 100, gpus, cpus)) == expected
