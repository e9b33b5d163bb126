"""How fast trials are trained on two cores: Tuner beside the ordinary loop.

Contenders take turns within one run (see ``trainer_contenders.py``): the ordinary loop in one
process with torch's defaults, the same loop tuned by an expert (a process with one thread for
each core), and Tuner's workers. Processor seconds are what to compare where others use the
machine too: wall-clock counts only in rounds that had it nearly to themselves.

    python tests/benchmarks/trainer.py --data FOLDER     # train/ and val/ with a folder per class
    python tests/benchmarks/trainer.py --scaling         # cost per trial with data and classes
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import tomli_w
from trainer_contenders import BATCH, DECAY, EXPONENT, LR, MOMENTUM, Task, serve
from trainer_limits import print_limits
from trainer_scaling import print_scaling

from tuner.session import create
from tuner.stores import FolderStore
from tuner.study import load, parse

SIDES = ("ordinary", "tuned", "tuner")
QUIET = 0.15
MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"name": "mlp", "depth": 2},
    "small_cnn": {"name": "small_cnn"},
    "resnet20": {"name": "resnet20"},
}
SIZES = {"mlp": (28, 1), "small_cnn": (28, 1), "resnet20": (32, 3)}
EPOCHS = {"mlp": 5, "small_cnn": 2, "resnet20": 1}
SLOW = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Block:
    """What one contender did in one round; ``others`` is the share of the machine others used."""

    trials: int
    wall: float
    cpu: float
    others: float
    scores: list[float]

    @property
    def per_trial(self) -> float:
        """Processor seconds per trial."""
        return self.cpu / self.trials

    @property
    def rate(self) -> float:
        """Trials per second of the machine."""
        return self.trials / self.wall


def study(model: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """The study file of a round: a search of what the ordinary loop searches too."""
    side, channels = SIZES[model]
    profile = {"name": "exponential", "ratio": options.ratio}
    return {
        "name": f"{model}-{seed}",
        "data": {
            "name": "image_folder",
            "root": str(options.data.absolute()),
            "image_size": options.size or side,
            "channels": options.channels or channels,
            "validation_cap": 0,
            **({"profile": profile} if options.ratio > 1 else {}),
        },
        "objective": {"metric": "balanced_accuracy"},
        "budget": {"trials": 1000, "epochs": options.epochs or EPOCHS[model]},
        "search": {"algorithm": "random", "pruner": "none", "seed": seed},
        "model": MODELS[model],
        "training": {"batch_size": BATCH},
        "schedule": {"name": "constant"},
        "augment": {"name": "standard"},
        "loss": {"name": "cross_entropy"},
        "space": {
            "optimizer": {
                "sgd": {
                    "lr": {"low": LR[0], "high": LR[1], "log": True},
                    "momentum": MOMENTUM,
                    "weight_decay": DECAY,
                    "decay_norm": True,
                }
            },
            "sampler": {"class_aware": {"exponent": {"low": EXPONENT[0], "high": EXPONENT[1]}}},
        },
    }


class Contender:
    """The processes of one side, which train when they are told to."""

    def __init__(self, side: str, path: Path, url: str, folder: Path, cores: int) -> None:
        self.side = side
        count, threads = (1, None) if side == "ordinary" else (cores, 1)
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        with _environment(threads):
            for _ in range(count):
                ours, theirs = context.Pipe()
                task = Task(side, path, url, folder, threads)
                context.Process(target=serve, args=(task, theirs), daemon=True).start()
                self.pipes.append(ours)
        self.sizes = [pipe.recv() for pipe in self.pipes][0]

    def train(self, trials: int, name: str) -> Block:
        """Let every process train so many trials of the study ``name``."""
        began, busy = time.perf_counter(), _busy()
        for pipe in self.pipes:
            pipe.send((trials, name))
        answers = [pipe.recv() for pipe in self.pipes]
        wall, cpu = time.perf_counter() - began, sum(answer["cpu"] for answer in answers)
        others = max(0.0, _busy() - busy - cpu) / (wall * (os.cpu_count() or 1))
        scores = [score for answer in answers for score in answer["scores"]]
        return Block(trials * len(answers), wall, cpu, others, scores)

    def leave(self) -> None:
        """End the processes."""
        for pipe in self.pipes:
            pipe.send(None)


@contextmanager
def _environment(threads: int | None) -> Iterator[None]:
    before = {name: os.environ.pop(name, None) for name in SLOW}
    os.environ.update({name: str(threads) for name in SLOW} if threads else {})
    yield
    for name, value in before.items():
        os.environ.pop(name, None)
        os.environ.update({} if value is None else {name: value})


def _busy() -> float:
    """Seconds that all cores together were busy since the machine started."""
    words = Path("/proc/stat").read_text().splitlines()[0].split()
    user, nice, system, _, _, irq, soft, steal = map(int, words[1:9])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


def compare(model: str, options: argparse.Namespace) -> None:
    """Let the contenders take turns, and print what each gave."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        path, url = folder / "study.toml", f"sqlite:///{folder}/tuner.db"
        path.write_text(tomli_w.dumps(study(model, 0, options)))
        file = load(path)
        data = file.data.build()
        for turn in range(options.rounds + 1):
            values = study(model, turn, options)
            own = parse(values, tomli_w.dumps(values), where=f"round {turn}")
            create(own, url, FolderStore(folder), data)
        urls = {"tuner": url}
        sides = [
            Contender(
                side, path, urls.get(side, f"sqlite:///{folder}/{side}.db"), folder, options.cores
            )
            for side in options.sides
        ]
        sides[-1].train(1, f"{model}-0")  # the first trial imports much
        rounds = [
            {side.side: side.train(_trials(side, options), f"{model}-{turn + 1}") for side in sides}
            for turn in range(options.rounds)
        ]
        for side in sides:
            side.leave()
    print_table(model, file.budget.epochs, sides[0].sizes, rounds)
    print_limits(file, data, [r["tuner"].per_trial for r in rounds])


def _trials(side: Contender, options: argparse.Namespace) -> int:
    return int(options.trials * (options.more if side.side == "tuner" else 1))


def print_table(
    model: str, epochs: int, sizes: dict[str, int], rounds: Sequence[dict[str, Block]]
) -> None:
    """One line per contender, and the ratios within the rounds."""
    print(
        f"\n{model}: {sizes['train']} training and {sizes['validation']} validation images, "
        f"{epochs} epochs per trial, {len(rounds)} rounds, load {os.getloadavg()[0]:.1f}"
    )
    for side in rounds[0]:
        blocks = [r[side] for r in rounds]
        scores = [100 * fmean(block.scores) for block in blocks if block.scores]
        speed = [epochs * sizes["train"] / block.per_trial for block in blocks]
        print(
            f"{side:9} {_spread([b.per_trial for b in blocks])} cpu-s/trial "
            f"{_spread([b.rate for b in blocks])} trials/s {median(speed):8.0f} samples/cpu-s  "
            f"balanced accuracy {fmean(scores):.1f} ± {_error(scores):.1f} over rounds  "
            f"others {100 * median([b.others for b in blocks]):.0f} %"
        )
    _print_ratios(rounds)


def _print_ratios(rounds: Sequence[dict[str, Block]]) -> None:
    quiet = [r for r in rounds if max(block.others for block in r.values()) < QUIET]
    for side in [side for side in rounds[0] if side != "tuner"]:
        costs = [r[side].per_trial / r["tuner"].per_trial for r in rounds]
        rates = [r["tuner"].rate / r[side].rate for r in rounds]
        calm = [r["tuner"].rate / r[side].rate for r in quiet]
        print(
            f"Tuner to {side}: {_spread(costs)} by processor time, {_spread(rates)} by the clock, "
            + (f"{_spread(calm)} in {len(calm)} quiet rounds" if calm else "no round was quiet")
        )


def _error(values: Sequence[float]) -> float:
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def _spread(values: Sequence[float]) -> str:
    return f"{median(values):.2f} [{min(values):.2f} to {max(values):.2f}]"


def main() -> None:
    """Print a table per model, or how the cost grows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="train/ and val/, each with a folder per class")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--rounds", type=int, default=3)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--cores", type=int, default=cores, help="processes of a side")
    parser.add_argument("--trials", type=int, default=1, help="per process and round")
    parser.add_argument("--more", type=int, default=4, help="times as many for Tuner")
    parser.add_argument("--epochs", type=int, help="per trial (default: 5, 2 and 1)")
    parser.add_argument("--size", type=int, help="of the images (default: 28 and 32)")
    parser.add_argument("--channels", type=int, help="of the images (default: 1, 1 and 3)")
    parser.add_argument("--ratio", type=float, default=100, help="imbalance that is carved")
    parser.add_argument("--scaling", action="store_true")
    options = parser.parse_args()
    if options.scaling:
        print_scaling()
        return
    if options.data is None:
        parser.error("--data FOLDER is missing")
    for model in options.models:
        compare(model, options)


if __name__ == "__main__":
    main()
