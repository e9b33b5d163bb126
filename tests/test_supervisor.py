"""The slots of a machine as real processes: stopped, killed, crashed, and started again."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import Command
from conftest import MakeSession
from optuna.trial import TrialState

from tuner.datasets import Data
from tuner.errors import TunerError
from tuner.ledger import Lease
from tuner.pulse import Pulse, facts, process
from tuner.session import Session
from tuner.slots import SlotPlan, plan_slots
from tuner.supervisor import TAKEN, Sight, Supervisor, _child, _supervisor
from tuner.worker import SAME_REQUEST, work

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

PATIENCE = 250.0
ENDLESS: dict[str, Any] = {
    "budget": {"trials": 3, "epochs": 100_000},
    "search": {"pruner": "none"},
    "model": {"name": "mlp", "width": 500},
}
# Long enough for a machine so busy that a live process waits for seconds: what dies here is found
# by its process, and not by its lease.
LEASE = 60.0


def until(condition: Callable[[], Any], what: Callable[[], object] = lambda: "") -> Any:
    """What ``condition`` says once it says something; ``what`` is shown when it never does."""
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline, what()
        time.sleep(0.05)
    return found


class Machine:
    """A ``tuner worker`` in a process of its own, with its output in a file."""

    def __init__(self, folder: Path, url: str, *options: str, lease: float = LEASE) -> None:
        self.log = folder / "log.txt"
        self.log.touch()
        self.process = Command(
            "worker", "tiny", "--device", "cpu", "--artifacts", str(folder / "artifacts"), *options,
            log=self.log, folder=folder,
            environment={**os.environ, "TUNER_LEASE": f"{lease}", "TUNER_STORAGE": url},
        )  # fmt: skip

    @property
    def text(self) -> str:
        return self.log.read_text()

    def wait_for(self, *parts: str) -> None:
        def all_said() -> bool:
            assert self.process.poll() is None, self.text
            return all(part in self.text for part in parts)

        until(all_said, lambda: self.text)

    def slots(self) -> list[int]:
        """Process numbers of its slots."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        return [int(child) for child in children.split()]

    def end(self) -> int:
        """Wait until it ends; its exit code."""
        return self.process.wait(PATIENCE)


@pytest.fixture
def machine(tmp_path: Path, sqlite: str) -> Iterator[Callable[..., Machine]]:
    """Starts workers on the study of ``make_session``; none outlives the test."""
    machines: list[Machine] = []

    def start(*options: str, lease: float = LEASE) -> Machine:
        machines.append(Machine(tmp_path, sqlite, *options, lease=lease))
        return machines[-1]

    yield start
    for one in machines:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait(PATIENCE)


def states(session: Session) -> list[TrialState]:
    return [trial.state for trial in session.trials()]


def fake(code: str) -> Callable[[SlotPlan, str], Sequence[str]]:
    """A command for slots that do something else than training, and start quickly."""
    return lambda plan, name: [sys.executable, "-S", "-c", code, plan.name, name]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a supervisor in this process warns of, with next to no pauses between its starts."""
    lines: list[str] = []
    monkeypatch.setattr(_child, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(_child, "REST", 0.01)
    monkeypatch.setattr(_supervisor.log, "warning", lambda text, *args: lines.append(text % args))
    return lines


def test_two_slots_run_exactly_the_budget_with_a_line_per_epoch(
    make_session: MakeSession, machine: Callable[..., Machine], sqlite: str
) -> None:
    # So many that the slot which starts first does not train them all alone.
    session = make_session(budget={"trials": 24, "epochs": 3}, search={"pruner": "none"})
    worker = machine("--slots", "2", "--id", "me")
    worker.wait_for("slot 0 · trial", "slot 1 · trial")
    for pid in worker.slots():
        arguments = Path(f"/proc/{pid}/cmdline").read_text()
        assert sqlite not in arguments, "where the storage is may hold a password"
    assert worker.end() == 0, worker.text
    assert states(session) == [TrialState.COMPLETE] * 24
    attempts = session.ledger.attempts()
    assert [a["end"] for a in attempts] == ["complete"] * 24
    assert {a["worker_id"] for a in attempts} == {"me/0", "me/1"}
    lines = worker.text.splitlines()
    assert sum("· epoch " in line for line in lines) == 72
    assert sum(line.endswith(" samples/s") for line in lines) == 72
    assert sum("· complete 0." in line for line in lines) == 24
    assert lines[-1] == "study tiny: the budget is spent"


def test_ctrl_c_lets_slots_keep_their_trials_and_another_worker_goes_on_from_there(
    make_session: MakeSession, machine: Callable[..., Machine], digits: Data
) -> None:
    session = make_session(**ENDLESS)
    worker = machine("--slots", "2")
    worker.wait_for("slot 0 · trial", "slot 1 · trial")
    assert worker.process.pid not in map(os.getpgid, worker.slots()), "Ctrl-C must not reach them"
    os.killpg(worker.process.pid, signal.SIGINT)  # as a terminal does
    assert worker.end() == 0, worker.text
    assert worker.text.count("once more stops at once") == 1
    assert worker.text.endswith("stopped; every trial goes on where it was, here or elsewhere\n")
    assert states(session) == [TrialState.WAITING] * 3
    assert [a["end"] for a in session.ledger.attempts()] == ["preempted"] * 2

    epochs: list[tuple[int, int]] = []
    work(
        session, digits,
        stop=lambda: bool(epochs),
        on_epoch=lambda trial, result, _: epochs.append((trial.number, result.epoch)),
    )  # fmt: skip
    assert epochs[0][0] == 0
    assert epochs[0][1] > 0


def test_told_twice_slots_leave_at_once_and_put_their_trials_back(
    make_session: MakeSession, machine: Callable[..., Machine]
) -> None:
    slow = {"name": "mlp", "width": 3000, "depth": 4}
    session = make_session(**ENDLESS | {"model": slow, "training": {"batch_size": 256}})
    worker = machine("--slots", "1")
    until(session.ledger.running, lambda: worker.text)
    worker.process.send_signal(signal.SIGTERM)
    worker.wait_for("once more stops at once")
    time.sleep(SAME_REQUEST)
    worker.process.send_signal(signal.SIGTERM)
    assert worker.end() == 130, worker.text
    assert states(session) == [TrialState.WAITING] * 3


def test_killed_slot_starts_again_and_gets_its_trial_back(
    make_session: MakeSession, machine: Callable[..., Machine]
) -> None:
    session = make_session(**ENDLESS)
    worker = machine("--slots", "1", "--id", "me")
    worker.wait_for("epoch 3/")
    os.kill(worker.slots()[0], signal.SIGKILL)
    until(lambda: len(session.ledger.attempts()) == 2, lambda: worker.text)
    first, second = session.ledger.attempts()
    assert (first["end"], first["worker_id"]) == ("lost", "me/0")
    assert (second["trial_id"], second["worker_id"]) == (first["trial_id"], "me/0")
    assert "slot 0 was killed by SIGKILL (out of memory?); it starts again in" in worker.text
    worker.process.terminate()
    assert worker.end() == 0


def test_slots_leave_when_their_supervisor_is_killed(
    make_session: MakeSession, machine: Callable[..., Machine]
) -> None:
    session = make_session(**ENDLESS)
    worker = machine("--slots", "1")
    worker.wait_for("slot 0 · trial")
    slots = worker.slots()
    worker.process.kill()
    worker.process.wait(PATIENCE)
    until(lambda: all(process(pid) is None for pid in slots))
    assert states(session) == [TrialState.WAITING] * 3
    assert [a["end"] for a in session.ledger.attempts()] == ["preempted"]


def test_second_worker_of_one_name_leaves_and_nothing_runs_twice(
    make_session: MakeSession, machine: Callable[..., Machine]
) -> None:
    session = make_session(**ENDLESS)
    # The second one waits for a sign of life: four in a lease.
    worker = machine("--slots", "1", "--id", "me", lease=20.0)
    worker.wait_for("slot 0 · trial")
    second = machine("--slots", "1", "--id", "me")
    assert second.end() == 1
    assert second.text.count("give this one another --id") == 1
    assert worker.process.poll() is None
    assert [a["end"] for a in session.ledger.attempts()] == [None]
    worker.process.terminate()
    assert worker.end() == 0


def test_two_workers_of_one_name_share_its_slots_and_say_so(
    make_session: MakeSession, machine: Callable[..., Machine], digits: Data, sqlite: str
) -> None:
    session = make_session(**ENDLESS)
    # As another worker's slot does that was started at the same moment.
    other = ("me/1", session.ledger.register("me/1", facts("cpu") | {"machine": "elsewhere"}))
    worker = machine("--slots", "2", "--id", "me", lease=20.0)
    with Pulse(session.ledger, other) as pulse:
        worker.wait_for("slot 0 · trial")

        def refused() -> bool:
            pulse.beat()
            return "slot 1 stays empty: a worker me/1 is at work on" in worker.text

        until(refused, lambda: worker.text)
    assert "give this one another --id" in worker.text
    assert worker.process.poll() is None, "slot 0 works on"
    worker.process.terminate()
    assert worker.end() == 0, worker.text
    assert {a["worker_id"] for a in session.ledger.attempts()} == {"me/0"}


def test_slots_whose_names_are_all_taken_end_with_the_reason(
    make_session: MakeSession, said: list[str]
) -> None:
    code = f"import sys; print('tuner: a worker', sys.argv[2], 'is at work'); sys.exit({TAKEN})"
    supervisor = Supervisor(make_session(), plan_slots(cores=2), "me", fake(code))
    with pytest.raises(TunerError, match="^a worker me/. is at work$"):
        supervisor.run()
    assert len(said) == 1
    assert " stays empty: a worker me/" in said[0]


def test_what_the_user_can_cure_is_said_once_and_ends_all_slots(
    make_session: MakeSession, said: list[str]
) -> None:
    code = "import sys; print('tuner: the disk is full;\\n  make room'); sys.exit(1)"
    supervisor = Supervisor(make_session(), plan_slots(cores=3), "me", fake(code))
    with pytest.raises(TunerError, match=r"^the disk is full;\n  make room$"):
        supervisor.run()
    assert said == []


def test_slot_that_always_crashes_is_given_up_and_the_others_go_on(
    make_session: MakeSession, said: list[str]
) -> None:
    code = (
        "import os, sys, time\nos.kill(os.getpid(), 11) if sys.argv[1] == '0' else time.sleep(600)"
    )
    supervisor = Supervisor(
        make_session(), plan_slots(cores=2), "me", fake(code),
        stop=lambda: supervisor.children[0].given_up,
    )  # fmt: skip
    assert supervisor.run() is None
    assert sum("slot 0 was killed by SIGSEGV" in line for line in said) == 5
    assert said[-1] == "slot 0 crashed 5 times in a row; it is given up"


def test_worker_without_a_slot_left_says_so(make_session: MakeSession, said: list[str]) -> None:
    supervisor = Supervisor(make_session(), plan_slots(cores=2), "me", fake("raise SystemExit(7)"))
    with pytest.raises(TunerError, match="every slot of this machine crashed 5 times in a row"):
        supervisor.run()
    assert sum("ended with exit code 7" in line for line in said) == 10


def test_slot_whose_trials_end_is_not_given_up(
    make_session: MakeSession, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = make_session()
    supervisor = Supervisor(session, plan_slots(cores=1), "me", fake("raise SystemExit(7)"))
    child, look = supervisor.children[0], supervisor.watch.look

    def one_more_ended() -> Sight:
        supervisor.watch.sight = replace(look(), ended={"me/0": child.crashes + len(said)})
        return supervisor.watch.sight

    monkeypatch.setattr(supervisor.watch, "look", one_more_ended)
    supervisor.stop = lambda: len(said) >= 8
    assert supervisor.run() is None
    assert not child.given_up


def test_slots_see_their_own_gpu_and_where_the_study_is(
    make_session: MakeSession, said: list[str], tmp_path: Path
) -> None:
    keys = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TUNER_STORAGE")
    code = (
        "import os, sys, time, pathlib\n"
        f"seen = ' '.join(os.environ[key] for key in {keys})\n"
        f"pathlib.Path({str(tmp_path)!r}, 'seen-' + sys.argv[1]).write_text(seen)\n"
        "time.sleep(600)"
    )
    plans = plan_slots(cores=8, visible=["3", "GPU-8932f937"], slots_per_gpu=lambda _: [2, 1])
    Supervisor(
        make_session(), plans, "me", fake(code),
        environment={"TUNER_STORAGE": "sqlite:///there.db", "CUDA_VISIBLE_DEVICES": "3,5"},
        stop=lambda: len(list(tmp_path.glob("seen-*"))) == 3,
    ).run()  # fmt: skip
    seen = [path.read_text() for path in sorted(tmp_path.glob("seen-*"))]
    assert seen == [f"{gpu} 1 sqlite:///there.db" for gpu in ("3", "GPU-8932f937", "3")]


def test_slot_that_does_not_stop_in_time_is_killed_with_what_it_started(
    make_session: MakeSession, said: list[str], tmp_path: Path
) -> None:
    code = (
        "import os, signal, time, pathlib\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "fork = os.fork()\n"
        f"new = pathlib.Path({str(tmp_path)!r}, 'new')\n"
        "fork and (new.write_text(str(fork)), new.rename(new.with_name('fork')))\n"
        "time.sleep(600)"
    )
    supervisor = Supervisor(
        make_session(), plan_slots(cores=1), "me", fake(code), grace=0.2,
        stop=(tmp_path / "fork").exists,
    )  # fmt: skip
    assert supervisor.run() is None
    assert said == ["slot 0 did not stop within 0.2 s; its trial is put back"]
    until(lambda: process(int((tmp_path / "fork").read_text())) is None)


def claimed_elsewhere(session: Session) -> tuple[tuple[str, int], Lease]:
    """A worker of another machine that holds the only trial."""
    other = ("other/0", session.ledger.register("other/0", facts("cpu") | {"machine": "other"}))
    lease = session.ledger.claim(other)
    assert lease is not None
    return other, lease


def test_machine_waits_for_trials_that_may_get_lost_elsewhere(
    make_session: MakeSession, said: list[str]
) -> None:
    session = make_session(budget={"trials": 1, "epochs": 3})
    other, _ = claimed_elsewhere(session)
    sights: list[Sight] = []
    started = threading.Event()

    def lose(sight: Sight) -> None:
        sights.append(sight)
        if len(sights) == 1:
            assert not supervisor.alive, "there is no ticket for it"
            session.ledger.reap([other])
        elif supervisor.alive:
            started.set()

    supervisor = Supervisor(
        session, plan_slots(cores=2), "me", fake("import time; time.sleep(600)"),
        show=lose, stop=started.is_set,
    )  # fmt: skip
    supervisor.run()
    assert [s.waiting for s in (sights[0], sights[-1])] == [0, 1]
    assert sights[0].running == 1


def test_machine_that_need_not_wait_leaves_the_last_trials_to_others(
    make_session: MakeSession, said: list[str]
) -> None:
    session = make_session(budget={"trials": 1, "epochs": 3})
    claimed_elsewhere(session)
    supervisor = Supervisor(session, plan_slots(cores=1), "me", fake(""), wait=False)
    assert supervisor.run() == "over"


def test_fleet_that_was_told_to_stop_starts_nothing(
    make_session: MakeSession, said: list[str]
) -> None:
    session = make_session()
    session.ledger.give_order("stop", "hours")
    supervisor = Supervisor(session, plan_slots(cores=1), "me", fake("raise SystemExit(7)"))
    assert supervisor.run() == "stop: hours"
    assert said == []


def test_fleet_that_was_stopped_for_an_error_says_which(
    make_session: MakeSession, said: list[str]
) -> None:
    session = make_session()
    session.ledger.give_order("stop", "code_error", "Traceback: somebody's bug")
    supervisor = Supervisor(session, plan_slots(cores=1), "me", fake("raise SystemExit(7)"))
    with pytest.raises(TunerError, match=r"three trials in a row(.|\n)*somebody's bug"):
        supervisor.run()


def test_no_more_slots_start_than_there_are_tickets(
    make_session: MakeSession, said: list[str]
) -> None:
    session = make_session(budget={"trials": 2, "epochs": 3})
    alive: list[int] = []

    def count(_: Sight) -> None:
        alive.append(len(supervisor.alive))

    supervisor = Supervisor(
        session, plan_slots(cores=5), "me", fake("import time; time.sleep(600)"),
        stop=lambda: alive[-3:].count(2) == 3 or max(alive, default=0) > 2, show=count,
    )  # fmt: skip
    supervisor.run()
    assert max(alive) == 2, "three readings later there are no more"


def test_what_slots_say_is_passed_on_with_their_name(
    make_session: MakeSession, said: list[str]
) -> None:
    lines: list[tuple[str, str]] = []
    code = "import time; print('hello\\n\\nthere', flush=True); time.sleep(600)"
    Supervisor(
        make_session(), plan_slots(cores=1), "me", fake(code),
        say=lambda slot, line: lines.append((slot, line)), stop=lambda: len(lines) == 2,
    ).run()  # fmt: skip
    assert lines == [("0", "hello"), ("0", "there")]


def test_storage_that_does_not_answer_keeps_nobody_from_stopping(
    make_session: MakeSession, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = make_session()
    over = threading.Event()
    supervisor = Supervisor(
        session, plan_slots(cores=1), "me", fake("import time; time.sleep(600)")
    )
    look = supervisor.watch.look

    def look_once() -> Sight:
        if supervisor.watch.sight is not None:
            over.wait(PATIENCE)
        return look()

    monkeypatch.setattr(supervisor.watch, "look", look_once)
    supervisor.stop = lambda: bool(supervisor.alive)
    began = time.monotonic()
    with contextlib.closing(supervisor.watch):
        supervisor.run()
    over.set()
    assert time.monotonic() - began < PATIENCE / 2


def test_lines_that_nobody_reads_end_no_work() -> None:
    """Whoever read them may have died: the supervisor, or a pager at the end of a pipe."""
    code = "from tuner.cli import say; say('one'); say('two'); print('still here')"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=writer)
    os.close(writer)
    assert (done.returncode, done.stdout) == (0, b"still here\n")
