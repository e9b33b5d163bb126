"""What one pruning read costs beside trials that run, without anybody else at work."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from statistics import median

from optuna.trial import TrialState
from storage_history import STEPS_PER_TRIAL, Databases, add
from storage_workers import Ours, Plain, Task, Watch

from tuner.engines import make_engine

RUNNING = (0, 16, 64, 256)
TIMES = 30


def reads_table(bases: Databases, finished: int) -> str:
    """A Markdown table: median milliseconds of a pruning read, by running trials."""
    lines = [
        "| running trials | their steps | plain ms | Tuner ms |",
        "|---|---|---|---|",
    ]
    for running in RUNNING:
        url = bases.clone(finished)
        add(
            make_engine(url),
            1,
            dict.fromkeys(range(finished, finished + running), TrialState.RUNNING),
        )
        steps = running * STEPS_PER_TRIAL
        lines.append(f"| {running} | {steps} | {_plain(url):.1f} | {_ours(url):.1f} |")
        bases.drop(url)
    return "\n".join(lines)


def _task(side: str, url: str) -> Watch:
    return Watch(Task(side, url, "random", 0, 0.0, tempfile.gettempdir()))


def _plain(url: str) -> float:
    watch = _task("plain", url)
    side = Plain(watch.task, watch)
    trial = side.study.ask()
    trial.report(0.5, 0)
    return _timed(trial.should_prune)


def _ours(url: str) -> float:
    watch = _task("ours", url)
    side = Ours(watch.task, watch)
    return _timed(lambda: side._decide(0, 0.5))


def _timed(read: Callable[[], bool]) -> float:
    """Median milliseconds of a read."""
    times = []
    for _ in range(TIMES):
        began = time.perf_counter()
        read()
        times.append(time.perf_counter() - began)
    return 1000 * median(times)
