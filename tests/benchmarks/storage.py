"""How many trials per second a storage carries: Tuner's ledger beside plain Optuna.

Nothing is trained. Worker processes begin trials, report, read for pruning and end them, as fast
as the storage lets them; see ``storage_workers.py``. Both sides of a point run one after the
other on copies of one database. ``python tests/benchmarks/storage.py`` prints the tables of
``RESULTS.md``; ``--workers``, ``--finished``, ``--storages`` and ``--algorithms`` pick points, and
``--cohorts`` measures many trials at once instead; see ``storage_cohorts.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import optuna
from optuna.trial import TrialState
from storage_cohorts import cohorts_table
from storage_history import TICKETS, Databases, add, settle
from storage_reads import reads_table
from storage_workers import SIDES, Task, run

from tuner.engines import make_engine

POSTGRES = os.environ.get(
    "TUNER_TEST_POSTGRES", "postgresql+psycopg://postgres@127.0.0.1:5432/postgres"
)
OPERATIONS = ("claim", "suggest", "report", "prune", "tell")
PRELOADED = ["optuna", "optuna.samplers", "psycopg", "tuner.ledger", "tuner.search", "tuner.pulse"]

# Measured: what a worker process takes, and what it keeps of a finished trial.
PROCESS_MEGABYTES = 50
TRIAL_KILOBYTES = {"plain": 70, "ours": 12}

Figures = dict[str, Any]


def measure(side: str, url: str, workers: int, options: argparse.Namespace, name: str) -> Figures:
    """Let processes work on a study together; the figures of them all."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        barrier = context.Barrier(workers)
        tasks = [
            Task(side, url, name, i, options.seconds, folder, options.epoch) for i in range(workers)
        ]
        processes = [
            context.Process(target=run, args=(task, barrier), daemon=True) for task in tasks
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        files = sorted(Path(folder).glob("*.json"))
        return summary([json.loads(file.read_text()) for file in files], workers, options.epoch)


def summary(found: Sequence[Figures], workers: int, epoch: float) -> Figures:
    """One line of figures from those of every worker; milliseconds, but for ``first``."""
    ends = [end for one in found for end in one["ends"]]
    began = min(one["began"] for one in found)
    seconds = max(ends, default=began) - began
    first = max(one["first"] for one in found)
    begun = Counter(number for one in found for number, _ in one["begun"])
    errors = Counter(one["error"] for one in found if one["error"])
    spent = Counter({o: sum(sum(one["times"].get(o, [])) for one in found) for o in OPERATIONS})
    trained = epoch * sum(len(one["times"].get("report", [])) for one in found)
    assert not any(one["torch"] for one in found), "a worker imported torch"
    return {
        "trials": len(ends),
        "rate": len(ends) / seconds if ends else 0.0,
        "rate_with_first": len(ends) / (seconds + first) if ends else 0.0,
        "first": median(one["first"] for one in found),
        "p50": {o: 1000 * share(found, o, 0.5) for o in OPERATIONS},
        "p95": {o: 1000 * share(found, o, 0.95) for o in OPERATIONS},
        "statements": sum(one["statements"] for one in found) / max(len(ends), 1),
        "processor": 1000 * sum(one["processor"] for one in found) / max(len(ends), 1),
        "share": 100 * spent.total() / trained if trained else 0.0,
        "storing": 100 * (spent.total() - spent["suggest"]) / trained if trained else 0.0,
        "crashes": workers - sum(one["error"] is None for one in found),
        "doubles": sum(times > 1 for times in begun.values()),
        "errors": dict(errors),
    }


def share(found: Sequence[Figures], operation: str, part: float) -> float:
    """The time that so large a part of all operations of a kind took at most."""
    times = sorted(time for one in found for time in one["times"].get(operation, []))
    return times[min(int(part * len(times)), len(times) - 1)] if times else 0.0


def point(
    bases: Databases, workers: int, finished: int, name: str, options: argparse.Namespace
) -> Figures:
    """Both sides of one point, one after the other, as often as asked."""
    found: dict[str, list[Figures]] = {side: [] for side in SIDES}
    for turn in range(options.repeats):
        for side in sorted(SIDES, reverse=turn % 2 == 0):
            if not fits(side, workers, finished):
                continue
            url = bases.clone(finished)
            # Whoever makes a study with Tuner fills its queue.
            if options.queued or side == "ours":
                queue(url, finished)
            load = os.getloadavg()[0]
            found[side].append(measure(side, url, workers, options, name) | {"load_before": load})
            bases.drop(url)
    where = {"storage": bases.kind, "algorithm": name, "queued": options.queued}
    return {"workers": workers, "finished": finished, **where, **found}


def fits(side: str, workers: int, finished: int) -> bool:
    """Whether the processes will find enough memory; nobody else's is to be taken."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    needed = workers * (PROCESS_MEGABYTES + finished * TRIAL_KILOBYTES[side] / 1000)
    return needed < 0.8 * available / 1000


def queue(url: str, finished: int) -> None:
    """Enqueue trials as a user of plain Optuna does who wants certain ones to be run."""
    engine = make_engine(url)
    add(engine, 1, dict.fromkeys(range(finished, finished + TICKETS), TrialState.WAITING))
    engine.dispose()
    settle(url)


HEAD = (
    "| workers | finished | plain trials/s | Tuner trials/s | ratio | claim | report | prune "
    "| tell | statements | processor ms | first trial s | % of training | without suggest "
    "| crashes | doubles |"
)
RULE = "|---" * (HEAD.count("|") - 1) + "|"


COSTS = {
    "statements": ".0f",
    "processor": ".0f",
    "first": ".1f",
    "share": ".2f",
    "storing": ".2f",
    "crashes": ".1f",
    "doubles": ".1f",
}


def row(one: Figures) -> str:
    """A line of the table; where two figures stand, the first is plain Optuna's."""
    plain, ours = one["plain"], one["ours"]
    pairs = [f"{_p95(plain, o)} / {_p95(ours, o)}" for o in ("claim", "report", "prune", "tell")]
    ratios = [o["rate"] / p["rate"] for p, o in zip(plain, ours, strict=False) if p["rate"]]
    cells = [str(one["workers"]), f"{one['finished']:,}", _rates(plain), _rates(ours)]
    cells += [f"{fmean(ratios):.1f}" if ratios else "–", *pairs]
    for key, form in COSTS.items():
        cells.append(f"{_mean(plain, key, form)} / {_mean(ours, key, form)}")
    return "| " + " | ".join(cells) + " |"


def _mean(side: Sequence[Figures], key: str, form: str) -> str:
    return f"{fmean(figures[key] for figures in side):{form}}" if side else "–"


def _p95(side: Sequence[Figures], operation: str) -> str:
    if not side:
        return "–"
    value = fmean(figures["p95"][operation] for figures in side)
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def _rates(side: Sequence[Figures]) -> str:
    if not side:
        return "memory"
    rates = [figures["rate"] for figures in side]
    spread = f" ({min(rates):.1f}–{max(rates):.1f})" if len(rates) > 1 else ""
    return f"{fmean(rates):.1f}{spread}"


def machine(folder: Path) -> str:
    """What it runs on, and how busy that is already."""
    models = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    model = models[0].partition(":")[2].strip() if models else platform.processor()
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"{os.cpu_count()} cores {model}, load {load}, Python {platform.python_version()}, "
        f"Optuna {optuna.__version__}, SQLite files in {folder}"
    )


@contextlib.contextmanager
def databases(kind: str, options: argparse.Namespace) -> Iterator[Databases]:
    """Databases of one kind, gone in the end."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        made = Databases(kind, Path(folder), options.postgres)
        try:
            yield made
        finally:
            made.drop_all()


def arguments() -> argparse.Namespace:
    """What to measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--storages", nargs="+", default=["sqlite", "postgresql"])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--finished", type=int, nargs="+", default=[0, 1000, 10000])
    parser.add_argument("--algorithms", nargs="+", default=["tpe", "random"])
    parser.add_argument("--seconds", type=float, default=6.0, help="time of one measurement")
    parser.add_argument(
        "--epoch", type=float, default=0.0, help="seconds that an epoch is said to train"
    )
    parser.add_argument("--repeats", type=int, default=1, help="measurements of every point")
    parser.add_argument("--queued", action="store_true", help="plain Optuna has a queue as well")
    parser.add_argument("--reads", action="store_true", help="only one pruning read, alone")
    parser.add_argument("--cohorts", action="store_true", help="only many trials at once")
    parser.add_argument("--postgres", default=POSTGRES, help="a server where databases can be made")
    parser.add_argument("--folder", type=Path, default=None, help="where SQLite files are made")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser.parse_args()


def main() -> None:
    """Measure, printing every line as soon as it is known."""
    os.environ["OMP_NUM_THREADS"] = "1"
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    options = arguments()
    print(machine(options.folder or Path(tempfile.gettempdir())))
    points: list[Figures] = []
    for kind in options.storages:
        with databases(kind, options) as bases:
            if options.reads:
                print(f"\n{kind}\n\n{reads_table(bases, max(options.finished))}")
                continue
            if options.cohorts:
                print(f"\n{kind}\n\n{cohorts_table(bases, options.repeats)}")
                continue
            for name in options.algorithms:
                print(f"\n{kind}, {name}\n\n{HEAD}\n{RULE}")
                for finished in options.finished:
                    for workers in options.workers:
                        points.append(point(bases, workers, finished, name, options))
                        print(row(points[-1]), flush=True)
                        if options.json:
                            options.json.write_text(json.dumps(points, indent=1))
    print(f"\nload at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
