"""Trials that take turns on one device: side by side they end as one after another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from conftest import MakeSession
from fleet import slot
from optuna.trial import TrialState
from replayed import Replaying

from tuner.backends import Speed
from tuner.datasets import Data
from tuner.ledger import Changes
from tuner.pulse import facts
from tuner.rungs import full, training
from tuner.rungs.full import run
from tuner.rungs.outcome import Outcome, Slot
from tuner.rungs.turns import Turns
from tuner.session import Session
from tuner.slots import lanes_on
from tuner.tickets import next_lease
from tuner.trainer import EpochResult, epochs_in_turns
from tuner.worker import work

WAITS = 3
STUDY: dict[str, Any] = {
    "budget": {"trials": 7, "epochs": 3},
    "search": {"algorithm": "random", "pruner": "none"},
}


class Device:
    """A processor that behaves as a device on which lanes train while the host does not."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        self.under_way = 0
        self.most = 0
        self.room: int | None = None
        self.trained = 0

    def chosen(self, *_: object) -> Speed:
        return Speed("float32", "channels_last", 0.0, "plain", self.lanes)

    def epochs(self, *arguments: Any, **options: Any) -> Iterator[EpochResult | None]:
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            if self.room is not None and self.under_way > self.room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            for result in epochs_in_turns(*arguments, **options):
                yield from [None] * WAITS
                self.trained += 1
                yield result
        finally:
            self.under_way -= 1


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    found = Device(3)
    monkeypatch.setattr(full, "chosen", found.chosen)
    monkeypatch.setattr(training, "epochs_in_turns", found.epochs)
    return found


def results(session: Session) -> dict[int, Any]:
    return {
        t.number: (t.state, t.params, t.values, t.user_attrs["metrics"])
        for t in session.trials()
        if t.state == TrialState.COMPLETE
    }


def test_trials_side_by_side_end_as_one_after_another(
    make_session: MakeSession, digits: Data, device: Device
) -> None:
    together = make_session(**STUDY)
    assert work(together, digits) == 7
    assert device.most == 3
    device.lanes = 1
    alone = make_session(name="alone", **STUDY)
    assert work(alone, digits) == 7
    assert results(together) == results(alone)
    assert len(results(alone)) == 7


def test_environment_limits_the_lanes_of_whoever_works(
    make_session: MakeSession, digits: Data, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNER_LANES", "2")
    monkeypatch.setattr("tuner.worker.lanes_on", lambda _: lanes_on("cuda"))
    assert work(make_session(**STUDY), digits) == 7
    assert device.most == 2


def test_every_trial_is_told_once_and_none_is_left(
    make_session: MakeSession, digits: Data, device: Device
) -> None:
    outcomes: list[Outcome] = []
    session = make_session(**STUDY)
    work(session, digits, on_trial=outcomes.append)
    assert sorted(outcome.number for outcome in outcomes) == list(range(7))
    assert not session.trials(TrialState.RUNNING)
    ends = Counter(attempt["end"] for attempt in session.ledger.attempts())
    assert ends == {"complete": 7}


def test_stop_puts_all_trials_back_and_they_go_on(
    make_session: MakeSession, digits: Data, device: Device
) -> None:
    asked = iter(range(10**9))
    session = make_session(**STUDY)
    work(session, digits, stop=lambda: next(asked) > 120)
    counts = Counter(t.state for t in session.trials())
    assert counts[TrialState.RUNNING] == 0
    assert counts[TrialState.COMPLETE] < 7
    ends = [attempt["end"] for attempt in session.ledger.attempts()]
    assert ends.count("preempted") == 3
    work(session, digits)
    assert len(results(session)) == 7
    undisturbed = make_session(name="undisturbed", **STUDY)
    work(undisturbed, digits)
    assert results(session) == results(undisturbed)


def test_trial_for_which_there_is_no_memory_waits_for_its_turn(
    make_session: MakeSession, digits: Data, device: Device
) -> None:
    device.room = 2
    session = make_session(**STUDY)
    work(session, digits)
    assert len(results(session)) == 7
    ends = Counter((a["end"], a["reason"]) for a in session.ledger.attempts())
    assert ends == {("complete", None): 7, ("released", "out_of_memory"): 1}


def test_error_of_one_trial_puts_the_others_back(
    make_session: MakeSession, digits: Data, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = make_session(**STUDY)
    calls = iter(range(100))

    def interrupted(*arguments: Any, **options: Any) -> Iterator[EpochResult | None]:
        if next(calls) == 2:
            raise KeyboardInterrupt
        yield from device.epochs(*arguments, **options)

    monkeypatch.setattr(training, "epochs_in_turns", interrupted)
    with pytest.raises(KeyboardInterrupt):
        work(session, digits)
    assert not session.trials(TrialState.RUNNING)
    assert {a["end"] for a in session.ledger.attempts()} == {"preempted"}


def held(session: Session, data: Data, count: int) -> tuple[Slot, Turns]:
    """A slot with so many trials under way."""
    worker = "lanes", session.ledger.register("lanes", facts("cpu"))
    claimed = next_lease(session, worker)
    assert claimed is not None
    own = slot(session, data, claimed)
    turns = Turns(own)
    while claimed is not None:
        running = run(own, claimed, stop=lambda: False)
        turns.admit(claimed, running, [])
        assert not turns.go_on()
        tokens = [entry.lease.token for entry in turns.entries]
        claimed = next_lease(session, worker, tokens) if len(turns) < count else None
    return own, turns


def test_heartbeat_keeps_all_trials_at_hand_alive(
    make_session: MakeSession, digits: Data, device: Device
) -> None:
    session = make_session(**STUDY)
    own, turns = held(session, digits, 3)
    before = {a["token"]: a["lease_until"] for a in session.ledger.attempts()}
    assert len(before) == 3
    own.pulse.beat()
    after = {a["token"]: a["lease_until"] for a in session.ledger.attempts()}
    assert all(after[token] > before[token] for token in before)
    turns.close()
    assert not session.trials(TrialState.RUNNING)


def ends(turns: Turns) -> dict[int, str]:
    """How the trials under way end, by number."""
    ended = []
    while turns:
        ended += turns.go_on()
    return {entry.lease.number: entry.outcomes[-1].state for entry in ended}


def test_lost_trial_leaves_its_neighbours_alone(
    make_session: MakeSession, digits: Data, device: Device
) -> None:
    session = make_session(**STUDY)
    _, turns = held(session, digits, 3)
    taken = turns.entries[1].lease
    session.ledger.finish(taken, Changes(), state=TrialState.WAITING, end="lost")
    expected = {0: "complete", 1: "complete", 2: "complete", taken.number: "lost"}
    assert ends(turns) == expected
    assert [t.number for t in session.trials(TrialState.COMPLETE)] == [0, 2]


def test_worker_that_was_given_up_has_lost_all_its_trials(
    make_session: MakeSession, digits: Data, device: Device
) -> None:
    session = make_session(**STUDY)
    own, turns = held(session, digits, 3)
    session.ledger.reap([own.pulse.worker])
    assert ends(turns) == {0: "lost", 1: "lost", 2: "lost"}
    assert not session.trials(TrialState.COMPLETE)


def by_graphs(*_: object) -> Speed:
    return Speed("float32", "channels_last", 0.0, "graph", 3)


@pytest.mark.gpu
def test_gpu_trains_side_by_side_what_it_trains_one_by_one(
    make_session: MakeSession, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setattr(full, "chosen", by_graphs)
    data = digits.to("cuda")
    together, alone = make_session(**STUDY), make_session(name="alone", **STUDY)
    assert work(together, data, device="cuda") == 7
    assert work(alone, data, device="cuda", lanes=1) == 7
    assert results(together) == results(alone)
    assert len(results(alone)) == 7
    spans = sorted((a["claimed_at"], a["ended_at"]) for a in together.ledger.attempts())
    assert any(later < end for (_, end), (later, _) in pairwise(spans)), "none beside another"


def in_groups(*_: object) -> Speed:
    return Speed("float32", "channels_last", 0.0, "grouped", 3)


def test_trials_in_groups_end_as_each_in_a_group_without_others(
    make_session: MakeSession, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaying, seated = Replaying.by(monkeypatch), list[int]()
    monkeypatch.setattr(full, "chosen", in_groups)
    together, alone = make_session(**STUDY), make_session(name="alone", **STUDY)

    def count(*_: object) -> None:
        seated.extend(len(stack.lanes) for stack in replaying.stacks.stacks)

    assert work(together, digits, on_epoch=count) == 7
    assert max(seated) == 3
    assert work(alone, digits, lanes=1) == 7
    assert results(together) == results(alone)


@pytest.mark.gpu
def test_gpu_trains_in_groups_what_it_trains_one_by_one(
    make_session: MakeSession, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setattr(full, "chosen", in_groups)
    data = digits.to("cuda")
    together, alone = make_session(**STUDY), make_session(name="alone", **STUDY)
    assert work(together, data, device="cuda") == 7
    assert work(alone, data, device="cuda", lanes=1) == 7
    assert results(together) == results(alone)


def test_stage_that_trials_share_is_trained_by_one_of_them_while_the_others_wait(
    make_session: MakeSession, digits: Data, device: Device
) -> None:
    device.lanes = 4
    session = make_session(
        budget={"trials": 9, "epochs": 5},
        search={"algorithm": "random", "pruner": "none"},
        training={"name": "deferred", "switch": 0.6},
        # A cosine head has a stage one of its own, which the baseline does not train.
        space={"loss": {"ldam": {"max_margin": {"low": 0.1, "high": 0.9}}}},
    )
    work(session, digits)
    done = session.trials(TrialState.COMPLETE)
    branched = [t.number for t in done if t.user_attrs.get("branched_from")]
    assert len(done) == 9
    assert branched == list(range(2, 9))
    assert device.trained == 2 * 5 + 7 * 2
