"""Trials per minute of the head rung's engine on two processes, beside the ordinary loop.

Ordinary: TensorDataset, DataLoader, WeightedRandomSampler, ``nn.Linear``, SGD, one trial at a
time, in two processes of one thread each: torch's default threads can be many times slower when
anything else wants a core. All train recipes of the same kind on the same features for the same
epochs and judge the same validation part; no storage.

    python tests/benchmarks/heads.py cifar10 --seed 0    # a folder with train/ of class folders
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from tuner import checkpoint
from tuner.datasets import Data
from tuner.heads import Features, HeadTraining, cached_features, train_heads
from tuner.metrics import evaluate
from tuner.models import Classifier
from tuner.recipe import Recipe
from tuner.trainer import epochs

PROCESSES = 2
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


def prepared(root: Path, seed: int, length: int) -> tuple[Recipe, Data, Features]:
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


def fast(chosen: list[Recipe], features: Features, data: Data, settings: HeadTraining) -> float:
    """Mean balanced accuracy of the recipes, trained by the engine."""
    found = train_heads(chosen, features, data, settings)
    return mean(_judge(result.logits, data) for _, result in found)


_loaded: tuple[Recipe, Data, Features] | None = None


def _begin(root: Path, seed: int, length: int) -> None:
    global _loaded
    torch.set_num_threads(1)
    _loaded = prepared(root, seed, length)


def _work(kind: str, number: int, seed: int, settings: HeadTraining) -> tuple[float, float, float]:
    """Seconds, CPU-seconds and mean balanced accuracy of a share of the recipes."""
    assert _loaded is not None
    base, data, features = _loaded
    chosen = recipes(base, number, seed)
    began, cpu = time.perf_counter(), time.process_time()
    if kind == "engine":
        quality = fast(chosen, features, data, settings)
    else:
        quality = mean(ordinary(recipe, features, data, settings) for recipe in chosen)
    return time.perf_counter() - began, time.process_time() - cpu, quality


def _measure(
    kind: str, pools: dict[str, ProcessPoolExecutor], number: int, seed: int, settings: HeadTraining
) -> tuple[float, float, float]:
    """Trials per minute by the clock, CPU-milliseconds per trial, balanced accuracy."""
    shares = [(kind, number, 100 * seed + share, settings) for share in range(PROCESSES)]
    began = time.perf_counter()
    done = list(pools[kind].map(_work, *zip(*shares, strict=True)))
    minutes = (time.perf_counter() - began) / 60
    trials = number * PROCESSES
    cpu = sum(spent for _, spent, _ in done) / trials
    return trials / minutes, 1000 * cpu, mean(quality for _, _, quality in done)


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
    parser.add_argument("root", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--length", type=int, default=24, help="epochs of the backbone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=448, help="of the engine, per process")
    parser.add_argument("--ordinary", type=int, default=14, help="ordinary trials, per process")
    given = parser.parse_args()
    torch.set_num_threads(1)
    settings = HeadTraining()
    _, data, features = prepared(given.root, given.seed, given.length)
    print(f"{len(data.train)} training images, {features.train.shape[2]} features")
    pools = {
        kind: ProcessPoolExecutor(
            PROCESSES,
            get_context("spawn"),
            initializer=_begin,
            initargs=(given.root, given.seed, given.length),
        )
        for kind in ("engine", "ordinary")
    }
    found: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in pools}
    for kind in pools:
        _measure(kind, pools, 1, 99, settings)
    for seed in range(given.rounds):
        for kind in pools:
            number = given.trials if kind == "engine" else given.ordinary
            found[kind].append(_measure(kind, pools, number, seed, settings))
    samples = len(data.train) * settings.epochs
    for kind, rounds in found.items():
        columns = [
            f"{mean(c):.4g} ± {stdev(c) if len(c) > 1 else 0:.2g}"
            for c in zip(*rounds, strict=True)
        ]
        speed = 1000 * samples / mean(cpu for _, cpu, _ in rounds)
        print(f"| {kind} | " + " | ".join(columns) + f" | {speed / 1e6:.3g} M |")
    for name, speed in limits(features, settings).items():
        print(f"matrix products only, {name}: {speed / 1e6:.3g} M samples per CPU-second")


if __name__ == "__main__":
    main()
