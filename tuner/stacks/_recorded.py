"""A step of a stack as a graph, and the tensors that it reads: rows for many steps ahead."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tuner.augment import Drawn
from tuner.lane import Lane
from tuner.seeding import repeatable
from tuner.stacks._device import Mark, Uncapturable
from tuner.stacks._optimizers import Parts

if TYPE_CHECKING:
    from tuner.stacks._stack import Stack

CHUNK = 32


@dataclass(eq=False)
class Chunk:
    """Steps that a lane asks for: indices (S, B), numbers for the optimizer (S, H), draws (S, ...).

    ``mark`` is the place after them once they are launched; ``asked`` says how often their lane
    looked after them while the device had nothing to do.
    """

    indices: Tensor
    numbers: Tensor
    drawn: Drawn
    mark: Mark | None = None
    asked: int = 0

    def __len__(self) -> int:
        return len(self.indices)


class Recorded:
    """Steps with ``size`` images for each seat, with all the ``parts`` that lanes need."""

    def __init__(self, stack: Stack, size: int, parts: Parts) -> None:
        # It belongs to the stack: a cycle would keep the memory of both until somebody looks.
        self.stack: Stack = weakref.proxy(stack)
        self.size, self.parts = size, parts
        lane, seats = stack.pattern, stack.seats
        device, dtype = lane.device, lane.dtype
        wide = stack.optimizer.width
        self.indices = torch.zeros(CHUNK, seats, size, dtype=torch.int64, device=device)
        self.numbers = torch.zeros(CHUNK, seats, wide, dtype=dtype, device=device)
        self.active = torch.zeros(CHUNK, seats, 1, dtype=torch.bool, device=device)
        self.drawn = {n: _rows(example, seats, device) for n, example in _examples(lane, size)}
        noted = CHUNK if stack.kind.notes else 0
        self.losses = torch.zeros(noted, seats, size, dtype=dtype, device=device)
        self.frame = stack.losses.frame(size)
        self.row = torch.zeros(1, dtype=torch.int64, device=device)
        self.replay = self._record()

    def _record(self) -> Callable[[], None]:
        """The recorded step; the stack is as before."""
        stack = self.stack
        with stack.device.work(), repeatable(stack.pattern.device), _as_before(stack):
            try:
                with stack.device.drawing():
                    self._step()
                    return stack.device.record(self._step)
            except (torch.OutOfMemoryError, Uncapturable):
                raise
            except Exception as error:
                first = next(iter(str(error).splitlines()), "")
                raise Uncapturable(f"{type(error).__name__}: {first}") from error

    def _step(self) -> None:
        """A step that finds everything in its row."""
        stack = self.stack
        indices, numbers = self._now(self.indices), self._now(self.numbers)
        drawn = {name: self._now(rows) for name, rows in self.drawn.items()}
        # A lane that is alone is never without a step where there is one.
        active = self._now(self.active) if stack.seats > 1 else None
        with torch.no_grad():
            targets = stack.pattern.train_targets[indices]
            inputs, soft = stack.network.inputs(indices, targets, drawn)
        logits = stack.network.logits(inputs)
        with torch.no_grad():
            self._learn(logits, soft, targets, numbers, active)
        self.row.add_(1)

    def _now(self, rows: Tensor) -> Tensor:
        return rows.index_select(0, self.row)[0]

    def _learn(
        self, logits: Tensor, soft: Tensor, targets: Tensor, numbers: Tensor, active: Tensor | None
    ) -> None:
        stack, known = self.stack, logits.detach()
        if stack.kind.notes:
            each = cross_entropy(known.flatten(0, 1), targets.flatten(), reduction="none")
            self.losses.index_copy_(0, self.row, each.view(1, *targets.shape))
        gradient, means = stack.losses.gradient(
            known, soft, targets, self.frame, active, self.parts
        )
        change = stack.network.backward(logits, gradient)
        stack.optimizer.step(change, numbers, active, self.parts)
        stack.network.settle(active)
        sums = means * self.size
        stack.totals.add_(sums if active is None else sums.masked_fill(~active[:, 0], 0.0))

    def fill(self, chunks: Mapping[int, Chunk]) -> None:
        """Copy what the next steps of some seats read to where they look for it."""
        steps = max(map(len, chunks.values()))
        _copy(self.indices, {seat: chunk.indices for seat, chunk in chunks.items()}, steps)
        _copy(self.numbers, {seat: chunk.numbers for seat, chunk in chunks.items()}, steps)
        for name, rows in self.drawn.items():
            _copy(rows, {seat: chunk.drawn[name] for seat, chunk in chunks.items()}, steps)
        if self.stack.seats > 1:
            active = {seat: torch.ones(len(chunk), 1) for seat, chunk in chunks.items()}
            _copy(self.active, active, steps)
        self.row.zero_()

    def admit(self) -> None:
        """Take note of the losses that lanes came with."""
        if "adaptive" in self.parts:
            self.stack.losses.renew(self.frame, self.size)


def _examples(lane: Lane, size: int) -> Iterator[tuple[str, Tensor]]:
    """What a step of the coming epoch draws, of a generator that is nobody's."""
    nobody = torch.Generator().manual_seed(0)
    found = lane.augment.plan(1, size, lane.data.image_shape[1:], nobody, lane.progress)
    yield from found.items()


def _rows(example: Tensor, seats: int, device: torch.device) -> Tensor:
    """Rows (S, K, ...) of the same example everywhere."""
    return example[:, None].to(device).repeat(CHUNK, seats, *[1] * (example.ndim - 1))


def _copy(rows: Tensor, values: Mapping[int, Tensor], steps: int) -> None:
    """Copy values (S, ...) of some seats into the first rows (S, K, ...), without waiting."""
    host = torch.zeros(steps, *rows.shape[1:], dtype=rows.dtype, pin_memory=rows.is_cuda)
    for seat, given in values.items():
        host[: len(given), seat] = given
    rows[:steps].copy_(host, non_blocking=True)


@contextmanager
def _as_before(stack: Stack) -> Iterator[None]:
    """Undo what happens to a stack inside the block."""
    kept = [(tensor, tensor.clone()) for tensor in stack.tensors()]
    try:
        yield
    finally:
        for tensor, value in kept:
            tensor.copy_(value)
