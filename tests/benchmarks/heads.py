"""Trials per minute of the head rung's engine on two processes, beside the ordinary loop.

Ordinary: TensorDataset, DataLoader, WeightedRandomSampler, ``nn.Linear``, SGD, one trial at a
time, in two processes of one thread each: torch's default threads can be many times slower when
anything else wants a core. All train recipes of the same kind on the same features for the same
epochs and judge the same validation part; no storage.

    python tests/benchmarks/heads.py cifar10 --seed 0    # a folder with train/ of class folders
    python tests/benchmarks/heads.py --device cuda --lanes 128 --ordinary 0

Without a folder, features of as many images are drawn: for speed alone. The ordinary loop is
always on the CPU; ``--ordinary 0`` leaves it out.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from tuner import checkpoint
from tuner.datasets import Data, Part, ResidentImages
from tuner.heads import Features, HeadTraining, cached_features, train_heads
from tuner.imbalance import Groups
from tuner.metrics import evaluate
from tuner.models import Classifier
from tuner.recipe import Recipe
from tuner.trainer import epochs

LOSSES: dict[str, Callable[[Callable[[float, float], float]], dict[str, Any]]] = {
    "cross_entropy": lambda u: {},
    "weighted_cross_entropy": lambda u: {"power": u(0, 1), "start": 0.5},
    "class_balanced": lambda u: {"effective_samples": 10 ** u(1, 4), "base": "focal"},
    "focal": lambda u: {"gamma": u(0.5, 3)},
    "asymmetric": lambda u: {"gamma_neg": u(0, 4), "eps": u(0.01, 0.3)},
    "weighted_asymmetric": lambda u: {"gamma_neg": u(0, 4), "power": u(0, 1)},
    "fnr_adaptive": lambda u: {"half_life": u(0.2, 2)},
    "label_smoothing": lambda u: {"eps": u(0.01, 0.3)},
    "label_aware_smoothing": lambda u: {"smooth_head": u(0.2, 0.4)},
    "balanced_softmax": lambda u: {},
    "logit_adjusted": lambda u: {"tau": u(0.2, 2)},
    "vector_scaling": lambda u: {"gamma": u(0, 0.3), "tau": u(0.2, 1.5)},
    "ldam": lambda u: {"max_margin": u(0.2, 0.8)},
    "equalization": lambda u: {"threshold": u(0.005, 0.05)},
}


def recipes(base: Recipe, number: int, seed: int) -> list[Recipe]:
    """Every loss in turn with random hyperparameters, natural or class-aware sampling."""
    draws = random.Random(seed)
    made = []
    for index in range(number):
        name = list(LOSSES)[index % len(LOSSES)]
        sampler = {"name": "class_aware", "exponent": draws.random(), "start": index % 2 / 2}
        loss = {"name": name, **LOSSES[name](draws.uniform)}
        made.append(Recipe.from_dict({**base.to_dict(), "loss": loss, "sampler": sampler}))
    return made


def drawn(width: int = 64) -> tuple[Recipe, Data, Features]:
    """Ten classes 100:1 of as many images as CIFAR-10-LT has, about means drawn at random."""
    draws = torch.Generator().manual_seed(0)
    means = torch.randn(10, width, generator=draws)
    counts = torch.tensor([round(5000 * 0.01 ** (c / 9)) for c in range(10)])
    train = torch.repeat_interleave(torch.arange(10), counts)
    held_out = torch.arange(10).repeat(100)
    copies, validation = (
        (means[targets] + 2 * torch.randn(2, len(targets), width, generator=draws)).half()
        for targets in (train, held_out)
    )
    data = Data(
        name="drawn",
        train=Part(ResidentImages(torch.zeros(len(train), 1, 1, 1)), train),
        validation=Part(ResidentImages(torch.zeros(len(held_out), 1, 1, 1)), held_out),
        class_names=tuple("abcdefghij"),
        mean=(0.0,),
        std=(1.0,),
        groups=Groups((0, 1, 2), (3, 4, 5, 6), (7, 8, 9)),
        class_counts=counts,
        pool_counts=counts,
        fingerprint="drawn",
    )
    values = {"epochs": 1, "data": {"name": "digits"}, "model": {"name": "linear"}}
    recipe = Recipe.from_dict(values)
    return recipe, data, Features(copies, train, validation[0], 1.0, "drawn")


def prepared(root: Path | None, seed: int, length: int) -> tuple[Recipe, Data, Features]:
    """What to train on: of a folder, else drawn."""
    return drawn() if root is None else of_folder(root, seed, length)


def of_folder(root: Path, seed: int, length: int) -> tuple[Recipe, Data, Features]:
    """CIFAR-10-LT 100:1, and the features of a small CNN trained on it."""
    data = {
        "name": "image_folder",
        "root": str(root.resolve()),
        "image_size": 32,
        "profile": {"name": "exponential", "ratio": 100},
        "tail": {"bottom": 0.3},
    }
    values: dict[str, Any] = {
        "epochs": length,
        "seed": seed,
        "data": data,
        "model": {"name": "small_cnn"},
        "augment": {"name": "standard"},
        "training": {"precision": "bfloat16"},
    }
    recipe = Recipe.from_dict(values)
    built = recipe.data.build()
    augment = recipe.augment.build(
        built.image_shape,
        mean=built.mean,
        std=built.std,
        class_counts=built.class_counts,
        groups=built.groups,
    )
    backbone = _backbone(recipe, built, root / f".backbone-{seed}-{length}.safetensors")
    features = cached_features(
        backbone, built, augment, copies=2, seed=seed, folder=root / ".features"
    )
    return recipe, built, features


def _backbone(recipe: Recipe, data: Data, path: Path) -> Classifier:
    model: Classifier = recipe.model.build(data.num_classes, data.image_shape)
    if not path.exists():
        for result in epochs(recipe, data):
            last = result
        checkpoint.save(path, last.lane.model.state_dict(), {})
    model.load_state_dict(checkpoint.load(path)[0])
    return model


def ordinary(recipe: Recipe, features: Features, data: Data, settings: HeadTraining) -> float:
    """Train one recipe as tutorials do; its balanced accuracy on the validation part."""
    train = features.train[0].float() * features.scale
    held_out = features.validation.float() * features.scale
    targets = features.train_targets
    loss = recipe.loss.build(data.class_counts)
    head = torch.nn.Linear(train.shape[1], data.num_classes)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs)
    dataset = TensorDataset(train, targets)
    for epoch in range(settings.epochs):
        loss.advance(epoch / settings.epochs)
        p = recipe.sampler.probabilities(data.class_counts, epoch / settings.epochs, data.groups)
        each = (p / data.class_counts)[targets]
        sampler = WeightedRandomSampler(each.tolist(), len(targets))
        for inputs, classes in DataLoader(dataset, settings.batch_size, sampler=sampler):
            optimizer.zero_grad()
            loss(head(inputs), classes).backward()
            optimizer.step()
        schedule.step()
    return _judge(head(held_out).detach(), data)


def _judge(logits: torch.Tensor, data: Data) -> float:
    value = evaluate(logits, data.validation.targets, data.groups)["balanced_accuracy"]
    return float("nan") if value is None else value


_loaded: tuple[Recipe, Data, Features] | None = None


def _begin(root: Path | None, seed: int, length: int, device: str) -> None:
    global _loaded
    torch.set_num_threads(1)
    base, data, features = prepared(root, seed, length)
    _loaded = (base, data, features.to(device))


@dataclass(frozen=True)
class Share:
    """What one process is to train."""

    kind: str
    number: int
    seed: int
    lanes: int
    device: str


def _work(share: Share) -> tuple[float, float, float]:
    """Seconds of training, CPU-seconds and mean balanced accuracy of a share of the recipes."""
    assert _loaded is not None
    base, data, features = _loaded
    chosen, settings = recipes(base, share.number, share.seed), HeadTraining()
    began, cpu = time.perf_counter(), time.process_time()
    if share.kind == "engine":
        where: dict[str, Any] = {"lanes": share.lanes, "device": share.device}
        found = [result for _, result in train_heads(chosen, features, data, settings, **where)]
        seconds = time.perf_counter() - began
        quality = mean(_judge(result.logits, data) for result in found)
    else:
        here = features.to("cpu")
        quality = mean(ordinary(recipe, here, data, settings) for recipe in chosen)
        seconds = time.perf_counter() - began
    return seconds, time.process_time() - cpu, quality


def _measure(
    pool: ProcessPoolExecutor, kind: str, number: int, seed: int, given: argparse.Namespace
) -> tuple[float, float, float, float]:
    """Trials per minute by the clock, without judging, CPU-ms per trial, balanced accuracy."""
    processes = range(given.processes)
    shares = [Share(kind, number, 100 * seed + p, given.lanes, given.device) for p in processes]
    began = time.perf_counter()
    done = list(pool.map(_work, shares))
    minutes = (time.perf_counter() - began) / 60
    trials = number * given.processes
    trained = 60 * trials / max(seconds for seconds, _, _ in done)
    cpu = sum(spent for _, spent, _ in done) / trials
    return trials / minutes, trained, 1000 * cpu, mean(quality for _, _, quality in done)


def limits(features: Features, settings: HeadTraining, lanes: int = 64) -> dict[str, float]:
    """Samples per CPU-second if only the products were computed, in one product or per lane."""
    classes, width = int(features.train_targets.max()) + 1, features.train.shape[2]
    size = settings.batch_size
    weight, inputs = torch.randn(lanes, classes, width), torch.randn(size, width)
    slope = torch.randn(lanes, classes, size)
    columns = inputs.t().expand(lanes, width, size)
    rows = inputs.expand(lanes, size, width)

    def one() -> None:
        torch.mm(weight.flatten(0, 1), inputs.t())
        torch.mm(slope.flatten(0, 1), inputs)

    def each() -> None:
        torch.bmm(weight, columns)
        torch.bmm(slope, rows)

    return {name: lanes * size / _cpu(run) for name, run in (("one", one), ("per lane", each))}


def _cpu(run: Callable[[], None], times: int = 100) -> float:
    """CPU-seconds of a call, the median of five rounds."""

    def rounds() -> Iterator[float]:
        for _ in range(6):
            began = time.process_time()
            for _ in range(times):
                run()
            yield (time.process_time() - began) / times

    return sorted(list(rounds())[1:])[2]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path, nargs="?", help="features are drawn without it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--length", type=int, default=24, help="epochs of the backbone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=448, help="of the engine, per process")
    parser.add_argument("--ordinary", type=int, default=14, help="ordinary trials, per process")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--lanes", type=int, default=64)
    parser.add_argument("--device", default="cpu", help="of the engine")
    given = parser.parse_args()
    torch.set_num_threads(1)
    settings = HeadTraining()
    _, data, features = prepared(given.root, given.seed, given.length)
    device = torch.cuda.get_device_name() if given.device != "cpu" else "cpu"
    print(f"{len(data.train)} training images, {features.train.shape[2]} features, {device}")
    kinds = {"engine": given.trials, "ordinary": given.ordinary}
    pools = {
        kind: ProcessPoolExecutor(
            given.processes,
            get_context("spawn"),
            initializer=_begin,
            initargs=(given.root, given.seed, given.length, given.device),
        )
        for kind, number in kinds.items()
        if number
    }
    found: dict[str, list[tuple[float, float, float, float]]] = {kind: [] for kind in pools}
    for kind, pool in pools.items():
        _measure(pool, kind, len(LOSSES) if kind == "engine" else 1, 99, given)
    for seed in range(given.rounds):
        for kind, pool in pools.items():
            found[kind].append(_measure(pool, kind, kinds[kind], seed, given))
    print("| | trials/min | training alone | CPU ms/trial | balanced accuracy | per CPU-second |")
    samples = len(data.train) * settings.epochs
    for kind, rounds in found.items():
        columns = [
            f"{mean(c):.4g} ± {stdev(c) if len(c) > 1 else 0:.2g}"
            for c in zip(*rounds, strict=True)
        ]
        speed = 1000 * samples / mean(cpu for _, _, cpu, _ in rounds)
        print(f"| {kind} | " + " | ".join(columns) + f" | {speed / 1e6:.3g} M |")
    if given.device != "cpu":
        return
    for name, speed in limits(features, settings).items():
        print(f"matrix products only, {name}: {speed / 1e6:.3g} M samples per CPU-second")


if __name__ == "__main__":
    main()
