"""Ways to execute training steps on one GPU, and what it costs to take a seat.

Random images in the shapes of the other benchmarks; steps alone, no validation and no storage.
Images per second are those that the probe measures (``tuner.contest``). A seat is timed from the
moment its lane is made until its first chunk of steps is done: the first time that includes what
is recorded, then the next lanes of the kind overwrite it.

    python tests/benchmarks/gpu_ways.py                      # 3 minutes
    python tests/benchmarks/gpu_ways.py --models mlp --lanes 8 32
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from tuner.contest import rate
from tuner.datasets import DATASETS, Data, Part, ResidentImages
from tuner.lane import Lane
from tuner.recipe import Recipe
from tuner.steps import Execution, Stacks, steps_of

SHAPES = {"mlp": (1, 28, 28), "small_cnn": (1, 28, 28), "resnet20": (3, 32, 32)}
SHAPES |= {"resnet32": (3, 32, 32), "resnet56": (3, 32, 32)}
IMAGES, BATCH, CHUNK, TAKEN = 10_000, 128, 32, 5
LOSSES = ("cross_entropy", "balanced_softmax", "focal")


def data_of(model: str, device: str) -> Data:
    """Random images of ten classes in the model's shape."""
    digits = DATASETS.parse("digits", {}, where="digits").build()
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (IMAGES, *SHAPES[model]), dtype=torch.uint8, generator=draws)
    targets = torch.randint(0, 10, (IMAGES,), generator=draws)
    channels = SHAPES[model][0]
    train = Part(ResidentImages(images), targets)
    return replace(digits, train=train, mean=(0.5,) * channels, std=(0.25,) * channels).to(device)


def recipe_of(model: str, precision: str, layout: str, **parts: Any) -> Recipe:
    """A recipe with crops and flips."""
    training = {"batch_size": BATCH, "precision": precision, "layout": layout}
    augment = {"name": "standard", "crop_padding": 2 if model == "mlp" else 4}
    values = {"epochs": 100, "data": {"name": "digits"}, "model": {"name": model}, **parts}
    return Recipe.from_dict({**values, "training": training, "augment": augment})


def compare(model: str, data: Data, options: argparse.Namespace) -> None:
    """Print images per second of every way."""
    ways: list[tuple[Execution, int]] = [("plain", 1), ("graph", 1)]
    ways += [("graph", lanes) for lanes in options.lanes]
    grouped: list[tuple[Execution, int]] = [("grouped", lanes) for lanes in options.lanes]
    for layout in ("channels_last", "contiguous"):
        recipe = recipe_of(model, options.precision, layout)
        for execution, lanes in (ways if layout == "channels_last" else []) + grouped:
            found = rate(recipe, data, options.device, execution, lanes)
            shown = "does not work" if found is None else f"{found:12,.0f} images/s"
            print(f"{model:10} {layout:14} {execution:8} {lanes:3}  {shown}", flush=True)


def take(model: str, data: Data, execution: Execution, lanes: int, device: str) -> None:
    """Print how long the first lane and the next ones take until their first chunk is done."""
    for loss in LOSSES:
        recipe = recipe_of(model, "bfloat16", "channels_last", loss={"name": loss})
        stacks = Stacks()
        seconds = [_seconds(recipe, data, execution, lanes, stacks, device) for _ in range(TAKEN)]
        first, *others = (1e3 * each for each in seconds)
        print(
            f"{model:10} {execution:8} {lanes:3} seats, {loss}: first lane {first:7.1f} ms, "
            f"the next ones {median(others):7.1f} ms (a chunk of {CHUNK} steps included)",
            flush=True,
        )


def _seconds(
    recipe: Recipe, data: Data, execution: Execution, lanes: int, stacks: Stacks, device: str
) -> float:
    began = time.perf_counter()
    lane = Lane(recipe, data, device)
    lane.begin_epoch()
    steps = steps_of(lane, execution, stacks, lanes)
    for _ in steps.run([torch.arange(BATCH)] * CHUNK, 0, None):
        pass
    took = time.perf_counter() - began
    steps.close()
    return took


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=["mlp", "small_cnn", "resnet32"])
    parser.add_argument("--lanes", nargs="+", type=int, default=[8, 16, 32])
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    torch.set_num_threads(1)
    name = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor()
    print(f"{name or 'processor'}, {os.cpu_count()} cores, torch {torch.__version__}")
    began = time.monotonic()
    for model in options.models:
        data = data_of(model, options.device)
        compare(model, data, options)
        for execution, lanes in (("graph", 1), ("grouped", options.lanes[0])):
            take(model, data, execution, lanes, options.device)  # type: ignore[arg-type]
    print(f"{time.monotonic() - began:.0f} s in all, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
