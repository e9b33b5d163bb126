"""Which precision, layout and execution train fastest here: measured in a probe, never guessed.

It compares precisions and layouts of one training. On a GPU that holds the images it also
compares steps launched one by one with CUDA graphs, finds how many trainings side by side fill the
device, and whether they had better go in lockstep as one network (see ``tuner.contest``).

What the probe finds is kept in a small file, so that the workers of a machine measure once, and
decide alike. A trial's recipe says what it was trained with: its numbers do not depend on a probe
once it is resolved.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tuner import contest, speeds_file
from tuner.alone import alone
from tuner.compiled import is_wanted
from tuner.datasets import Data, ResidentImages
from tuner.fused import can_fuse, has_norms
from tuner.lane import Lane
from tuner.recipe import Recipe, dump_component
from tuner.seeding import seeded
from tuner.space import default_of
from tuner.steps import Execution

PRECISIONS, LAYOUTS = ("float32", "bfloat16"), ("channels_last", "contiguous")
FUSED = "fused"
ROUNDS = 4
ENOUGH_SECONDS = 5.0
"""After so long there are no more rounds: what takes long is told apart by few."""
PIXELS = 2**17
SMALLEST = 8
HOPELESS = 4.0
"""How far behind with a few images leaves a candidate out."""
WORTH = 1.05
"""How much faster than a plainer choice another one must be."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Speed:
    """Images that a candidate trains on per second, all ``lanes`` of it together."""

    precision: str
    layout: str
    images: float
    execution: Execution = "plain"
    lanes: int = 1

    def __str__(self) -> str:
        beside = f", {self.lanes} side by side" if self.lanes > 1 else ""
        how = "" if self.execution == "plain" else f" {self.execution}{beside}"
        return f"{self.precision} {self.layout}{how}"

    @property
    def seats(self) -> int:
        """Trainings whose memory one of them takes: those of a group are one network."""
        return self.lanes if self.execution == "grouped" else 1

    @property
    def plainness(self) -> tuple[bool, bool, bool, bool, int]:
        """Smaller for what is simpler, or keeps more digits."""
        return (
            self.precision != PRECISIONS[0],
            self.layout != LAYOUTS[0],
            self.execution != "plain",
            self.execution == "grouped",
            self.lanes,
        )


def settled(recipe: Recipe, data: Data, device: str) -> Recipe:
    """The recipe with what its training leaves to the machine chosen by the probe."""
    training = recipe.training
    if "auto" not in (training.precision, training.layout):
        return recipe
    best = fastest(training, speeds(recipe, data, device))
    return replace(recipe, training=replace(training, precision=best.precision, layout=best.layout))


def chosen(recipe: Recipe, data: Data, device: str, most: int | None = None) -> Speed:
    """How to execute a settled recipe, and how many of its like side by side, at ``most``."""
    training = recipe.training
    if torch.device(device).type != "cuda":
        return Speed(training.precision, training.layout, 0.0)
    return fastest(training, speeds(recipe, data, device), most)


def fastest(training: Any, measured: list[Speed], most: int | None = None) -> Speed:
    """The plainest of the candidates that are nearly as fast as the fastest the training allows.

    With at ``most`` so many lanes at once a larger group would have empty seats. Where norms are
    not fused, that layout is channels_last.
    """
    layout = training.layout
    if layout == FUSED and FUSED not in {speed.layout for speed in measured}:
        layout = LAYOUTS[0]
    allowed = [
        speed
        for speed in measured
        if training.precision in ("auto", speed.precision)
        and layout in ("auto", speed.layout)
        and (speed.execution != "grouped" or most is None or speed.lanes <= most)
    ]
    if not allowed:
        # Nothing worked, not even the plain one: out of memory, which training copes with.
        plain = training.canonical()
        return Speed(plain.precision, plain.layout, 0.0)
    best = max(speed.images for speed in allowed)
    near = [speed for speed in allowed if speed.images * WORTH >= best]
    return min(near, key=lambda speed: speed.plainness)


def speeds(recipe: Recipe, data: Data, device: str) -> list[Speed]:
    """Training speed of each candidate for the recipe's model and batches on this device."""
    key = _key(recipe, data, device)
    return _as_speeds(speeds_file.read(key)) or _found(key, recipe, data, device)


def all_speeds() -> Iterator[tuple[str, list[Speed]]]:
    """What was measured on this machine: of which model and batches on what, and the speeds."""
    for of, rows in speeds_file.read_all():
        if found := _as_speeds(rows):
            yield of, found


def _as_speeds(rows: speeds_file.Rows | None) -> list[Speed]:
    """Rows of the file; none where another version of Tuner wrote them."""
    try:
        return [Speed(**values) for values in rows or ()]
    except TypeError:
        return []


def _found(key: str, recipe: Recipe, data: Data, device: str) -> list[Speed]:
    """Measure, while nobody else on this machine does; what others found meanwhile is taken."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            stack.enter_context(alone(speeds_file.path()))
        if known := _as_speeds(speeds_file.read(key)):
            return known
        name = dump_component("model", recipe.model)["name"]
        log.info("measuring how this machine trains the model %s fastest, once for all", name)
        resident = isinstance(data.train.images, ResidentImages)
        side_by_side = resident and torch.device(device).type == "cuda"
        measured = _side_by_side if side_by_side else _one_by_one
        found = list(measured(recipe, data, device))
        if found:
            speeds_file.write(key, label(recipe, data, device), [vars(speed) for speed in found])
        return found


def _key(recipe: Recipe, data: Data, device: str) -> str:
    """What the speeds depend on, short enough for people to find their own in the file.

    Of numbers that may be searched over a range, such as dropout, only whether they are 0 counts,
    and of batches the next power of two: else every trial would measure anew.
    """
    model = dump_component("model", recipe.model)
    about = {k: bool(v) if isinstance(v, float) else v for k, v in model.items()}
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]
    batch = 1 << (recipe.training.batch_size - 1).bit_length()
    shape = "x".join(map(str, (batch, *data.image_shape)))
    where = f"{_device_name(device)}, {torch.get_num_threads()} threads"
    also = ", fused too"
    if torch.device(device).type == "cuda":
        also = ", in groups and compiled too" if is_wanted() else ", in groups too"
        also += "" if isinstance(data.train.images, ResidentImages) else ", images elsewhere"
    return f"{model['name']} {digest}, {shape}, {where}, torch {torch.__version__}{also}"


def label(recipe: Recipe, data: Data, device: str) -> str:
    """What the speeds are of, for people: model, batches, device."""
    model = dump_component("model", recipe.model)
    name, cls = model.pop("name"), type(recipe.model)
    more = "".join(f" {k}={v}" for k, v in model.items() if v != default_of(cls, k))
    shape, threads = "x".join(map(str, data.image_shape)), torch.get_num_threads()
    where = _device_name(device) + ("" if threads == 1 else f", {threads} threads")
    return f"{name}{more}, batches of {recipe.training.batch_size} ({shape}), {where}"


def _device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device} {_processor()}"


@lru_cache
def _processor() -> str:
    """Name of the processor, and what it can do as torch sees it."""
    lines = (
        Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    )
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    halves = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags]
    return " ".join([*(names or [platform.processor()])[:1], *halves])


def _side_by_side(recipe: Recipe, data: Data, device: str) -> Iterator[Speed]:
    for found in contest.candidates(recipe, data, device, product(PRECISIONS, LAYOUTS)):
        yield Speed(*found)


def _one_by_one(recipe: Recipe, data: Data, device: str) -> Iterator[Speed]:
    """Fastest of a few steps each, in turns; candidates that do not work here are left out.

    What is far behind with a few images, as bfloat16 is on a processor that has no such
    products, is not measured with many: that alone could take minutes.
    """
    indices, images = _batch(recipe, data)
    times: dict[tuple[str, str], list[float]] = {}
    steps: dict[tuple[str, str], Callable[[int], float]] = {}
    few, most = min(SMALLEST, len(indices)), len(indices)
    for candidate in product(PRECISIONS, _layouts(recipe, data, device)):
        step = _step(recipe, data, device, candidate, indices, images)
        try:
            times[candidate] = [step(few) for _ in range(3)]
            if min(times[candidate]) < HOPELESS * min(map(min, times.values())):
                step(most)
                steps[candidate] = step
        except (RuntimeError, NotImplementedError):
            times.pop(candidate, None)
    sizes = {candidate: most if candidate in steps else few for candidate in times}
    times |= {candidate: [step(most)] for candidate, step in steps.items()}
    began = time.monotonic()
    for _ in range(ROUNDS):
        for candidate, step in steps.items():
            times[candidate].append(step(most))
        if time.monotonic() - began > ENOUGH_SECONDS:
            break
    for candidate, seconds in times.items():
        yield Speed(*candidate, round(sizes[candidate] / min(seconds), 1))


def _layouts(recipe: Recipe, data: Data, device: str) -> tuple[str, ...]:
    """Those that are of use for the recipe's model."""
    with seeded("probe"):
        model = recipe.model.build(data.num_classes, data.image_shape)
    fuses = has_norms(model) and can_fuse(torch.device(device))
    return (*LAYOUTS, FUSED) if fuses else LAYOUTS


def _batch(recipe: Recipe, data: Data) -> tuple[Tensor, Tensor]:
    """A batch of the recipe's size, or a smaller one where images are large."""
    _, height, width = data.image_shape
    size = min(recipe.training.batch_size, max(SMALLEST, PIXELS // (height * width)))
    indices = torch.arange(min(size, len(data.train)))
    return indices, next(iter(data.train.images.batches([indices])))


def _step(
    recipe: Recipe,
    data: Data,
    device: str,
    candidate: tuple[str, str],
    indices: Tensor,
    images: Tensor,
) -> Callable[[int], float]:
    """A training step with the first so many images, that says how many seconds it took."""
    training = replace(recipe.training, precision=candidate[0], layout=candidate[1])
    lane = Lane(replace(recipe, training=training), data, device)
    lane.begin_epoch()

    def step(number: int) -> float:
        with seeded("probe", device=lane.device):
            began = _clock(device)
            lane.step(indices[:number], images[:number], share=0.0)
            lane.noted.clear()
            return _clock(device) - began

    return step


def _clock(device: str) -> float:
    """Processor time where one thread does all the work: others on the machine do not count."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()
