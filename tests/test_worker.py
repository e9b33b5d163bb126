"""Real processes: interrupted, killed and started again, they lose nothing."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from commands import Command
from conftest import MakeSession
from fleet import claim
from optuna.trial import TrialState

from tuner import session as sessions
from tuner.datasets import Data
from tuner.errors import TunerError
from tuner.rungs.outcome import Outcome
from tuner.session import Session
from tuner.stores import FolderStore
from tuner.worker import StopRequest, work

pytestmark = pytest.mark.timeout(600)

PATIENCE = 250.0
STUDY = """
name = "long"
[data]
name = "digits"
profile = { name = "exponential", ratio = 10 }
validation_fraction = 0.4
test_fraction = 0.3
[budget]
trials = 3
epochs = 60
[search]
pruner = "none"
[model]
name = "mlp"
[space.optimizer.sgd]
lr = { low = 0.05, high = 0.2, log = true }
[space.loss.cross_entropy]
[space.loss.balanced_softmax]
"""


class Run:
    """A ``tuner run`` in its own process, with its output in a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        (folder / "long.toml").write_text(STUDY)
        self.log = folder / "log.txt"

    @property
    def url(self) -> str:
        return f"sqlite:///{self.folder}/tuner.db"

    @property
    def arguments(self) -> list[str]:
        return ["-v", "run", "long.toml", "--device", "cpu", "--storage", self.url]

    def start(self) -> Command:
        self.log.write_text("")
        return Command(*self.arguments, log=self.log, folder=self.folder)

    def wait_for(self, text: str, process: Command) -> None:
        deadline = time.monotonic() + PATIENCE
        while text not in self.log.read_text():
            assert process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def session(self) -> Session:
        return sessions.join("long", self.url, FolderStore(self.folder / "runs/artifacts"))

    def results(self) -> list[tuple[Any, ...]]:
        return [
            (t.number, t.state.name, t.params, t.intermediate_values, t.user_attrs["metrics"])
            for t in self.session().trials()
        ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("undisturbed"))
    command = [sys.executable, "-m", "tuner", *run.arguments]
    with run.log.open("wb") as log:
        subprocess.run(command, cwd=run.folder, stdout=log, stderr=log, check=True)
    return run


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_goes_on_where_it_stopped(
    number: signal.Signals, undisturbed: Run, tmp_path: Path
) -> None:
    run = Run(tmp_path)
    process = run.start()
    run.wait_for("trial 1 epoch 3 ", process)
    process.send_signal(number)
    assert process.wait(PATIENCE) == 0, run.log.read_text()
    assert "goes on where this stopped" in run.log.read_text()
    states = [t.state for t in run.session().trials()]
    assert states == [TrialState.COMPLETE, TrialState.WAITING, TrialState.WAITING]

    process = run.start()
    assert process.wait(PATIENCE) == 0, run.log.read_text()
    assert "trial 1 epoch 0 " not in run.log.read_text(), "it went on from its checkpoint"
    assert run.results() == undisturbed.results()


def test_killed_run_loses_no_trial_and_ends_the_same(undisturbed: Run, tmp_path: Path) -> None:
    run = Run(tmp_path)
    process = run.start()
    run.wait_for("trial 1 epoch 3 ", process)
    process.kill()
    process.wait(PATIENCE)
    assert run.session().trials()[1].state == TrialState.RUNNING

    process = run.start()
    assert process.wait(PATIENCE) == 0, run.log.read_text()
    assert "trial 1 lost its worker" in run.log.read_text()
    assert run.results() == undisturbed.results()


@pytest.mark.long
def test_second_interrupt_stops_at_once_and_keeps_the_trial(tmp_path: Path) -> None:
    run = Run(tmp_path)
    slow = STUDY.replace('name = "mlp"', 'name = "mlp"\nwidth = 3000\ndepth = 4')
    (tmp_path / "long.toml").write_text(slow)
    process = run.start()
    run.wait_for("trial 0 epoch 0", process)
    process.send_signal(signal.SIGINT)
    run.wait_for("once more stops at once", process)
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 130, run.log.read_text()
    assert "interrupted; trial 0 goes on from its last checkpoint" in run.log.read_text()
    assert run.session().trials()[0].state == TrialState.WAITING


def test_finished_run_started_again_trains_nothing_and_answers_the_same(
    undisturbed: Run,
) -> None:
    before = undisturbed.results()
    process = undisturbed.start()
    assert process.wait(PATIENCE) == 0
    text = undisturbed.log.read_text()
    assert "epoch" not in text
    assert "plain cross-entropy" in text
    assert undisturbed.results() == before


def test_run_prints_the_table_the_files_and_the_next_commands(undisturbed: Run) -> None:
    text = undisturbed.log.read_text()
    for part in ("tail", "head", "overall", "balanced", "95 % interval", "best recipe"):
        assert part in text
    assert (undisturbed.folder / "runs/long/report.html").stat().st_size > 1_000_000
    written = sorted(p.name for p in (undisturbed.folder / "runs/long/best").iterdir())
    assert written == ["README.md", "metrics.json", "model.safetensors", "recipe.toml"]
    assert "tuner train runs/long/best/recipe.toml" in text


@pytest.mark.long
def test_exported_recipe_trains_to_the_stored_metrics(undisturbed: Run) -> None:
    command = [sys.executable, "-m", "tuner", "train", "runs/long/best/recipe.toml"]
    done = subprocess.run(
        [*command, "--device", "cpu", "-o", "again"],
        cwd=undisturbed.folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "reproduced: every metric equals" in done.stdout
    assert (undisturbed.folder / "again/model.safetensors").exists()


@pytest.mark.long
def test_two_workers_share_one_budget(
    make_session: MakeSession, sqlite: str, tmp_path: Path
) -> None:
    session = make_session(budget={"trials": 12, "epochs": 4}, search={"pruner": "none"})
    options = ["--storage", sqlite, "--artifacts", str(tmp_path / "artifacts"), "--slots", "1"]
    logs = [tmp_path / "one.txt", tmp_path / "two.txt"]
    workers = [
        Command("worker", "tiny", "--device", "cpu", *options, log=log, folder=tmp_path)
        for log in logs
    ]
    ended = [worker.wait(PATIENCE) for worker in workers]
    assert ended == [0, 0], [log.read_text() for log in logs]
    trials = session.study.trials
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 12
    assert {a["end"] for a in session.ledger.attempts()} == {"complete"}
    assert len(session.ledger.attempts()) == 12


def test_sigterm_that_comes_twice_at_once_is_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [50.0]
    with StopRequest(quiet=True).installed() as stop:
        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
        now[0] += 1.5
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def test_decoding_process_ends_when_told_and_leaves_the_stop_request_alone() -> None:
    with StopRequest().installed() as stop:
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
        child.start()
        assert child.pid is not None
        os.kill(child.pid, signal.SIGINT)
        time.sleep(0.2)
        assert child.is_alive(), "Ctrl-C goes to the whole group; only the owner decides"
        child.terminate()
        child.join(PATIENCE)
        assert child.exitcode == 143
        assert not stop.asked


@pytest.mark.parametrize("algorithm", ["tpe", "random", "gp"])
def test_every_algorithm_proposes_past_its_random_start(
    algorithm: str, make_session: MakeSession, digits: Data, sqlite: str
) -> None:
    session = make_session(
        budget={"trials": 13, "epochs": 3},
        search={"algorithm": algorithm, "prune_after": 0.4, "control": 0.0},
    )
    assert work(session, digits) == 13
    states = {t.state for t in session.trials()}
    assert states <= {TrialState.COMPLETE, TrialState.PRUNED}


def test_three_errors_in_a_row_stop_the_worker_with_the_traceback(
    make_session: MakeSession, digits: Data, sqlite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuner.rungs import training

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("somebody's bug")

    monkeypatch.setattr(training, "epochs_in_turns", broken)
    session = make_session(budget={"trials": 9, "epochs": 3})
    with pytest.raises(TunerError, match="somebody's bug"):
        work(session, digits)
    assert sum(t.state == TrialState.FAIL for t in session.trials()) == 3


def test_worker_hands_every_outcome_to_its_caller(
    make_session: MakeSession, digits: Data, sqlite: str
) -> None:
    outcomes: list[Outcome] = []
    ended = work(make_session(), digits, on_trial=outcomes.append)
    assert ended == 4
    assert [o.number for o in outcomes] == [0, 1, 2, 3]
    assert claim(make_session()) is None
