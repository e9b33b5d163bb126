"""Worker processes of the storage benchmark: plain Optuna, and Tuner's ledger.

Neither trains nor stops a trial early: one trial is three suggestions, ten reports, ten pruning
reads, and its end. Nothing here imports torch.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections import defaultdict
from dataclasses import dataclass, field
from multiprocessing.synchronize import Barrier
from pathlib import Path
from statistics import median
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, Trial, TrialState
from storage_history import NAME, SPACE, STEPS_PER_TRIAL, TICKETS

from tuner.engines import make_engine
from tuner.ledger import FencedStorage, Lease, Ledger
from tuner.pulse import Pulse, facts
from tuner.search import algorithm
from tuner.storage import open_storage

ENDED = (TrialState.COMPLETE, TrialState.PRUNED)
WAIT_SECONDS = 1.0
PATIENCE = 3600


@dataclass(frozen=True)
class Task:
    """What one worker process does."""

    side: str
    url: str
    algorithm: str
    number: int
    seconds: float
    folder: str
    epoch: float = 0.0


@dataclass
class Watch:
    """Notes how long each operation took, in seconds, and which trials were begun."""

    task: Task
    times: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    begun: list[tuple[int, float]] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    statements: int = 0
    mark: float = 0.0

    def start(self) -> None:
        """An operation begins now."""
        self.mark = time.perf_counter()

    def stop(self, operation: str) -> None:
        """The operation that began last ended; the next one begins."""
        now = time.perf_counter()
        self.times[operation].append(now - self.mark)
        self.mark = now

    def forget(self) -> None:
        """Begin anew, but remember which trials were begun."""
        self.times.clear()
        self.ends.clear()

    def begin(self, number: int) -> None:
        """A trial was begun."""
        self.begun.append((number, time.perf_counter()))

    def count(self, *_: Any) -> None:
        """A statement goes to the database."""
        self.statements += 1


def run(task: Task, barrier: Barrier) -> None:
    """Work for some seconds once all workers know the history; leave the figures in a file.

    To know it, each has run one trial, whose only figure is when it ended.
    """
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    watch, error, began, first = Watch(task), None, 0.0, 0.0
    waited, used = False, 0.0
    try:
        began = time.perf_counter()
        side = SIDES[task.side](task, watch)
        side.work(0.0)
        first = watch.ends[0] - began
        watch.forget()
        sa.event.listen(sa.Engine, "before_cursor_execute", watch.count)
        waited = True
        barrier.wait(PATIENCE)
        began, used = time.perf_counter(), time.process_time()
        side.work(task.seconds)
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised.__cause__ or raised}"[:300]
    if not waited:
        barrier.wait(PATIENCE)
        began = time.perf_counter()
    figures = {
        "error": error,
        "first": first,
        "began": began,
        "ends": watch.ends,
        "times": watch.times,
        "begun": watch.begun,
        "statements": watch.statements,
        "processor": time.process_time() - used,
        "torch": "torch" in sys.modules,
    }
    Path(task.folder, f"{task.number}.json").write_text(json.dumps(figures))


def train(trial: Trial, watch: Watch, tell: Any) -> float:
    """Suggest three hyperparameters, then report and read ten times; the value."""
    watch.start()
    for name, kind in SPACE.items():
        trial._suggest(name, kind)
    watch.stop("suggest")
    best = 1 - (trial.params["share"] - 0.5) ** 2 - 0.1 * (trial.params["loss"] != "ldam")
    for step in range(STEPS_PER_TRIAL):
        time.sleep(watch.task.epoch)
        tell(trial, step, best * (step + 1) / STEPS_PER_TRIAL)
    watch.start()
    return float(best)


class Plain:
    """``study.optimize`` as Optuna's documentation shows it."""

    def __init__(self, task: Task, watch: Watch) -> None:
        self.task, self.watch = task, watch
        samplers: dict[str, BaseSampler] = {"tpe": TPESampler(), "random": RandomSampler()}
        self.study = optuna.load_study(
            study_name=NAME, storage=task.url, sampler=samplers[task.algorithm]
        )

    def work(self, seconds: float) -> None:
        """Run trials until the time is over, but at least one."""
        self.watch.start()
        trials = 10**6 if seconds else 1
        self.study.optimize(
            self._objective, n_trials=trials, timeout=seconds or None, callbacks=[self._ended]
        )

    def _objective(self, trial: Trial) -> float:
        self.watch.stop("claim")
        self.watch.begin(trial.number)
        return train(trial, self.watch, self._report)

    def _report(self, trial: Trial, step: int, value: float) -> None:
        self.watch.start()
        trial.report(value, step)
        self.watch.stop("report")
        trial.should_prune()
        self.watch.stop("prune")

    def _ended(self, _study: optuna.Study, _trial: FrozenTrial) -> None:
        self.watch.stop("tell")
        self.watch.ends.append(self.watch.mark)


class Ours:
    """A worker of Tuner without training: tickets, leases, fenced writes, a pulse."""

    def __init__(self, task: Task, watch: Watch) -> None:
        self.task, self.watch = task, watch
        storage = open_storage(task.url, create=False)
        self.ledger = Ledger(make_engine(task.url), storage.get_study_id_from_name(NAME))
        self.fenced = FencedStorage(storage, self.ledger)
        self.study = optuna.Study(NAME, self.fenced)
        name = f"worker-{task.number}"
        self.worker = name, self.ledger.register(name, facts("cpu"))
        self.curves: dict[int, list[float]] = {}

    def work(self, seconds: float) -> None:
        """Run trials until the time is over, but at least one."""
        end, before = time.perf_counter() + seconds, len(self.watch.ends)
        with Pulse(self.ledger, self.worker) as pulse:
            while time.perf_counter() < end or len(self.watch.ends) == before:
                self.watch.start()
                lease = self._next()
                if lease is None:
                    time.sleep(WAIT_SECONDS)
                    continue
                pulse.hold(lease)
                self._trial(lease, pulse)

    def _next(self) -> Lease | None:
        """As ``tuner.tickets.next_lease``: claim; queue tickets when there are none."""
        lease = self.ledger.claim(self.worker)
        if lease is None and self.ledger.order().state == "run":
            self._fill()
            lease = self.ledger.claim(self.worker)
        return lease

    def _fill(self) -> None:
        """As ``tuner.tickets.fill_queue``, for a budget without end."""
        while True:
            trials = self.ledger.trials()
            waiting = sum(trial.state == TrialState.WAITING for trial in trials)
            tickets: list[Any] = [({}, {})] * (TICKETS - waiting)
            if waiting > TICKETS // 2 or self.ledger.enqueue(tickets, len(trials)):
                return

    def _trial(self, lease: Lease, pulse: Pulse) -> None:
        self.fenced.take(lease)
        self.study.sampler = algorithm(self.task.algorithm, lease.number)
        self.study._thread_local.cached_all_trials = None
        trial = Trial(self.study, lease.trial_id)
        self.watch.stop("claim")
        self.watch.begin(lease.number)
        value = train(trial, self.watch, self._report)
        pulse.drop()
        self.fenced.finish(lease.trial_id, TrialState.COMPLETE, [value], end="complete")
        self.watch.stop("tell")
        self.watch.ends.append(self.watch.mark)

    def _report(self, trial: Trial, step: int, value: float) -> None:
        trial_id = trial._trial_id
        self.watch.start()
        self.fenced.set_trial_intermediate_value(trial_id, step, value)
        row = {"seconds": 1.0, "samples": 100, "metrics": {"value": value}}
        self.fenced.note_epoch(trial_id, step, row)
        self.fenced.flush(trial_id, seconds=float(step + 1), speed=100.0)
        self.watch.stop("report")
        self._decide(step, value)
        self.watch.stop("prune")

    def _decide(self, step: int, value: float) -> bool:
        """As ``tuner.rungs.peers``: each curve is made once, and compared at equal progress."""
        ended = self.ledger.ended(ENDED)
        for trial in ended if len(ended) > len(self.curves) else ():
            if trial.number not in self.curves:
                self.curves[trial.number] = list(trial.intermediate_values.values())
        others = [curve[step] for curve in self.curves.values() if step < len(curve)]
        return bool(others) and value < median(others)


SIDES: dict[str, type[Plain] | type[Ours]] = {"plain": Plain, "ours": Ours}
