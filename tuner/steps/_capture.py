"""One step of a lane as a CUDA graph, and the tensors that it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tuner.augment import Drawn
from tuner.lane import Lane
from tuner.seeding import repeatable
from tuner.steps._device import GraphDevice

if TYPE_CHECKING:
    from tuner.steps._graph import GraphSteps

Plain = bool | int | float | str


class Uncapturable(Exception):
    """A step cannot be a graph; the text says why."""


def phase(lane: Lane) -> tuple[object, ...]:
    """What a captured step takes for granted: it is captured anew when any of it changes."""
    loss = {k: v for k, v in vars(lane.loss).items() if isinstance(v, Plain)}
    training = tuple(module.training for module in lane.model.modules())
    drawn = lane.augment.plan(1, 2, _size(lane), torch.Generator(), lane.progress)
    shapes = {name: tensor.shape for name, tensor in drawn.items()}
    return (
        lane.stage,
        id(lane.optimizer),
        tuple(sorted(loss.items())),
        hash(training),
        tuple(sorted(shapes.items())),
    )


def _size(lane: Lane) -> tuple[int, int]:
    _, height, width = lane.data.image_shape
    return height, width


class Captured:
    """Steps with ``size`` images each: a graph, and ``chunk`` rows of what the steps read."""

    def __init__(self, steps: GraphSteps, size: int, chunk: int) -> None:
        lane = self.lane = steps.lane
        self.size, self.chunk, self.total = size, chunk, steps.total
        device = lane.device
        self.indices = torch.zeros(chunk, size, dtype=torch.int64, device=device)
        self.rates = torch.zeros(chunk, len(lane.optimizer.param_groups), device=device)
        self.drawn: Drawn = self._examples(chunk)
        self.losses = torch.zeros(chunk, size, device=device)
        self.row = torch.zeros(1, dtype=torch.int64, device=device)
        self.replay = self._capture(steps.device)

    def _examples(self, steps: int) -> dict[str, Tensor]:
        """Rows as the coming epoch draws them, of a generator that is nobody's."""
        lane = self.lane
        nobody = torch.Generator().manual_seed(0)
        found = lane.augment.plan(steps, self.size, _size(lane), nobody, lane.progress)
        return {name: tensor.to(lane.device) for name, tensor in found.items()}

    def _capture(self, device: GraphDevice) -> Callable[[], None]:
        """The recorded step; the lane is as before."""
        with (
            device.work(),
            repeatable(self.lane.device),
            _as_before(self.lane, self.total),
            device.drawing(),
        ):
            try:
                self._warm_up()
                return device.record(self._step)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                first = next(iter(str(error).splitlines()), "")
                raise Uncapturable(f"{type(error).__name__}: {first}") from error

    def _warm_up(self) -> None:
        """Let libraries and optimizer set up what they keep, which a graph cannot."""
        before = phase(self.lane)
        self._step()
        self.lane.optimizer.zero_grad(set_to_none=True)
        if phase(self.lane) != before:
            raise Uncapturable("its loss keeps numbers outside of tensors")

    def _step(self) -> None:
        """A step that finds everything in its row."""
        lane, row = self.lane, self.row
        indices = self.indices.index_select(0, row)[0]
        rates = self.rates.index_select(0, row)[0]
        drawn = {name: rows.index_select(0, row)[0] for name, rows in self.drawn.items()}
        for group, rate in zip(lane.optimizer.param_groups, rates, strict=True):
            if not isinstance(group["lr"], Tensor):
                raise Uncapturable(f"{type(lane.optimizer).__name__} wants numbers on the host")
            group["lr"].copy_(rate)
        targets = lane.train_targets.index_select(0, indices)
        inputs, soft = lane.inputs(indices, targets, drawn)
        loss, losses = lane.learn(inputs, soft, targets)
        self.total.add_(loss.double() * self.size)
        if losses is not None:
            self.losses.index_copy_(0, row, losses[None].float())
        self.row.add_(1)

    def fill(self, indices: Tensor, rates: Sequence[Sequence[float]]) -> None:
        """Draw what comes, and copy it to where the next steps look for it."""
        lane, steps = self.lane, len(indices)
        drawn = lane.augment.plan(steps, self.size, _size(lane), lane.generator, lane.progress)
        into(self.indices, indices)
        into(self.rates, torch.tensor(rates))
        for name, rows in drawn.items():
            into(self.drawn[name], rows)
        self.row.zero_()

    def noted(self, chunk: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Indices and losses of the chunk just launched, for a sampler that asks for them."""
        if not self.lane.samplers[self.lane.stage].needs_losses:
            return []
        return [(torch.cat(list(chunk)), self.losses[: len(chunk)].flatten().clone())]


def into(rows: Tensor, values: Tensor) -> None:
    """Copy values into the first rows, without waiting."""
    given = values.pin_memory() if rows.is_cuda else values
    rows[: len(values)].copy_(given, non_blocking=True)


@contextmanager
def _as_before(lane: Lane, total: Tensor) -> Iterator[None]:
    """Undo what happens to the lane inside the block.

    What the optimizer sets up inside is set to zero, as torch's own start.
    """
    kept = [(tensor, tensor.detach().clone()) for tensor in _tensors(lane, total)]
    known = {tensor.data_ptr() for tensor in _of_optimizer(lane)}
    loss = dict(vars(lane.loss))
    try:
        yield
    finally:
        vars(lane.loss).clear()
        vars(lane.loss).update(loss)
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)
            for tensor in _of_optimizer(lane):
                if tensor.data_ptr() not in known:
                    tensor.zero_()


def _tensors(lane: Lane, total: Tensor) -> Iterator[Tensor]:
    yield from lane.model.state_dict().values()
    yield from lane.loss.state_dict().values()
    yield from _of_optimizer(lane)
    yield total


def _of_optimizer(lane: Lane) -> Iterator[Tensor]:
    states: Mapping[Any, Mapping[str, Any]] = lane.optimizer.state
    for state in states.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))
