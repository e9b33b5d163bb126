"""How far the trainer is from what the machine can do: matrix products and memory, one thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from optuna.trial import FixedTrial
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from tuner.backends import settled
from tuner.datasets import Data
from tuner.lane import Lane
from tuner.recipe import Recipe
from tuner.study import StudyFile

STEPS = 10
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "convolution")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def seconds(run: Callable[[], Any], repeats: int = 5) -> float:
    """Median processor seconds of a call."""
    times = []
    for _ in range(repeats + 1):
        began = time.process_time()
        run()
        times.append(time.process_time() - began)
    return median(times[1:])


def gemm_peak(precision: str, size: int = 1024) -> float:
    """Operations per second of one thread in a matrix product."""
    a = torch.rand(size, size, generator=torch.Generator()).to(DTYPES[precision])
    return 2 * size**3 / seconds(lambda: [a @ a for _ in range(4)]) * 4


def copy_speed(megabytes: int) -> float:
    """Bytes per second read and written by one thread."""
    a = torch.zeros(megabytes << 18)
    b = torch.empty_like(a)
    return 2 * 4 * a.numel() / seconds(lambda: [b.copy_(a) for _ in range(4)]) * 4


def operations(lane: Lane) -> tuple[float, float]:
    """Operations per image of a training step and of an evaluation, in products alone."""
    model, shape = lane.model.eval(), lane.data.image_shape
    images = torch.zeros(8, *shape).to(memory_format=torch.channels_last)
    with FlopCounterMode(display=False) as forward:
        logits = model(images)
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    ahead = forward.get_total_flops() / 8
    return ahead + backward.get_total_flops() / 8, ahead


def share_of_products(lane: Lane) -> float:
    """Share of a training step's time that convolutions and matrix products take."""
    lane.begin_epoch()
    plan = lane.plan()[: 2 * STEPS]
    steps = list(lane.images(plan))
    for indices, images in steps[:STEPS]:
        lane.step(indices, images, share=0.0)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for indices, images in steps[STEPS:]:
            lane.step(indices, images, share=0.0)
    times = {event.key: event.self_cpu_time_total for event in found.key_averages()}
    products = sum(time for key, time in times.items() if any(name in key for name in PRODUCTS))
    return float(products / sum(times.values()))


def recipe_of(file: StudyFile, data: Data) -> Recipe:
    """The study's default recipe, with the precision that trials are given here."""
    return settled(file.space.suggest(FixedTrial(file.space.defaults())), data, "cpu")


def print_limits(file: StudyFile, data: Data, per_trial: Sequence[float]) -> None:
    """What one core could do at most, and what share of it whole trials reach."""
    torch.set_num_threads(1)
    recipe = recipe_of(file, data)
    lane = Lane(recipe, data, "cpu")
    train, ahead = operations(lane)
    done = file.budget.epochs * (len(data.train) * train + len(data.validation) * ahead)
    peaks = {precision: gemm_peak(precision) for precision in DTYPES}
    precision = recipe.training.precision
    reached = done / median(per_trial)
    print(
        f"limit: products at {peaks['float32'] / 1e9:.0f} (float32) and "
        f"{peaks['bfloat16'] / 1e9:.0f} (bfloat16) GFLOP/s, copies at "
        f"{copy_speed(4) / 1e9:.0f} GB/s in the cache and {copy_speed(256) / 1e9:.0f} outside; "
        f"{train / 1e6:.2f} MFLOP per training image; whole trials reach {reached / 1e9:.0f} "
        f"GFLOP/s, {reached / peaks[precision]:.0%} of the peak in {precision}; "
        f"{share_of_products(lane):.0%} of a training step is in products"
    )
