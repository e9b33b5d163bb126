"""How fast trials are trained on one GPU: Tuner beside the ordinary loop, one and many at a time.

The ordinary loop is what tutorials write (see ``trainer_contenders.py``): a process per trial,
``DataLoader`` with workers and pinned memory, torchvision transforms on PIL images, float32,
``loss.item()`` after every step, Optuna on SQLite. It is measured alone with 4 loader workers, and
with as many processes as the cores can feed; the best of ``--crews`` is the saturated machine.
Where a trial would take longer than ``--cap``, it is not trained but computed from some steps, and
the output says so. Tuner's side is a study on SQLite, worked on by ``--processes`` workers of a
model; the best number of those given counts.

    python tests/benchmarks/gpu.py --data FOLDER     # train/ and val/ with a folder per class
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import pickle
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import gpu_limits
import tomli_w
import torch
from gpu_sides import Place, Probe, Train, Work, load, serve
from optuna.trial import FixedTrial, TrialState
from trainer import study as base_study
from trainer_contenders import optuna_study

from tuner.backends import Speed, chosen, settled
from tuner.datasets import Data
from tuner.session import create, join
from tuner.stores import FolderStore
from tuner.study import StudyFile, parse

LIKE = {"mlp": "mlp", "small_cnn": "small_cnn", "resnet32": "resnet20"}
"""Whose images and study file of the processor's benchmark a model takes."""

EPOCHS = {"mlp": 5, "small_cnn": 3, "resnet32": 2}
GOALS = {"mlp": (150, 60), "small_cnn": (60, 20), "resnet32": (12, 3)}
ALONE = (1, 4)


@dataclass(frozen=True)
class Rate:
    """What one side reached; ``how`` says how it was found."""

    trials_per_second: float
    scores: list[float]
    how: str


class Crew:
    """Processes that wait for orders, and answer them all."""

    def __init__(self, place: Place, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            # No daemons: a loader's workers are children of theirs.
            context.Process(target=serve, args=(place, theirs)).start()
            self.pipes.append(ours)

    def ready(self) -> None:
        """Wait until all have imported everything."""
        for pipe in self.pipes:
            pipe.recv()

    def follow(self, order: Any, count: int) -> list[Any]:
        """What the first ``count`` processes answer to an order they get at once."""
        for pipe in self.pipes[:count]:
            pipe.send(order)
        return [pipe.recv() for pipe in self.pipes[:count]]

    def leave(self) -> None:
        """End the processes."""
        for pipe in self.pipes:
            pipe.send(None)


def study_of(model: str, turn: int, options: argparse.Namespace) -> dict[str, Any]:
    """The study file of one turn."""
    values = base_study(LIKE[model], turn, options)
    if LIKE[model] != model:
        values["model"] = {"name": model}
    budget = {"trials": 20_000, "epochs": options.epochs.get(model, EPOCHS[model])}
    return {**values, "name": f"{model}-{turn}", "budget": budget}


def prepare(place: Place, options: argparse.Namespace) -> None:
    """Write study files and decoded images, and create the studies of both sides."""
    for model in options.models:
        path = place.folder / f"{model}.toml"
        path.write_text(tomli_w.dumps(study_of(model, 0, options)))
        for turn in (0, 1):
            values = study_of(model, turn, options)
            file = parse(values, tomli_w.dumps(values), where=model)
            images = place.folder / f"{file.data.image_size}-{file.data.channels}.pickle"
            if not images.exists():
                images.write_bytes(pickle.dumps(file.data.build()))
            create(file, place.url, FolderStore(place.folder), load(place.folder, model)[1])
    optuna_study("none", f"sqlite:///{place.folder}/ordinary.db")


def ordinary(model: str, crew: Crew, shape: tuple[int, int], options: argparse.Namespace) -> Rate:
    """The rate of so many processes with so many loader workers each."""
    count, workers = shape
    threads = None if count == 1 else 1
    guesses = crew.follow(Probe(model, workers, threads, options.steps), count)
    if max(guesses) > options.cap:
        how = f"extrapolated from {options.steps} steps: {fmean(guesses):.1f} s per trial"
        return Rate(sum(1 / guess for guess in guesses), [], how)
    order = Train(model, workers, options.trials, f"{model}-{count}x{workers}")
    optuna_study(order.study, f"sqlite:///{options.folder}/ordinary.db")
    answers = crew.follow(order, count)
    rate = sum(len(scores) / seconds for seconds, scores in answers)
    each = fmean(seconds / len(scores) for seconds, scores in answers)
    how = f"{each:.1f} s per trial, by some steps it would be {fmean(guesses):.1f}"
    return Rate(rate, [score for _, scores in answers for score in scores], how)


def tuner(model: str, crew: Crew, count: int, options: argparse.Namespace) -> Rate:
    """The rate of so many workers, after a study to warm up."""
    lanes = options.lanes or options.ways[model].lanes
    crew.follow(Work(model, f"{model}-0", options.warm, 1, options.lanes), count)
    order = Work(model, f"{model}-1", options.seconds, 2, options.lanes)
    answers = crew.follow(order, count)
    ended = sorted(moment for _, moments in answers for moment in moments)
    began = min(moment for moment, _ in answers)
    first = count * lanes
    if len(ended) <= first:
        raise SystemExit(f"{model}: {len(ended)} trials in {options.seconds} s: give --seconds")
    # Trials that are trained together end together: those of the first lanes are the start.
    steady = (len(ended) - first) / (ended[-1] - ended[first - 1])
    seconds = ended[-1] - began
    how = f"{len(ended)} trials in {seconds:.1f} s, {len(ended) / seconds:.2f} per s with the start"
    return Rate(steady, _scores(order.study, options), how)


def _scores(study: str, options: argparse.Namespace) -> list[float]:
    place: Place = options.place
    session = join(study, place.url, FolderStore(place.folder), writes=False)
    done = [trial.user_attrs for trial in session.trials(TrialState.COMPLETE)]
    kept = [attrs["metrics"]["raw"] for attrs in done if not attrs.get("baseline")]
    return [metrics["balanced_accuracy"] for metrics in kept]


def compare(model: str, hands: Crew, workers: Crew, options: argparse.Namespace) -> None:
    """Measure both sides, and print what they reached."""
    file, data = load(options.place.folder, model)
    print(
        f"\n{model}: {len(data.train)} training and {len(data.validation)} validation images, "
        f"{file.budget.epochs} epochs per trial"
    )
    shapes = dict.fromkeys((ALONE, *options.crews))
    rates = {shape: ordinary(model, hands, shape, options) for shape in shapes}
    images = file.budget.epochs * len(data.train)
    for (count, loaders), rate in rates.items():
        _print(f"ordinary, {count} x {loaders} workers", rate, images)
    options.ways[model] = way = _way(file, data, options.place.device)
    print(f"the probe takes {way}", flush=True)
    found = {}
    for count in options.processes.get(model, [1]):
        found[count] = tuner(model, workers, count, options)
        lanes = options.lanes or way.lanes
        _print(f"Tuner, {count} x {lanes} lanes", found[count], images)
    own = max(found.values(), key=lambda rate: rate.trials_per_second)
    alone = rates[ALONE].trials_per_second
    most = max(rates[shape].trials_per_second for shape in options.crews)
    one, all_cores = GOALS[model]
    print(
        f"Tuner to ordinary {own.trials_per_second / alone:.1f} (goal {one}), "
        f"to the saturated machine {own.trials_per_second / most:.1f} (goal {all_cores})",
        flush=True,
    )
    options.reached[model] = own.trials_per_second


def _way(file: StudyFile, data: Data, device: str) -> Speed:
    """How Tuner's workers will train, found before they begin."""
    torch.set_num_threads(1)
    on_device = data.to(device) if device != "cpu" else data
    recipe = file.space.suggest(FixedTrial(file.space.defaults()))
    return chosen(settled(recipe, on_device, device), on_device, device)


def _print(name: str, rate: Rate, images: int) -> None:
    scores = [100 * score for score in rate.scores]
    spread = f" ± {stdev(scores):.1f}" if len(scores) > 1 else ""
    shown = f"balanced accuracy {fmean(scores):.1f}{spread} ({len(scores)})" if scores else ""
    speed = rate.trials_per_second * images
    print(
        f"{name:30} {rate.trials_per_second:8.3f} trials/s {speed:10.0f} samples/s  "
        f"{shown or 'no accuracy'}  ({rate.how})",
        flush=True,
    )


def print_limits(options: argparse.Namespace) -> None:
    """What the device could do at most, and what share of it Tuner's trials reach."""
    device = options.place.device
    if device == "cpu":
        torch.set_num_threads(1)
    machine = gpu_limits.measure(device, options.product, options.copy)
    print(
        f"\nlimits: a bfloat16 product of {options.product} takes "
        f"{1e3 * machine.product_seconds:.2f} ms, {machine.flops / 1e12:.1f} TFLOP/s; "
        f"copies at {machine.bytes / 1e9:.0f} GB/s"
    )
    for model, rate in options.reached.items():
        file, data = load(options.place.folder, model)
        recipe = settled(file.space.suggest(FixedTrial(file.space.defaults())), data, device)
        train, unseen = gpu_limits.costs(recipe, data, device)
        images = (len(data.train), len(data.validation))
        epochs = rate * file.budget.epochs
        flops = epochs * (images[0] * train.flops + images[1] * unseen.flops)
        moved = epochs * (images[0] * train.bytes + images[1] * unseen.bytes)
        print(
            f"{model}, {recipe.training.precision}: per image {train.flops / 1e6:.2f} MFLOP and "
            f"{train.bytes / 1e3:.1f} kB in training, {unseen.flops / 1e6:.2f} and "
            f"{unseen.bytes / 1e3:.1f} in validation; whole trials reach "
            f"{flops / machine.flops:.1%} of the operations, {moved / machine.bytes:.1%} of the "
            "bytes"
        )


def _shape(text: str) -> tuple[int, int]:
    count, _, workers = text.partition("x")
    return int(count), int(workers)


def _epochs(text: str) -> tuple[str, int]:
    model, _, count = text.partition("=")
    return model, int(count)


def _counts(text: str) -> tuple[str, list[int]]:
    model, _, counts = text.partition("=")
    return model, [int(count) for count in counts.split(",")]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="train/ and val/ of classes")
    parser.add_argument("--models", nargs="+", default=list(GOALS), choices=list(GOALS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--epochs", nargs="+", type=_epochs, default=[], metavar="MODEL=COUNT")
    parser.add_argument("--crews", nargs="+", type=_shape, default=[(4, 3), (16, 0)])
    parser.add_argument("--trials", type=int, default=1, help="per ordinary process")
    parser.add_argument("--cap", type=float, default=10.0, help="seconds of an ordinary trial")
    parser.add_argument("--steps", type=int, default=25, help="to warm up, and as many to time")
    parser.add_argument("--processes", nargs="+", type=_counts, default=[], help="MODEL=1,8 …")
    parser.add_argument("--lanes", type=int, help="of each of them (default: as Tuner chooses)")
    parser.add_argument("--seconds", type=float, default=10.0, help="to measure Tuner")
    parser.add_argument("--warm", type=float, default=3.0, help="seconds before that")
    parser.add_argument("--ratio", type=float, default=100, help="imbalance that is carved")
    parser.add_argument("--product", type=int, default=8192, help="side of the matrices")
    parser.add_argument("--copy", type=int, default=2048, help="megabytes")
    parser.set_defaults(size=None, channels=None)
    options = parser.parse_args()
    options.epochs, options.size, options.reached = dict(options.epochs), None, {}
    options.processes, options.ways = dict(options.processes), {}
    return options


def main() -> None:
    """Print a table per model, then the limits."""
    options, began = arguments(), time.monotonic()
    name = torch.cuda.get_device_name() if options.device != "cpu" else platform.processor()
    print(f"{name or 'processor'}, {os.cpu_count()} cores, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["TUNER_CACHE"] = str(Path(scratch) / "cache")
        options.folder, options.place = Path(scratch), Place(Path(scratch), options.device)
        hands = Crew(options.place, max(count for count, _ in (ALONE, *options.crews)))
        counts = [count for model in options.models for count in options.processes.get(model, [1])]
        workers = Crew(options.place, max(counts))
        _all(hands, workers, options)
    print(f"{time.monotonic() - began:.0f} s in all, load {os.getloadavg()[0]:.1f}")


def _all(hands: Crew, workers: Crew, options: argparse.Namespace) -> None:
    crews: Sequence[Crew] = (hands, workers)
    try:
        prepare(options.place, options)
        for crew in crews:
            crew.ready()
        for model in options.models:
            compare(model, hands, workers, options)
    finally:
        for crew in crews:
            crew.leave()
    print_limits(options)


if __name__ == "__main__":
    main()
