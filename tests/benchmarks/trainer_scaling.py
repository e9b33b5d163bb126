"""How the cost of a trial grows with the images and with the classes, on made-up images."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from statistics import median

import torch

from tuner.datasets import Data
from tuner.datasets._assemble import Rules, assemble
from tuner.datasets._sources import ArraySource, Sources
from tuner.evaluation import assess_validation, extras, intervals
from tuner.imbalance import TailRule
from tuner.models import head_state
from tuner.recipe import Recipe
from tuner.trainer import epochs

IMAGES = {
    "mlp": (2_000, 6_300, 20_000),
    "small_cnn": (2_000, 6_300, 20_000),
    "resnet20": (500, 1_580, 5_000),
}
CLASSES = (20, 63, 200)
REPEATS = 2
EPOCHS = 2


def made_up(images: int, classes: int) -> Data:
    """Grey 28x28 images that say a little about their class; a fifth of them validates."""
    draw = torch.Generator().manual_seed(0)
    targets = torch.arange(images) % classes
    pixels = torch.randint(0, 200, (images, 1, 28, 28), generator=draw, dtype=torch.uint8)
    pixels += (targets % 50).to(torch.uint8)[:, None, None, None]
    names = tuple(f"class {c:03}" for c in range(classes))
    rules = Rules(
        seed=0,
        validation_fraction=0.2,
        validation_cap=0,
        test_fraction=0.0,
        carve=lambda available, _: available,
        carve_test=False,
        tail=TailRule(bottom=0.3),
    )
    return assemble("made up", Sources(names, ArraySource(pixels, targets, "all")), rules, 2**40)


def cost(data: Data, model: str) -> float:
    """Median processor seconds of a trial without its storage: training, metrics, intervals."""
    recipe = Recipe.from_dict(
        {
            "epochs": EPOCHS,
            "data": {"name": "digits"},
            "model": {"name": model},
            "augment": {"name": "standard"},
            "training": {"name": "single_stage", "layout": "fused"},
            "sampler": {"name": "class_aware", "exponent": 0.5},
        }
    )
    times = []
    for _ in range(REPEATS):
        began = time.process_time()
        _trial(recipe, data)
        times.append(time.process_time() - began)
    return median(times)


def _trial(recipe: Recipe, data: Data) -> None:
    for result in epochs(recipe, data):
        assessment = assess_validation(result.logits, data, recipe)
    norms, bias = head_state(result.lane.model.head)
    intervals(result.logits, assessment, data)
    extras(result.logits, norms, bias, data.validation.targets, data.groups)


def exponent(sizes: Sequence[int], costs: Sequence[float]) -> float:
    """Slope of log cost over log size, by least squares."""
    xs, ys = [math.log(size) for size in sizes], [math.log(value) for value in costs]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    products = sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True))
    return products / sum((a - x) ** 2 for a in xs)


def print_scaling() -> None:
    """Costs and fitted exponents; 1 is linear, 0 is flat."""
    torch.set_num_threads(1)
    cost(made_up(1_000, 10), "mlp")
    for model, sizes in IMAGES.items():  # four minutes of one core
        data = [cost(made_up(images, 20), model) for images in sizes]
        classes = [cost(made_up(sizes[2], count), model) for count in CLASSES]
        for what, counts, costs in (("images", sizes, data), ("classes", CLASSES, classes)):
            shown = ", ".join(f"{s}: {c:.2f}" for s, c in zip(counts, costs, strict=True))
            fit = exponent(counts, costs)
            print(f"{model}, cpu-s per trial by {what}: {shown}; exponent {fit:.2f}")
