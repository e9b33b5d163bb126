"""What is submitted to Slurm, and what its jobs do when Slurm takes their machine away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy
from conftest import MakeFile
from optuna.trial import TrialState
from typer.testing import CliRunner

from tuner import session as sessions
from tuner.cli import app
from tuner.cli import launch as _commands  # noqa: F401  (registers its commands)
from tuner.datasets import Data
from tuner.errors import TunerError
from tuner.launch import Place
from tuner.launch._slurm import Array, Job, _may_return, minutes, run_and_tell, submit
from tuner.session import Session
from tuner.stores import FolderStore

pytest.importorskip("submitit")
pytestmark = pytest.mark.timeout(600)

PATIENCE = 250.0
PASSWORD = "sesame-open-yourself"
LONG: dict[str, Any] = {
    "budget": {"trials": 2, "epochs": 300},
    "search": {"pruner": "none"},
    "model": {"name": "mlp", "width": 128},
}
COMMANDS = {
    "sbatch": 'cp "$1" "$SLURM/script.sh"; env > "$SLURM/environment"\n'
    'echo "Submitted batch job 4242"',
    # Options go first; of those before the program only --output has its value apart.
    "srun": 'while [ "${1#-}" != "$1" ]; do [ "$1" = --output ] && shift; shift; done\n'
    'echo $$ > "$SLURM/task"; exec "$@"',
    "squeue": 'cat "$SLURM/state"',
    "scontrol": 'echo "$@" >> "$SLURM/controlled"',
}


class Slurm:
    """Slurm's commands as far as they are called here, and what they were told."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        for name, text in COMMANDS.items():
            (folder / name).write_text(f"#!/bin/sh\n{text}\n")
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        monkeypatch.setenv("SLURM", str(folder))
        self.say("RUNNING")

    def say(self, state: str) -> None:
        (self.folder / "state").write_text(f"{state}\n")

    @property
    def script(self) -> str:
        return (self.folder / "script.sh").read_text()

    @property
    def controlled(self) -> list[str]:
        file = self.folder / "controlled"
        return file.read_text().splitlines() if file.exists() else []

    def run(self, index: int, log: Path) -> subprocess.Popen[bytes]:
        """Run a job of the array, as Slurm does."""
        names = {"SLURM_JOB_ID": 4243, "SLURM_ARRAY_JOB_ID": 4242, "SLURM_ARRAY_TASK_ID": index}
        environment = os.environ | {name: str(value) for name, value in names.items()}
        with log.open("ab") as file:
            return subprocess.Popen(
                ["bash", str(self.folder / "script.sh")], env=environment, stdout=file, stderr=file
            )

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the task, as Slurm does."""
        os.kill(int((self.folder / "task").read_text()), number)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    folder = tmp_path / "bin"
    folder.mkdir()
    return Slurm(folder, monkeypatch)


@pytest.fixture
def session(postgres: str, make_file: MakeFile, digits: Data, tmp_path: Path) -> Session:
    return sessions.create(make_file(**LONG), postgres, FolderStore(tmp_path / "artifacts"), digits)


def until(condition: Callable[[], Any], log: Path) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    return found


def launch(*words: str) -> str:
    """Run ``tuner launch slurm``; what it printed."""
    done = CliRunner().invoke(app, ["launch", "slurm", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def with_password(url: str) -> str:
    made = sqlalchemy.make_url(url).set(password=PASSWORD)
    return made.render_as_string(hide_password=False)


def test_array_is_submitted_with_signal_and_requeue_and_no_password(
    slurm: Slurm, session: Session, postgres: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TUNER_STORAGE", "TUNER_ARTIFACTS", "TUNER_DATA"):
        monkeypatch.setenv(name, "")
    jobs = tmp_path / "jobs"
    words = ["tiny", "-n", "3", "--storage", with_password(postgres), "--folder", str(jobs)]
    words += ["--artifacts", str(tmp_path / "artifacts"), "--time", "1-12", "--partition", "gpu"]
    words += ["--slurm", "account=physics", "--slurm", "--exclusive"]
    shown = launch(*words, "--dry-run")
    assert not (slurm.folder / "script.sh").exists(), "nothing was submitted"
    printed = launch(*words)
    assert printed == f"submitted as job 4242; logs are in {jobs}; to stop: scancel 4242\n"
    for option in (
        *("array=0-2%3", "signal=TERM@120", "requeue", "time=2160", "gpus-per-node=1"),
        *("cpus-per-task=4", "partition=gpu", "account=physics", "exclusive"),
    ):
        assert f"#SBATCH --{option}\n" in slurm.script
    assert "--cpus-per-task=4" in slurm.script.split("srun")[1], "the step has its job's cores"
    assert shown.strip() == slurm.script.strip()
    environment = (slurm.folder / "environment").read_text()
    assert f"TUNER_STORAGE={with_password(postgres)}\n" in environment
    written = [path for path in jobs.rglob("*") if path.is_file()]
    assert {"4242_0_submitted.pkl", "4242_2_submitted.pkl"} <= {path.name for path in written}
    assert not [path for path in written if PASSWORD.encode() in path.read_bytes()]
    assert PASSWORD not in slurm.script + shown + printed


@pytest.mark.long
def test_job_whose_time_is_up_comes_back_under_its_name_and_loses_nothing(
    slurm: Slurm, session: Session, postgres: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TUNER_DATA", raising=False)
    log, jobs = tmp_path / "log.txt", tmp_path / "jobs"
    monkeypatch.setenv("TUNER_STORAGE", postgres)
    monkeypatch.setenv("TUNER_ARTIFACTS", str(tmp_path / "artifacts"))
    launch("tiny", "-n", "2", "--folder", str(jobs), "--device", "cpu")
    job = slurm.run(1, log)
    until(lambda: any((row["epoch"] or 0) > 3 for row in session.ledger.attempts()), log)
    slurm.signal(signal.SIGTERM)
    assert job.wait(PATIENCE) == 0, log.read_text()
    assert slurm.controlled == ["requeue 4242_1"]
    assert {t.state for t in session.trials()} == {TrialState.WAITING}

    job = slurm.run(1, log)
    assert job.wait(PATIENCE) == 0, log.read_text()
    assert slurm.controlled == ["requeue 4242_1"], "what is done does not come back"
    assert {t.state for t in session.trials()} == {TrialState.COMPLETE}
    attempts = session.ledger.attempts()
    assert {a["worker_id"].partition("/")[0] for a in attempts} == {"slurm-4242-1"}
    assert {a["end"] for a in attempts} == {"preempted", "complete"}
    for trial in session.trials():
        epochs = [row["epoch"] for row in session.ledger.epochs(trial._trial_id)]
        assert epochs == list(range(300))


@pytest.mark.long
def test_jobs_without_slurm_share_the_budget(
    make_file: MakeFile, digits: Data, sqlite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TUNER_DATA", raising=False)
    for name in ("TUNER_STORAGE", "TUNER_ARTIFACTS"):
        monkeypatch.setenv(name, "")
    here = sessions.create(make_file(), sqlite, FolderStore(tmp_path / "artifacts"), digits)
    place = Place.here("tiny", sqlite, None, str(tmp_path / "artifacts"))
    options = ["--device", "cpu", "--slots", "1"]
    numbers = submit(Array(2), place, tmp_path / "jobs", options, local=True)
    results = [tmp_path / "jobs" / f"{number}_0_result.pkl" for number in numbers]
    log = tmp_path / "jobs" / f"{numbers[0]}_0_log.out"
    until(lambda: all(path.exists() for path in results), log)
    assert [t.state for t in here.trials()] == [TrialState.COMPLETE] * 4
    assert len(here.ledger.attempts()) == 4
    names = {row["worker_id"].partition("/")[0] for row in here.ledger.workers()}
    assert names <= {f"local-{number}" for number in numbers}


@pytest.mark.long
def test_what_the_user_can_cure_is_the_jobs_exit_code(
    make_file: MakeFile, sqlite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "7"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TUNER_STORAGE", sqlite)
    with pytest.raises(SystemExit) as ended:
        Job("nowhere")()
    assert ended.value.code == 1


@pytest.mark.parametrize(
    ("state", "returns"),
    [("RUNNING", True), ("SIGNALING", True), ("COMPLETING", False), ("CANCELLED", False)],
)
def test_only_a_job_that_nobody_ended_goes_back_into_the_queue(
    state: str, returns: bool, slurm: Slurm
) -> None:
    slurm.say(state)
    assert _may_return(SimpleNamespace(cluster="slurm", job_id="4242_1")) is returns


def test_command_is_told_to_stop_and_its_exit_code_passed_on() -> None:
    waits = "import os, signal, time\nos.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(60)"
    assert run_and_tell([sys.executable, "-c", waits]) == (128 + signal.SIGTERM, True)
    assert run_and_tell([sys.executable, "-c", "raise SystemExit(3)"]) == (3, False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("240", 240), ("90:30", 91), ("4:00:00", 240), ("1-12", 2160), ("2-0:30", 2910)],
)
def test_time_limits_are_read_as_slurm_does(text: str, expected: int) -> None:
    assert minutes(text) == expected


@pytest.mark.parametrize("text", ["", "4h", "1:2:3:4", "-5", "4", "1-"])
def test_time_limits_that_are_none_or_too_short_are_refused(text: str) -> None:
    with pytest.raises(TunerError, match=f"--time {text}: give"):
        minutes(text)


def test_sqlite_is_refused(make_file: MakeFile, sqlite: str, tmp_path: Path) -> None:
    place = Place.here("tiny", sqlite, None, None)
    with pytest.raises(TunerError, match="SQLite file, which one machine can share"):
        submit(Array(1), place, tmp_path)


def test_script_that_sqlite_does_not_let_be_submitted_comes_with_a_warning(
    make_file: MakeFile, digits: Data, sqlite: str, tmp_path: Path
) -> None:
    sessions.create(make_file(), sqlite, FolderStore(tmp_path / "artifacts"), digits)
    places = ("--storage", sqlite, "--artifacts", str(tmp_path / "artifacts"))
    shown = launch("tiny", "-n", "2", "--dry-run", *places)
    assert "#SBATCH" in shown
    assert "refused: the storage is a SQLite file, which one machine can share" in shown


def test_missing_slurm_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    place = Place("tiny", {"TUNER_STORAGE": "postgresql://here/tuner"})
    monkeypatch.setenv("TUNER_STORAGE", "")
    with pytest.raises(TunerError, match=r'could not be submitted: .*"srun"'):
        submit(Array(1), place, tmp_path)
