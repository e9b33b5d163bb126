"""What we write, Optuna reads; what Optuna writes, we read; and both may work side by side."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import datetime, timedelta
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from ledgers import Ledgers, at_once, claimed, complete, enter, epoch, expire, release
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import RandomSampler, TPESampler
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from tuner.ledger import FencedStorage, Lease, Ledger

ATTRS: dict[str, Any] = {
    "nested": {"a": [1, 2.5, None, True], "b": {"c": "text"}},
    "text": "ünïcode ✓ and 'quotes' \"too\" \\ %s %(x)s {y} :z",
    "long": "x" * 50_000,
    "none": None,
    "zero": 0,
    "nan": math.nan,
    "list": [],
}


def facts(trial: FrozenTrial) -> dict[str, Any]:
    """Everything about a trial, so that equal is equal though it may be NaN."""
    found = vars(trial)
    return {key: repr(ordered(value, key)) for key, value in sorted(found.items())}


def ordered(value: Any, key: str) -> Any:
    """What is in a mapping, but for parameters, which have an order."""
    if isinstance(value, dict) and key not in ("_params", "_distributions"):
        return sorted(value.items())
    return value


def same(ours: list[FrozenTrial], theirs: list[FrozenTrial]) -> bool:
    assert [facts(trial) for trial in ours] == [facts(trial) for trial in theirs]
    return True


def suggest_everything(trial: Trial) -> None:
    trial.suggest_float("float", -1.0, 1.0)
    trial.suggest_float("log", 1e-12, 1e12, log=True)
    trial.suggest_float("step", 0.1, 0.9, step=0.2)
    trial.suggest_int("int", -5, 5)
    trial.suggest_int("int log", 1, 2**20, log=True)
    trial.suggest_int("int step", 0, 100, step=5)
    trial.suggest_categorical("choice", ["a", 1, 0.5, None, True])
    trial.suggest_categorical("single", ["only"])
    trial.suggest_float("fixed", 0.3, 0.3)


def report_everything(trial: Trial) -> None:
    for step, value in enumerate([0.1, 1 / 3, 1e-300, -1e300, math.inf, -math.inf, math.nan]):
        trial.report(value, step)
    trial.report(0.7, 1000)
    for key, value in ATTRS.items():
        trial.set_user_attr(key, value)
        trial.storage.set_trial_system_attr(trial._trial_id, f"system {key}", value)


def make_our_trials(ledgers: Ledgers) -> list[Lease]:
    """One of ours in each state, by the way workers take."""
    ledger, fenced, leases = ledgers.first, ledgers.fenced(), []
    attrs: list[dict[str, Any]] = [{"baseline": True}, *[{"preset": "x"}] * 7]
    assert ledger.enqueue([({"int": 3, "choice": None}, attr) for attr in attrs], 0)
    for number in range(7):
        lease = claimed(ledger, enter(ledger, f"worker {number}"))
        leases.append(lease)
        trial = ledgers.trial(fenced, lease)
        suggest_everything(trial)
        report_everything(trial)
        fenced.flush(lease.trial_id)
        trial.set_user_attr("second", number)
        trial.report(0.25, 2000)
    ends: list[tuple[TrialState, list[float] | None]] = [
        (TrialState.COMPLETE, [1 / 3]),
        (TrialState.COMPLETE, [math.inf]),
        (TrialState.COMPLETE, [-math.inf]),
        (TrialState.PRUNED, None),
        (TrialState.FAIL, None),
        (TrialState.WAITING, None),
    ]
    for lease, (state, values) in zip(leases, ends, strict=False):
        fenced.finish(lease.trial_id, state, values, end=state.name.lower())
    fenced.flush(leases[6].trial_id)
    return leases


def test_optuna_reads_every_trial_as_we_wrote_it(ledgers: Ledgers) -> None:
    leases = make_our_trials(ledgers)
    theirs = ledgers.plain().trials
    names = ["COMPLETE", "COMPLETE", "COMPLETE", "PRUNED", "FAIL", "WAITING", "RUNNING", "WAITING"]
    assert [t.state.name for t in theirs] == names
    assert same(ledgers.first.trials(), theirs)
    assert same([ledgers.first.trial(t._trial_id) for t in theirs], theirs)
    pruned = theirs[leases[3].number]
    assert pruned.value == pruned.intermediate_values[2000] == 0.25
    written = {"baseline": True, **ATTRS, "second": 0}
    assert facts(theirs[0])["_user_attrs"] == repr(sorted(written.items()))
    assert theirs[0].params["int"] == 3
    assert ledgers.plain().best_trial.number == 1


@pytest.mark.parametrize("zone", ["UTC", "Asia/Kolkata", "America/St_Johns"])
def test_times_are_those_of_the_clock_on_the_wall(
    ledgers: Ledgers, zone: str, monkeypatch: pytest.MonkeyPatch, time_zone: None
) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    ledgers.enqueue({})
    complete(ledgers.first, claimed(ledgers.first, enter(ledgers.first)))
    (trial,) = ledgers.plain().trials
    assert trial.datetime_start is not None
    assert trial.datetime_complete is not None
    # MySQL keeps whole seconds; and the clocks of a server and of this machine may differ.
    assert abs(datetime.now() - trial.datetime_complete) < timedelta(seconds=60)
    assert trial.datetime_start <= trial.datetime_complete
    assert same(ledgers.first.trials(), [trial])


@pytest.fixture
def time_zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets a test change this process's time zone."""
    yield
    monkeypatch.undo()
    time.tzset()


def test_we_read_every_trial_as_optuna_wrote_it(ledgers: Ledgers) -> None:
    study = ledgers.plain()
    study.sampler = TPESampler(n_startup_trials=2, seed=0)

    def objective(trial: Trial) -> float:
        suggest_everything(trial)
        report_everything(trial)
        trial.set_constraint("floor", trial.number - 2)
        if trial.number == 1:
            raise optuna.TrialPruned
        if trial.number == 2:
            raise ValueError
        return math.inf if trial.number == 3 else trial.params["float"] / 3

    study.optimize(objective, n_trials=5, catch=ValueError)
    study.enqueue_trial({"float": 0.5}, user_attrs={"by": "them"})
    study.ask()
    study.enqueue_trial({"float": 0.25})
    states = [t.state.name for t in ledgers.first.trials()]
    assert states == [
        *("COMPLETE", "PRUNED", "FAIL", "COMPLETE", "COMPLETE"),
        *("RUNNING", "WAITING"),
    ]
    assert same(ledgers.first.trials(), study.trials)
    assert ledgers.first.trials()[1].constraints == {"floor": -1.0}
    assert same(ledgers.fenced().get_all_trials(ledgers.first.study_id), study.trials)


def test_trials_with_several_values_are_read_in_their_order(tables: str) -> None:
    study = optuna.create_study(storage=RDBStorage(tables), directions=["maximize"] * 3)
    study.optimize(lambda trial: (1.0, math.inf, trial.suggest_float("x", 0, 1)), n_trials=2)
    ledger = Ledger(Ledgers(tables).first.engine, study._study_id)
    assert same(ledger.trials(), study.trials)


def test_optunas_tables_are_those_we_know() -> None:
    """When this fails, compare Optuna's models with ``tuner.ledger._optuna``."""
    storage = RDBStorage("sqlite://")
    assert storage.get_head_version() == "v3.2.0.a"
    found = {
        name: sorted(column["name"] for column in sa.inspect(storage.engine).get_columns(name))
        for name in sa.inspect(storage.engine).get_table_names()
        if name.startswith("trial")
    }
    assert found == {
        "trial_heartbeats": ["heartbeat", "trial_heartbeat_id", "trial_id"],
        "trial_intermediate_values": [
            *("intermediate_value", "intermediate_value_type", "step"),
            *("trial_id", "trial_intermediate_value_id"),
        ],
        "trial_params": [
            *("distribution_json", "param_id", "param_name", "param_value", "trial_id"),
        ],
        "trial_system_attributes": ["key", "trial_id", "trial_system_attribute_id", "value_json"],
        "trial_user_attributes": ["key", "trial_id", "trial_user_attribute_id", "value_json"],
        "trial_values": ["objective", "trial_id", "trial_value_id", "value", "value_type"],
        "trials": [
            *("datetime_complete", "datetime_start", "number", "state"),
            *("study_id", "trial_id"),
        ],
    }


# Side by side


def objective(trial: Trial) -> float:
    return trial.suggest_float("x", 0, 1)


def test_plain_optuna_takes_a_ticket_of_ours_and_goes_on_when_there_are_none(
    ledgers: Ledgers,
) -> None:
    assert ledgers.first.enqueue([({"x": 0.125}, {"preset": "half"})], 0)
    plain = ledgers.plain()
    plain.optimize(objective, n_trials=2)
    ticket, own = ledgers.first.trials()
    assert (ticket.value, ticket.user_attrs) == (0.125, {"preset": "half"})
    assert (own.number, own.state) == (1, TrialState.COMPLETE)
    asked = plain.ask()
    plain.tell(asked, 0.5)
    assert ledgers.first.trials()[2].value == 0.5
    assert ledgers.first.enqueue([({}, {})], 3), "their trials count"


def test_plain_optuna_works_beside_our_workers(ledgers: Ledgers) -> None:
    ledgers.enqueue(*[{}] * 12)
    each = [ledgers.open() for _ in range(2)]

    def ours(ledger: Ledger, name: str) -> list[int]:
        worker, fenced, numbers = enter(ledger, name), ledgers.fenced(ledger), []
        while (lease := ledger.claim(worker)) is not None:
            trial = ledgers.trial(fenced, lease)
            trial.suggest_float("x", 0, 1)
            trial.report(0.5, 0)
            fenced.flush(lease.trial_id)
            fenced.finish(lease.trial_id, TrialState.COMPLETE, [0.5], end="complete")
            numbers.append(lease.number)
        return numbers

    def theirs() -> list[int]:
        study, numbers = ledgers.plain(), []
        study.sampler = RandomSampler()
        for _ in range(4):
            trial = study.ask()
            numbers.append(trial.number)
            trial.suggest_float("x", 0, 1)
            study.tell(trial, 0.25)
        return numbers

    # With SQLite plain Optuna itself may find the file locked, and give up.
    if ledgers.url.startswith("sqlite"):
        found = [theirs(), ours(each[0], "worker 0"), ours(each[1], "worker 1")]
    else:
        found = at_once(lambda n: ours(each[n], f"worker {n}") if n < 2 else theirs(), 3)
    numbers = sorted(sum(found, []))
    assert numbers[:12] == list(range(12)), "each ticket is taken once, by us or by them"
    trials = ledgers.first.trials()
    assert {t.state for t in trials} == {TrialState.COMPLETE}
    assert same(trials, ledgers.plain().trials)


def test_a_sampler_over_our_storage_knows_trials_of_plain_optuna(ledgers: Ledgers) -> None:
    ledgers.plain().optimize(objective, n_trials=3)
    ledgers.enqueue({})
    fenced = ledgers.fenced()
    trial = ledgers.trial(fenced, claimed(ledgers.first, enter(ledgers.first)))
    trial.report(0.5, 0)
    seen = trial.study.get_trials(deepcopy=False)
    assert [t.state.name for t in seen] == ["COMPLETE"] * 3 + ["RUNNING"]
    assert seen[3].intermediate_values == {0: 0.5}, "not yet written, but the worker's own"
    assert same(trial.study.get_trials(states=(TrialState.COMPLETE,)), seen[:3])


@pytest.mark.parametrize(
    ("distribution", "value"),
    [
        (FloatDistribution(1e-9, 1e9, log=True), 1.2345678901234567e-5),
        (FloatDistribution(-1e308, 1e308), -9.99999999999999e307),
        (IntDistribution(0, 2**52), 2**52 - 1),
        (CategoricalDistribution(("a", 2, None)), None),
    ],
)
def test_a_parameter_comes_back_to_the_last_bit(
    ledgers: Ledgers, distribution: BaseDistribution, value: Any
) -> None:
    ledgers.enqueue({})
    fenced = ledgers.fenced()
    lease = claimed(ledgers.first, enter(ledgers.first))
    fenced.take(lease)
    fenced.set_trial_param(lease.trial_id, "x", distribution.to_internal_repr(value), distribution)
    fenced.flush(lease.trial_id)
    for trial in (ledgers.first.trial(lease.trial_id), ledgers.plain().trials[0]):
        assert trial.params == {"x": value}
        assert trial.distributions == {"x": distribution}


# Reading again


class Reads:
    """Counts statements of a ledger's engine and the rows that come back."""

    def __init__(self) -> None:
        self.statements = self.rows = 0

    def statement(self, _c: Any, cursor: Any, text: str, _p: Any, _x: Any, _m: bool) -> None:
        self.statements += text.startswith("SELECT")
        self.rows += max(cursor.rowcount, 0)

    def row(self, _cursor: Any, row: tuple[Any, ...]) -> tuple[Any, ...]:
        self.rows += 1
        return row


@contextmanager
def counted(ledger: Ledger) -> Iterator[Reads]:
    """Counts what is read within the block."""
    reads, engine = Reads(), ledger.engine
    sa.event.listen(engine, "after_cursor_execute", reads.statement)
    if engine.dialect.name == "sqlite":
        # SQLite does not know how many rows there are before they are fetched.
        with engine.connect() as connection:
            raw: Any = connection.connection.dbapi_connection
        raw.row_factory = reads.row
    yield reads
    sa.event.remove(engine, "after_cursor_execute", reads.statement)


def fill(ledgers: Ledgers, ended: int, running: int, steps: int) -> None:
    ledger = ledgers.first
    have = len(ledger.trials())
    assert ledger.enqueue([({}, {})] * (ended + running), have)
    workers = [enter(ledger, f"running {have} {n}") for n in range(running)]
    held = [claimed(ledger, worker) for worker in workers]
    for lease in held:
        changes = epoch(0)
        changes.steps = dict.fromkeys(range(steps), 0.5)
        ledger.write(lease, changes)
    worker = enter(ledger)
    for _ in range(ended):
        complete(ledger, claimed(ledger, worker))


def test_reading_again_costs_neither_what_ended_nor_what_runs(tables: str) -> None:
    ended, costs = (TrialState.COMPLETE, TrialState.PRUNED), []
    for running, steps in [(1, 1), (5, 60)]:
        with closing(Ledgers(tables)) as ledgers:
            fill(ledgers, ended=6, running=running, steps=steps)
            reader = ledgers.open()
            assert len(reader.trials(ended)) == 6
            with counted(reader) as reads:
                reader.trials(ended)
            costs.append((reads.statements, reads.rows))
            fill(ledgers, ended=1, running=0, steps=0)
            with counted(reader) as later:
                assert len(reader.trials(ended)) == 7
            # Its id in both; the trial, its value, and its fixed parameters.
            assert later.rows == reads.rows + 4
    assert costs[0] == costs[1]
    # The ids of those that ended after the first one that runs.
    assert costs[0] == (1, 6)


def test_a_trial_that_ended_is_the_same_object_ever_after(ledgers: Ledgers) -> None:
    fill(ledgers, ended=2, running=1, steps=1)
    first = ledgers.first.trials((TrialState.COMPLETE,))
    again = ledgers.first.trials()
    assert all(one is two for one, two in zip(first, again[1:], strict=True))
    assert again[0] is not ledgers.first.trials()[0], "one that runs is read anew"


def test_history_follows_trials_through_all_their_states(ledgers: Ledgers) -> None:
    reader, ledger = ledgers.open(), ledgers.first
    ledgers.enqueue({}, {})

    def states() -> list[str]:
        return [trial.state.name for trial in reader.trials()]

    assert states() == ["WAITING", "WAITING"]
    one, two = enter(ledger, "one"), enter(ledger, "two")
    first, second = claimed(ledger, one), claimed(ledger, two)
    assert states() == ["RUNNING", "RUNNING"]
    complete(ledger, second)
    assert states() == ["RUNNING", "COMPLETE"]
    release(ledger, first)
    assert states() == ["WAITING", "COMPLETE"]
    claimed(ledger, one)
    expire(ledger)
    ledger.reap()
    ledgers.plain().enqueue_trial({})
    assert states() == ["WAITING", "COMPLETE", "WAITING"]
    complete(ledger, claimed(ledger, one))
    assert states() == ["COMPLETE", "COMPLETE", "WAITING"]
    complete(ledger, claimed(ledger, one))
    assert states() == ["COMPLETE"] * 3
    assert same(reader.trials(), ledgers.plain().trials)


def test_readers_miss_no_trial_while_others_end_and_make_them(ledgers: Ledgers) -> None:
    ledgers.enqueue(*[{}] * 30)
    writer, reader = ledgers.open(), ledgers.open()
    seen: list[int] = []

    def write() -> None:
        worker = enter(writer)
        while (lease := writer.claim(worker)) is not None:
            complete(writer, lease)

    def read() -> None:
        while not seen or seen[-1] < 30:
            trials = reader.trials()
            assert [t.number for t in trials] == list(range(30))
            seen.append(sum(t.state == TrialState.COMPLETE for t in trials))

    at_once(lambda n: (write, read)[n](), 2)
    assert seen == sorted(seen)


def test_our_storage_answers_as_optunas(ledgers: Ledgers) -> None:
    make_our_trials(ledgers)
    fenced: FencedStorage = ledgers.fenced()
    study, plain = optuna.Study(ledgers.name, fenced), ledgers.plain()
    assert study.directions == plain.directions
    study.set_user_attr("key", [1])
    assert study.user_attrs == plain.user_attrs == {"key": [1]}
    assert study.best_trial.number == plain.best_trial.number
    assert fenced.get_n_trials(study._study_id) == 8
    assert fenced.get_n_trials(study._study_id, TrialState.WAITING) == 2
    for number in range(8):
        trial_id = fenced.get_trial_id_from_study_id_trial_number(study._study_id, number)
        assert fenced.get_trial_number_from_id(trial_id) == number
        assert same([fenced.get_trial(trial_id)], [plain.trials[number]])
    assert ledgers.name in [s.study_name for s in fenced.get_all_studies()]
