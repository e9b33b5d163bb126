"""Many workers behind one process: the same ledger, nothing lost, and nobody else let in."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from conftest import MakeFile
from ledgers import Ledgers, claimed, complete, enter, epoch
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import GrpcStorageProxy
from optuna.trial import FrozenTrial, TrialState, create_trial
from remote_workers import workers
from sqlalchemy.exc import SQLAlchemyError

# The ledger's own tests, run again through the proxy by the fixture ``ledgers`` below.
from test_ledger import (  # noqa: F401
    test_a_budget_that_everybody_fills_up_is_exact,
    test_a_restarted_worker_gets_its_own_trial_back,
    test_a_ticket_brings_its_parameters_and_attributes,
    test_a_trial_put_back_keeps_what_it_has_and_its_first_start,
    test_a_worker_that_asks_twice_has_one_lease,
    test_a_worker_that_lost_its_lease_cannot_write_anything,
    test_each_ticket_goes_to_exactly_one_of_many_threads,
    test_many_reapers_put_a_trial_back_once,
    test_the_heartbeat_of_a_lost_lease_says_so_but_the_worker_counts_as_alive,
)
from test_ledger_bulk import (  # noqa: F401
    test_a_heartbeat_keeps_the_whole_cohort_alive,
    test_all_endings_are_written_and_their_seconds_counted,
    test_trials_that_went_to_others_are_left_alone_and_the_rest_is_written,
    test_workers_that_claim_at_once_share_no_trial,
)
from test_ledger_fleet import (  # noqa: F401
    test_a_limit_stops_again_at_once_when_the_study_is_told_to_run_beyond_it,
    test_the_list_of_workers_says_what_each_is_doing,
    test_the_name_of_a_worker_that_is_alive_is_refused_with_who_it_is,
    test_the_same_error_three_times_in_a_row_stops_the_study,
    test_who_works_hears_the_order_with_every_write_and_heartbeat,
)
from test_ledger_optuna import (  # noqa: F401
    test_history_follows_trials_through_all_their_states,
    test_our_storage_answers_as_optunas,
    test_readers_miss_no_trial_while_others_end_and_make_them,
)

from tuner import session as sessions
from tuner.datasets import Data
from tuner.engines import UnreachableError, passes
from tuner.errors import StorageError, TunerError
from tuner.ledger import Changes, Lease, LeaseLostError, Ledger, Order
from tuner.proxy import METHODS, RemoteLedger, _wire
from tuner.proxy._server import listen
from tuner.remote import TOKEN, address, open_remote
from tuner.remote._channel import channel_to, wait_until_ready
from tuner.storage import open_storage
from tuner.stores import FolderStore

pytestmark = pytest.mark.timeout(600)

PATIENCE = 250.0


class Proxied(Ledgers):
    """A study of which every view but the one that made it goes through a proxy."""

    def __init__(self, url: str) -> None:
        self.server, self.proxy = listen(url, port=0)
        super().__init__(url)
        self.direct, self.first = self.first, self.open()

    def open(self, **options: Any) -> Ledger:
        if not self.opened:
            return super().open(**options)
        ledger = RemoteLedger(self.proxy, self.study._study_id, **options)
        # What these tests do to the tables behind everybody's back goes straight there.
        ledger.engine = self.opened[0].engine
        return ledger

    def close(self) -> None:
        self.server.stop(0).wait()
        super().close()


@pytest.fixture
def ledgers(tables: str) -> Iterator[Proxied]:
    with contextlib.closing(Proxied(tables)) as made:
        yield made


@pytest.fixture
def proxied(sqlite: str) -> Iterator[str]:
    """URL of a proxy before an empty SQLite storage."""
    open_storage(sqlite)
    server, url = listen(sqlite, port=0)
    yield url
    server.stop(0).wait()


# The same ledger


def test_every_method_of_the_ledger_goes_through_the_proxy() -> None:
    public = {
        name: inspect.signature(method)
        for name, method in inspect.getmembers(Ledger, inspect.isfunction)
        if not name.startswith("_")
    }
    assert {name: inspect.signature(getattr(RemoteLedger, name)) for name in public} == public
    assert all(name in vars(RemoteLedger) for name in public)
    assert set(public) - set(METHODS) == {"ended", "rest", "trials"}, "these call others"


def test_a_history_longer_than_a_page_is_read_whole_and_then_only_what_is_new(
    ledgers: Proxied, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_wire, "PAGE", 3)
    ledgers.enqueue(*[{}] * 10)
    worker = enter(ledgers.direct)
    for _ in range(8):
        complete(ledgers.direct, claimed(ledgers.direct, worker))
    remote = ledgers.open()
    assert [t.number for t in remote.trials((TrialState.COMPLETE,))] == list(range(8))
    before = {t.number: t for t in remote.trials((TrialState.COMPLETE,))}
    complete(ledgers.direct, claimed(ledgers.direct, worker))
    after = remote.trials((TrialState.COMPLETE,))
    assert [t.number for t in after] == list(range(9))
    assert all(before[t.number] is t for t in after[:8])


def test_trials_travel_unchanged() -> None:
    trial = create_trial(
        params={"z": "focal", "a": 3, "lr": 0.1},
        distributions={
            "z": CategoricalDistribution(("cross_entropy", "focal")),
            "a": IntDistribution(1, 5),
            "lr": FloatDistribution(1e-3, 1.0, log=True),
        },
        user_attrs={"metrics": {"raw": {"tail": None}}},
        system_attrs={"constraints:floor": -0.5},
        intermediate_values={0: 0.25, 3: float("inf")},
        value=0.1 + 0.2,
    )
    trial.datetime_start = datetime(2026, 3, 1, 12, 30)
    found = _wire.loads(_wire.dumps([trial]))[0]
    assert found == trial
    assert list(found.params) == ["z", "a", "lr"]
    assert isinstance(found, FrozenTrial)


def test_writes_and_leases_travel_unchanged() -> None:
    changes = Changes(
        params={"lr": (0.5, "{}")}, user={"a": [1]}, system={"b": None}, steps={3: 0.5},
        epochs={3: {"seconds": 1.0, "samples": 2, "metrics": {}}},
    )  # fmt: skip
    lease = Lease(7, 1, 2, 3, 4, "worker", 5)
    found = _wire.loads(_wire.dumps([changes, lease, Order("stop", "why")]))
    assert [found[0].params.pop("lr"), changes.params.pop("lr")] == [[0.5, "{}"], (0.5, "{}")]
    assert found == [changes, lease, Order("stop", "why")]


# Who is let in, and to what


def test_through_the_proxy_optuna_reads_studies_as_from_the_storage(
    ledgers: Proxied,
) -> None:
    ledgers.study.set_user_attr("study_file", "x")
    through = open_remote(ledgers.proxy)
    assert isinstance(through, GrpcStorageProxy)
    study = optuna.load_study(study_name=ledgers.name, storage=through)
    assert study.user_attrs == ledgers.study.user_attrs
    study.set_user_attr("verdict", {"best": 3})
    assert ledgers.study.user_attrs["verdict"] == {"best": 3}
    ledgers.enqueue({}, {})
    assert [t.state for t in study.trials] == [TrialState.WAITING] * 2


@pytest.mark.parametrize(
    "action",
    [
        lambda storage, study, trial: storage.delete_study(study),
        lambda storage, study, trial: storage.create_new_trial(study),
        lambda storage, study, trial: storage.set_trial_state_values(trial, TrialState.RUNNING),
        lambda storage, study, trial: storage.set_trial_user_attr(trial, "k", 1),
    ],
)
def test_trials_cannot_be_written_through_the_proxy_without_a_lease(
    ledgers: Proxied, action: Callable[[Any, int, int], None]
) -> None:
    ledgers.enqueue({})
    trial = ledgers.direct.trials()[0]._trial_id
    with pytest.raises(StorageError, match="written with a lease"):
        action(open_remote(ledgers.proxy), ledgers.study._study_id, trial)
    assert [t.state for t in ledgers.direct.trials()] == [TrialState.WAITING]


def test_nobody_gets_in_without_the_secret(sqlite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    study = optuna.create_study(storage=open_storage(sqlite), study_name="s")
    monkeypatch.setenv(TOKEN, "open sesame")
    server, url = listen(sqlite, port=0)
    try:
        assert open_remote(url).get_study_id_from_name("s") == study._study_id
        assert RemoteLedger(url, study._study_id).running() == 0
        for wrong in ("", "open sesam"):
            monkeypatch.setenv(TOKEN, wrong)
            with pytest.raises(StorageError, match=TOKEN):
                open_remote(url).get_study_id_from_name("s")
            with pytest.raises(StorageError, match=TOKEN):
                RemoteLedger(url, study._study_id).running()
    finally:
        server.stop(0).wait()


@pytest.mark.parametrize(
    "call",
    [
        {"method": "_write", "arguments": []},
        {"method": "__init__", "arguments": []},
        {"method": "engine", "arguments": []},
        {"method": "running", "arguments": ["too", "many"]},
        {"method": "running", "arguments": [], "protocol": 99},
        {"method": "running", "arguments": [], "study": "x"},
    ],
)
def test_a_call_that_is_none_is_refused(proxied: str, call: dict[str, Any]) -> None:
    whole = {"protocol": _wire.PROTOCOL, "study": 1, "limits": [None, None], "lease": 60}
    send: Any = channel_to(proxied).unary_unary(_wire.CALL)
    with pytest.raises(Exception, match="not a call"):
        send(_wire.dumps({"options": {}, **whole, **call}))


def test_columns_of_an_attempt_that_are_no_progress_cannot_be_set(ledgers: Proxied) -> None:
    ledgers.enqueue({})
    lease = claimed(ledgers.first, enter(ledgers.first))
    with pytest.raises(SQLAlchemyError, match="unknown: lease_until"):
        ledgers.first.write(lease, Changes(), lease_until=1e12)


def test_others_are_not_served_unless_asked_to(
    sqlite: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    open_storage(sqlite)
    with pytest.raises(TunerError, match="--allow-remote"):
        listen(sqlite, "0.0.0.0", 0)
    listen(sqlite, "0.0.0.0", 0, allow_remote=True)[0].stop(0)
    assert "anybody who reaches 0.0.0.0 can change every study" in caplog.text
    monkeypatch.setenv(TOKEN, "x")
    listen(sqlite, "0.0.0.0", 0, allow_remote=True)[0].stop(0)
    assert "unencrypted" in caplog.text


def test_a_port_in_use_is_named(sqlite: str) -> None:
    open_storage(sqlite)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(TunerError, match="give another with --port"):
            listen(sqlite, port=taken.getsockname()[1])


@pytest.mark.parametrize("url", ["grpc://", "grpc://host:x", "grpc://u:pw@host:1", "grpc://h:1/x"])
def test_what_is_no_address_of_a_proxy_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(StorageError, match="grpc://HOST:PORT") as caught:
        address(url)
    assert "pw" not in str(caught.value)


def test_no_proxy_before_a_proxy_and_no_study_made_through_one(
    proxied: str, make_file: MakeFile, digits: Data, tmp_path: Path
) -> None:
    with pytest.raises(StorageError, match="before a database"):
        listen(proxied, port=0)
    with pytest.raises(StorageError, match="create it with the database's URL"):
        sessions.create(make_file(), proxied, FolderStore(tmp_path), digits)


def test_without_grpc_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "grpc", None)
    with pytest.raises(StorageError, match=re.escape("pip install 'tuner[proxy]'")):
        open_remote("grpc://127.0.0.1:1")


def test_a_file_that_is_not_there_is_not_made(sqlite: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no such storage"):
        listen(sqlite, port=0)
    assert not (tmp_path / "tuner.db").exists()


def test_without_a_proxy_the_message_says_how_to_start_one() -> None:
    with pytest.raises(StorageError, match="start it there with tuner proxy") as caught:
        wait_until_ready("grpc://127.0.0.1:1", 0.3)
    assert caught.value.passes, "workers wait for it"


# Bad moments


def test_a_database_that_is_away_is_one_that_can_be_asked_again(ledgers: Proxied) -> None:
    ledgers.enqueue({})
    lease = claimed(ledgers.first, enter(ledgers.first))
    changes = epoch(0)
    ledgers.server.stop(0).wait()
    with pytest.raises(UnreachableError):
        ledgers.first.write(lease, changes, patience=0.5)
    assert changes.epochs, "what was not written is kept for the next time"


def test_who_asks_while_the_proxy_is_away_waits_until_it_is_back(ledgers: Proxied) -> None:
    ledgers.enqueue({})
    port = address(ledgers.proxy)[1]
    ledgers.server.stop(0).wait()
    back: list[Any] = []
    timer = threading.Timer(1.0, lambda: back.extend(listen(ledgers.url, port=port)))
    timer.start()
    worker = enter(ledgers.first)
    assert claimed(ledgers.first, worker).number == 0
    timer.join()
    back[0].stop(0).wait()


def test_an_error_of_the_database_is_not_one_to_wait_for(ledgers: Proxied) -> None:
    with pytest.raises(SQLAlchemyError) as caught:
        ledgers.first.trial(10**9)
    assert not passes(caught.value)


def test_ended_trials_of_others_cannot_be_changed(ledgers: Proxied) -> None:
    ledgers.enqueue({})
    lease = claimed(ledgers.first, enter(ledgers.first))
    complete(ledgers.first, lease)
    with pytest.raises(LeaseLostError):
        ledgers.first.write(lease, epoch(5))
    with pytest.raises((UpdateFinishedTrialError, StorageError)):
        open_remote(ledgers.proxy).set_trial_user_attr(lease.trial_id, "k", 1)


# Real processes


class Proxy:
    """A ``tuner proxy`` on one port, killed and started again."""

    def __init__(self, folder: Path, url: str) -> None:
        self.log, self.environment = folder / "proxy.txt", {**os.environ, "TUNER_STORAGE": url}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"grpc://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "tuner", "proxy", "--connections", "2"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port)], env=self.environment, stdout=log, stderr=log
            )
        until(lambda: "answers for" in self.log.read_text(), self.log.read_text)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def until(condition: Callable[[], Any], said: Callable[[], object] = lambda: "") -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, said()
        time.sleep(0.05)


def at_work(ledger: Ledger) -> set[str]:
    """Names of workers that have trained more than an epoch."""
    return {a["worker_id"] for a in ledger.attempts() if a["epoch"]}


def connections_to(url: str) -> int:
    """Connections to a PostgreSQL database but for the one that asks."""
    engine = sa.create_engine(url)
    count = "SELECT count(*) - 1 FROM pg_stat_activity WHERE datname = current_database()"
    with engine.connect() as connection:
        found = int(connection.execute(sa.text(count)).scalar_one())
    engine.dispose()
    return found


@pytest.mark.long
@pytest.mark.database
def test_four_workers_lose_nothing_when_their_proxy_is_killed_and_started_again(
    postgres: str, make_file: MakeFile, digits: Data, tmp_path: Path
) -> None:
    file = make_file(budget={"trials": 12, "epochs": 60}, search={"pruner": "none"})
    session = sessions.create(file, postgres, FolderStore(tmp_path / "artifacts"), digits)
    ledger, proxy = session.ledger, Proxy(tmp_path, postgres)
    with contextlib.closing(proxy), workers(proxy.url, "abcd", tmp_path) as processes:
        until(lambda: at_work(ledger) == set("abcd"), ledger.attempts)
        ledger.engine.dispose()
        assert connections_to(postgres) <= 4, "four workers and a proxy with two"
        proxy.close()
        assert ledger.running() > 0, "it happened in mid-trial"
        time.sleep(1.0)
        proxy.start()
        for process in processes:
            process.join(PATIENCE)
        assert [process.exitcode for process in processes] == [0] * 4
    trials, attempts = session.trials(), ledger.attempts()
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 12
    assert [a["end"] for a in attempts] == ["complete"] * 12
    known = [len(t.intermediate_values) for t in trials if "duplicate_of" not in t.user_attrs]
    assert set(known) == {60}, "epochs that could not be written were written later"


def test_trial_of_a_worker_killed_behind_the_proxy_is_found_by_another(
    proxied: str, sqlite: str, make_file: MakeFile, digits: Data, tmp_path: Path
) -> None:
    file = make_file(budget={"trials": 2, "epochs": 100_000}, search={"pruner": "none"})
    store = FolderStore(tmp_path / "artifacts")
    direct = sessions.create(file, sqlite, store, digits)
    with workers(proxied, ["dies"], tmp_path, lease="2") as (process,):
        until(lambda: any(a["epoch"] for a in direct.ledger.attempts()))
        process.kill()
        process.join()
    other = sessions.join("tiny", proxied, store)
    assert other.ledger.running() == 1
    until(lambda: other.ledger.reap() == [0])
    lease = claimed(other.ledger, enter(other.ledger, "other"))
    assert (lease.number, lease.attempt) == (0, 2)
