"""How long until a search has found what 100 ordinary trials find, confirmed with fresh seeds.

The ordinary search is Optuna with TPE and the median pruner over the usual training loop, in one
process with torch's defaults, and tuned: a process with one thread for each core. Tuner climbs a
ladder, head, full and confirm, with a worker for each core. All choose by the same metric of the
validation part, as the logits are and with no floor. Every recipe that was the best for a while is
trained again here with fresh seeds and judged on the test part, which takes no side's time. What
is to be reached is what the ordinary search's last choice has there. Without a floor the tail can
be bought with everything else, by both sides alike: the other accuracies show it, and
``--metric balanced_accuracy`` asks for what cannot be bought. Loading data and the first imports
count for nobody; making the study, probes, the baseline and features do.

    python tests/benchmarks/search.py --data FOLDER --keep search.json    # 25 minutes
    python tests/benchmarks/search.py --data FOLDER --sides --searches 1    # Tuner alone

The ordinary side is read from ``--keep`` where it was measured with the same settings before.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import optuna
import tomli_w
from optuna.trial import FixedTrial, FrozenTrial, TrialState
from search_report import Found, print_curve, print_verdict
from search_sides import CONFIRMED, Moments, Setting, confirm, enter, first_imports, search
from trainer import MODELS
from trainer_contenders import BATCH, optuna_study

from tuner.datasets import Data
from tuner.ladder import rung_of
from tuner.session import Session, create
from tuner.stores import FolderStore
from tuner.study import StudyFile, load

FRESH = 1000

SPACE: dict[str, Any] = {
    "optimizer": {
        "sgd": {
            "lr": {"low": 1e-2, "high": 0.3, "log": True},
            "weight_decay": {"low": 1e-5, "high": 1e-2, "log": True},
            "decay_norm": True,
        }
    },
    "sampler": {"natural": {}, "class_aware": {"exponent": {"low": 0.0, "high": 1.0}}},
    "loss": {
        "cross_entropy": {},
        "label_smoothing": {"eps": {"low": 0.02, "high": 0.3}},
        "weighted_cross_entropy": {"power": {"low": 0.0, "high": 1.0}},
        "class_balanced": {
            "beta": [0.9, 0.99, 0.999, 0.9999],
            "base": ["softmax", "focal"],
        },
        "focal": {"gamma": {"low": 0.5, "high": 3.0}},
        "logit_adjusted": {"tau": {"low": 0.0, "high": 1.5}},
        "ldam": {"max_margin": {"low": 0.1, "high": 0.6}},
    },
}


def study(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The study file of both sides; the ordinary one takes data, space, model and epochs."""
    profile = {"name": "exponential", "ratio": options.ratio}
    return {
        "name": f"search-{seed}",
        "data": {
            "name": "image_folder",
            "root": str(options.data.absolute()),
            "image_size": options.size,
            "channels": options.channels,
            "tail": {"bottom": 0.3},
            **({"profile": profile} if options.ratio > 1 else {}),
        },
        "objective": {"metric": options.metric, "adjusted": False, "floor": False},
        "budget": {"trials": options.full, "epochs": options.epochs},
        "ladder": {
            "rungs": ["head", "full"] + ["confirm"] * (options.recipes > 0),
            "head": {"trials": options.head or "auto"},
            "confirm": {"recipes": options.recipes or 1, "seeds": options.again},
        },
        "search": {"algorithm": "tpe", "pruner": "tail_accuracy", "seed": seed},
        "model": MODELS[options.model],
        "training": {"batch_size": BATCH},
        "schedule": {"name": "cosine"},
        "augment": {"name": "standard"},
        "space": SPACE,
    }


def pool(setting: Setting, barrier: Any = None) -> ProcessPoolExecutor:
    """Processes that load the data before anything else."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(setting.processes, context, enter, (setting, barrier))


def run(setting: Setting, make: Callable[[], Any]) -> tuple[float, Moments, Any]:
    """Let a search's processes begin together; when that was, when trials ended, the study."""
    barrier = multiprocessing.get_context("spawn").Barrier(setting.processes + 1)
    with pool(setting, barrier) as processes:
        jobs = [processes.submit(search, index) for index in range(setting.processes)]
        barrier.wait(timeout=300)
        began = time.time()
        try:
            made = make()
        except BaseException:
            barrier.abort()
            raise
        barrier.wait(timeout=300)
        ended = {n: moment for job in jobs for n, moment in job.result().items()}
    return began, ended, made


def ordinary(setting: Setting) -> Found:
    """An ordinary search, and what was the best when."""
    file = load(setting.study)
    began, ended, made = run(setting, lambda: optuna_study(setting.side, setting.url))
    trials = [trial for trial in made.trials if trial.state == TrialState.COMPLETE]
    best, points = -math.inf, []
    for trial in sorted(trials, key=lambda trial: ended[trial.number]):
        if trial.value > best:
            best = trial.value
            points.append(_point(file, trial, ended[trial.number] - began))
    pruned = sum(trial.state == TrialState.PRUNED for trial in made.trials)
    return _found(setting, ended, began, points, f"{len(ended)} trials, {pruned} pruned")


def tuner(setting: Setting, data: Data) -> Found:
    """A search of Tuner's, and what was the best when."""
    file, store = load(setting.study), FolderStore(setting.folder)
    os.environ["TUNER_CACHE"] = str(setting.folder / "cache")
    session: Session
    began, ended, session = run(setting, lambda: create(file, setting.url, store, data))
    complete = [t for t in session.trials(TrialState.COMPLETE) if t.number in ended]
    points: list[Found] = []
    for moment in sorted(ended[trial.number] for trial in complete):
        best = session.ranked(t for t in complete if ended[t.number] <= moment)[0]
        if not points or points[-1]["trial"] != best.number:
            points.append(_point(file, best, moment - began))
    again = [ended[t.number] for t in session.trials() if rung_of(t) == "confirm"]
    answer = session.best()
    if again and answer is not None:
        points.append(_point(file, answer, max(again) - began))
    return _found(setting, ended, began, points, _phases(session, ended, began))


def _phases(session: Session, ended: Moments, began: float) -> str:
    by_rung: dict[str, list[float]] = {"head": [], "full": [], "confirm": []}
    for trial in session.trials():
        if trial.number in ended:
            by_rung[rung_of(trial)].append(ended[trial.number] - began)
    head, full = by_rung["head"] or [math.nan], by_rung["full"]
    given_up = sum(rung_of(trial) == "full" for trial in session.trials(TrialState.PRUNED))
    return (
        f"{len(by_rung['head'])} trials of the head rung, {len(full)} of the full one "
        f"({given_up} pruned) and {len(by_rung['confirm'])} to confirm; baseline after "
        f"{min(full):.1f} s, head rung over after {max(head):.1f} s, full rung after "
        f"{max(full):.1f} s"
    )


def _point(file: StudyFile, trial: FrozenTrial, seconds: float) -> Found:
    recipe = trial.user_attrs.get("recipe")
    if recipe is None:
        recipe = file.space.suggest(FixedTrial(trial.params)).to_dict()
    return {
        "seconds": seconds,
        "trial": trial.number,
        "validation": trial.values[0],
        "recipe": recipe,
    }


def _found(setting: Setting, ended: Moments, began: float, points: list[Found], what: str) -> Found:
    seconds = max(ended.values()) - began
    known = {"side": setting.side, "seed": setting.seed}
    return {**known, "seconds": seconds, "what": what, "points": points}


def confirm_all(found: Sequence[Found], processes: ProcessPoolExecutor, seeds: int) -> None:
    """Add to each point what its recipe has on test, by seed."""
    points = [point for each in found for point in each["points"]]
    tasks = [(point["recipe"], FRESH + seed) for point in points for seed in range(seeds)]
    answers = list(processes.map(confirm, tasks))
    for index, point in enumerate(points):
        own = answers[index * seeds : (index + 1) * seeds]
        point["confirmed"] = {name: [answer[name] for answer in own] for name in CONFIRMED}


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What the ordinary side depends on, but for the machine."""
    names = ("model", "epochs", "size", "channels", "ratio", "metric", "trials", "seeds", "cores")
    return {**{name: getattr(options, name) for name in names}, "space": SPACE}


def keep(options: argparse.Namespace, found: Sequence[Found]) -> None:
    """Write what was found so far, if asked to."""
    if options.keep is not None:
        kept = {"settings": settings_of(options), "found": found}
        options.keep.write_text(json.dumps(kept, indent=1))


def known(options: argparse.Namespace) -> list[Found]:
    """The ordinary side as it was measured before with these settings, if it was."""
    if options.keep is None or not options.keep.exists():
        return []
    kept = json.loads(options.keep.read_text())
    if kept["settings"] != settings_of(options):
        raise SystemExit(f"{options.keep} was measured with other settings; give another --keep")
    return [each for each in kept["found"] if each["side"] != "tuner"]


def measured(options: argparse.Namespace, scratch: Path) -> Iterator[Found]:
    """Every search, one after another; what is known is not searched again."""
    before = known(options)
    yield from before
    have = {(each["side"], each["seed"]) for each in before}
    wanted = [(side, seed) for side in options.sides for seed in range(options.ordinaries)]
    for side, seed in [each for each in wanted if each not in have]:
        folder = scratch / f"{side}-{seed}"
        folder.mkdir()
        count, threads = (1, None) if side == "ordinary" else (options.cores, 1)
        own = _written(options, folder, seed)
        yield ordinary(Setting(side, own, folder, seed, options.trials, count, threads))
    data = load(_written(options, scratch, 0)).data.build()
    for seed in range(options.first, options.first + options.searches):
        folder = scratch / f"tuner-{seed}"
        folder.mkdir()
        own = _written(options, folder, seed)
        yield tuner(Setting("tuner", own, folder, seed, 0, options.cores, 1), data)


def _written(options: argparse.Namespace, folder: Path, seed: int) -> Path:
    path = folder / "study.toml"
    path.write_text(tomli_w.dumps(study(options, seed)))
    return path


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="train/ and test/ of classes")
    parser.add_argument("--keep", type=Path, help="JSON file of everything found")
    parser.add_argument("--model", default="mlp", choices=list(MODELS))
    parser.add_argument("--metric", default="tail_accuracy", choices=CONFIRMED[:2])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--size", type=int, default=28)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--ratio", type=float, default=100.0, help="1 to carve nothing")
    parser.add_argument("--trials", type=int, default=100, help="of an ordinary search")
    parser.add_argument("--sides", nargs="*", default=["ordinary", "tuned"])
    parser.add_argument("--ordinaries", type=int, default=1, help="searches of each other side")
    parser.add_argument("--head", type=int, help="trials of the head rung (by default: auto)")
    parser.add_argument("--full", type=int, default=40, help="trials of Tuner's full rung")
    parser.add_argument("--recipes", type=int, default=7, help="that Tuner confirms, 0 for none")
    parser.add_argument("--again", type=int, default=4, help="seeds that Tuner confirms them with")
    parser.add_argument("--searches", type=int, default=3, help="of Tuner, with seeds of their own")
    parser.add_argument("--first", type=int, default=0, help="seed of the first of these")
    parser.add_argument("--seeds", type=int, default=3, help="to confirm a recipe")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    return parser.parse_args()


def main() -> None:
    """Search, confirm, keep and print."""
    options, began = arguments(), time.monotonic()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    first_imports()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        found: list[Found] = []
        for each in measured(options, scratch):
            found.append(each)
            keep(options, found)
        path = _written(options, scratch, 0)
        setting = Setting("confirm", path, scratch, 0, 0, options.cores, 1)
        with pool(setting) as processes:
            fresh = [each for each in found if "confirmed" not in each["points"][0]]
            confirm_all(fresh, processes, options.seeds)
    keep(options, found)
    for each in found:
        print_curve(each, options.metric)
    print_verdict(found, options.metric)
    print(f"\n{time.monotonic() - began:.0f} s in all, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
