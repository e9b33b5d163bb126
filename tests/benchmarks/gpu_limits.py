"""What a GPU could do at most: matrix products, copies, and what a training step needs of both.

Bytes are those of every operation's operands and results, each once, as if nothing stayed in a
cache and no two operations were one. Where kernels are fused, the bound can be beaten.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from trainer_contenders import BATCH, DECAY, LR, MOMENTUM

from tuner.datasets import Data
from tuner.recipe import Recipe

REPEATS = 10


@dataclass(frozen=True)
class Machine:
    """Operations per second of a bfloat16 matrix product, and bytes per second of a copy."""

    product_seconds: float
    flops: float
    bytes: float


@dataclass(frozen=True)
class Costs:
    """Operations and bytes per image of a training step, or of an evaluation."""

    flops: float
    bytes: float


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes that operations read and write; views and empty tensors are free."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self, function, types, args=(), kwargs=None
    ):
        """Run the operation and count it."""
        result = function(*args, **(kwargs or {}))
        read, written = list(_tensors((args, kwargs))), list(_tensors(result))
        places = {tensor.untyped_storage().data_ptr() for tensor in read}
        moved = function._schema.is_mutable or any(
            tensor.untyped_storage().data_ptr() not in places for tensor in written
        )
        if moved and "empty" not in function._schema.name:
            once = {(t.data_ptr(), t.numel()): t.numel() * t.element_size() for t in read + written}
            self.bytes += sum(once.values())
        return result


def _tensors(values: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def measure(device: str, size: int, megabytes: int) -> Machine:
    """Time a product of two ``size`` x ``size`` matrices, and a copy."""
    a = torch.randn(size, size, device=device).to(torch.bfloat16)
    product = seconds(lambda: a @ a, device)
    source = torch.zeros(megabytes << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.numel() / seconds(lambda: target.copy_(source), device)
    return Machine(product, 2 * size**3 / product, copied)


def seconds(run: Callable[[], Any], device: str) -> float:
    """Mean seconds of a call that is repeated."""
    for _ in range(3):
        run()
    _wait(device)
    began = time.perf_counter()
    for _ in range(REPEATS):
        run()
    _wait(device)
    return (time.perf_counter() - began) / REPEATS


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def costs(recipe: Recipe, data: Data, device: str) -> tuple[Costs, Costs]:
    """What a training image and a validation image cost, in the recipe's precision."""
    model = recipe.model.build(data.num_classes, data.image_shape).to(device)
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), LR[0], MOMENTUM, weight_decay=DECAY)
    images = torch.randn(BATCH, *data.image_shape, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    targets = torch.arange(BATCH, device=device) % data.num_classes
    half = recipe.training.precision == "bfloat16"

    def logits() -> Tensor:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=half):
            answer: Tensor = model(images)
        return answer.float()

    def train() -> None:
        optimizer.zero_grad()
        F.cross_entropy(logits(), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    train()  # the optimizer makes its buffers
    trained = _counted(train)
    model.eval()
    with torch.no_grad():
        return trained, _counted(logits)


def _counted(run: Callable[[], Any]) -> Costs:
    with Traffic() as traffic:
        run()
    with FlopCounterMode(display=False) as products:
        run()
    return Costs(products.get_total_flops() / BATCH, traffic.bytes / BATCH)
