"""Worker processes that are started, hit and started again until the study is done."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

NAME = "chaos"
LEASE = 3.0
TRIALS = 10
EPOCHS = 60

_forkserver = multiprocessing.get_context("forkserver")
_forkserver.set_forkserver_preload(["tuner.worker", "tuner.session", "tuner.stores"])


def study_text(trials: int, epochs: int) -> str:
    """A study whose recipes follow from the trial's number alone, whoever trains it, and when."""
    return f"""
name = "{NAME}"
[data]
name = "digits"
profile = {{ name = "exponential", ratio = 10 }}
validation_fraction = 0.4
test_fraction = 0.3
[budget]
trials = {trials}
epochs = {epochs}
[search]
algorithm = "random"
pruner = "none"
[model]
name = "mlp"
dropout = 0.2
[space.optimizer.sgd]
lr = {{ low = 0.02, high = 0.2, log = true }}
[space.sampler.class_aware]
exponent = {{ low = 0.2, high = 1.0 }}
[space.loss.cross_entropy]
[space.loss.balanced_softmax]
"""


@dataclass(frozen=True)
class Place:
    """Where a study is: its storage and its artifacts."""

    url: str
    artifacts: Path
    trials: int = TRIALS
    epochs: int = EPOCHS

    def create(self) -> Any:
        """Create the study, or find it; a session."""
        import tomllib

        from tuner import session, study
        from tuner.stores import FolderStore

        text = study_text(self.trials, self.epochs)
        file = study.parse(tomllib.loads(text), text, where="chaos.toml")
        return session.create(file, self.url, FolderStore(self.artifacts), file.data.build(None))


def work_on(place: Place, name: str, log: Path, skew: float) -> None:
    """What a worker process does; its clock may be off by ``skew`` seconds."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ["TUNER_LEASE"] = str(LEASE)
    if skew:
        real = time.time
        time.time = lambda: real() + skew
    sys.exit(_work_on(place, name))


def _work_on(place: Place, name: str) -> int:
    import logging

    from tuner import session
    from tuner.errors import TunerError
    from tuner.rungs import training
    from tuner.stores import FolderStore
    from tuner.worker import StopRequest, work

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(message)s")
    training.CHECKPOINT_SECONDS = 0.2
    try:
        with StopRequest().installed() as stop:
            joined = session.join(NAME, place.url, FolderStore(place.artifacts))
            work(joined, joined.file.data.build(None), name=name, stop=stop)
    except KeyboardInterrupt:
        return 130
    except TunerError as error:
        print(f"tuner: {error}", flush=True)
        return 1
    return 0


@dataclass
class Crew:
    """Workers by name, each started again when it is gone, as a supervisor does."""

    place: Place
    names: list[str]
    log: Path
    skew: dict[str, float] = field(default_factory=dict)
    processes: dict[str, ForkServerProcess] = field(default_factory=dict)
    others: list[ForkServerProcess] = field(default_factory=list)
    exits: list[int] = field(default_factory=list)

    def start(self, name: str) -> ForkServerProcess:
        skew = self.skew.get(name, 0.0)
        process = _forkserver.Process(target=work_on, args=(self.place, name, self.log, skew))
        process.start()
        return process

    def keep_up(self) -> None:
        """Start every worker that is not there."""
        for name in self.names:
            process = self.processes.get(name)
            if process is None or not process.is_alive():
                if process is not None:
                    self.exits.append(process.exitcode or 0)
                self.processes[name] = self.start(name)

    def hit(self, name: str, number: signal.Signals) -> None:
        process = self.processes.get(name)
        if process is not None and process.pid and process.is_alive():
            os.kill(process.pid, number)

    def double(self, name: str) -> None:
        """Start a second process under a name that is taken."""
        self.others.append(self.start(name))

    def dismiss(self) -> None:
        """Wake everybody, end everybody."""
        for process in (*self.processes.values(), *self.others):
            if process.pid and process.is_alive():
                os.kill(process.pid, signal.SIGCONT)
                process.kill()
            process.join()
