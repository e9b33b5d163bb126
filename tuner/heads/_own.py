"""Every lane on batches of its own: its sampler plans them, and a finished lane is refilled."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tuner.heads._device import filled, seats
from tuner.heads._lane import Lane, chunk_of
from tuner.heads._work import HeadResult, Material, Order, Stop
from tuner.models import Head
from tuner.placing import placed
from tuner.rows import GRADIENTS, Batch, Gradient, Kind, Table


def train_own(
    orders: Sequence[Order],
    material: Material,
    *,
    head: Head,
    kind: Kind | None,
    lanes: int,
    stop: Stop,
) -> Iterator[tuple[int, HeadResult]]:
    """Train recipes of one kind of loss; whatever has no row goes through its own module.

    Lanes are as old as they are: one that is done or has diverged is overwritten in place by
    the next recipe when its epoch ends, and left out when there is none.
    """
    waiting = deque(orders)
    first = [waiting.popleft() for _ in range(min(lanes, len(waiting)))]
    bench = _Bench(first, material, head, kind, lanes)
    while bench.lanes:
        if not bench.train(stop):
            return
        ended = bench.end_epochs()
        yield from bench.results(ended)
        bench.replace(ended, waiting)


class _Bench:
    """The lanes at work, and their stack."""

    def __init__(
        self,
        orders: Sequence[Order],
        material: Material,
        head: Head,
        kind: Kind | None,
        lanes: int,
    ) -> None:
        self.material, self.head, self.kind = material, head, kind
        self.validation = material.validation(head)
        self.stack = material.stack(len(orders), lanes, head)
        self.gradient: Gradient = (
            partial(self._through_modules) if kind is None else GRADIENTS[kind]
        )
        self.lanes = [Lane(order, material) for order in orders]
        for k, lane in enumerate(filled(self.lanes, len(self.stack))):
            self._seat(k, lane)
        self.stack.table.note()

    def _seat(self, k: int, lane: Lane) -> None:
        if self.kind is None:
            lane.order.loss.to(self.material.device)
        lane.order.admit(self.stack, k)
        self.stack.table.set(k, lane.row())

    def train(self, stop: Stop) -> bool:
        """Steps until a lane's epoch ends, or many of them; False if ``stop`` said so before."""
        material, lanes = self.material, filled(self.lanes, len(self.stack))
        decays = self.kind == "adaptive"
        chunk = chunk_of(lanes, material, self.stack.table, decays=decays)
        totals = torch.tensor([lane.total for lane in lanes], dtype=torch.float64)
        self.totals = placed(totals, material.device)
        steps = material.steps(chunk.places, chunk.targets, self.head)
        for step, (inputs, hit) in enumerate(steps):
            self._step(inputs, chunk.batch(step, hit), chunk.rates[step])
            if stop():
                return False
        for lane, total in zip(self.lanes, self.totals.tolist(), strict=False):
            lane.total = total
        return True

    def _step(self, inputs: Tensor, batch: Batch, rates: Tensor) -> None:
        logits = self.stack.logits(inputs)
        self._note(inputs, batch.targets)
        gradient, losses = self.gradient(logits, batch, self.stack.table, True)
        assert losses is not None
        self.stack.step(inputs, gradient, rates[:, None, None])
        self.totals += losses.double().sum((1, 2)) * batch.sizes[:, 0]
        for lane in self.lanes:
            lane.step += 1
            lane.steps += 1

    def _note(self, inputs: Tensor, targets: Tensor) -> None:
        """Cross-entropy of the bare outputs, for samplers that ask for it."""
        for k, lane in enumerate(self.lanes):
            if lane.sampler.needs_losses:
                size = lane.size
                outputs = inputs[k, :size] @ self.stack.acting[k].t() + self.stack.bias[k].t()
                losses = cross_entropy(outputs, targets[k, :size], reduction="none")
                lane.noted.append((lane.plan.images[lane.step, :size], losses))

    def _through_modules(
        self, u: Tensor, batch: Batch, table: Table, value: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Autograd through each lane's own loss."""
        gradient = torch.zeros_like(u)
        losses = u.new_zeros(len(u), 1, 1)
        for k, lane in enumerate(self.lanes):
            size = lane.size
            with torch.enable_grad():
                logits = u[k, :, :size].t().contiguous().requires_grad_()
                loss = lane.order.loss(logits, batch.targets[k, :size])
                (found,) = torch.autograd.grad(loss, logits)
            gradient[k, :, :size] = found.t()
            losses[k] = loss.detach()
        return gradient, losses

    def end_epochs(self) -> list[int]:
        """Begin the next epoch of the lanes at an end; those that are done or diverged."""
        ended = []
        through = [k for k, lane in enumerate(self.lanes) if lane.left == 0]
        for k, finite in zip(through, self._finite(through), strict=True):
            lane = self.lanes[k]
            lane.end_epoch()
            if lane.is_done or not finite:
                ended.append(k)
                continue
            lane.begin_epoch()
            self.stack.table.set(k, lane.row())
        self.stack.table.note()
        return ended

    def _finite(self, lanes: Sequence[int]) -> list[bool]:
        """Whether all weights of each lane are finite; all are asked at once."""
        each = [self.stack.weight[k].isfinite().all() for k in lanes]
        found: list[bool] = torch.stack(each).tolist() if each else []
        return found

    def results(self, ended: Sequence[int]) -> Iterator[tuple[int, HeadResult]]:
        """What the ended lanes gave."""
        for k in ended:
            lane = self.lanes[k]
            found = self.material.result(
                self.stack, k, lane.order, self.validation, lane.train_loss
            )
            yield lane.order.index, found

    def replace(self, ended: Sequence[int], waiting: deque[Order]) -> None:
        """Overwrite ended lanes by waiting recipes; leave out those that are left."""
        empty = []
        for k in ended:
            if waiting:
                self.lanes[k] = Lane(waiting.popleft(), self.material)
                self._seat(k, self.lanes[k])
            else:
                empty.append(k)
        if empty:
            rest = [k for k in range(len(self.lanes)) if k not in empty]
            self.lanes = [self.lanes[k] for k in rest]
            if rest:
                number = seats(len(rest), len(self.stack), self.material.device)
                self.stack.keep(filled(rest, number))
        self.stack.table.note()
