"""Every lane on batches of its own: its sampler plans them, and a finished lane is refilled."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tuner.heads._adaptive import GRADIENTS
from tuner.heads._gradients import Batch, Gradient, Table
from tuner.heads._plans import Plan, own_planner
from tuner.heads._rows import Kind, Row, bare_row, row_of
from tuner.heads._stack import Stack
from tuner.heads._work import HeadResult, Material, Order, Stop
from tuner.models import Head


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
    bench = _Bench(
        [waiting.popleft() for _ in range(min(lanes, len(waiting)))], material, head, kind
    )
    while bench.lanes:
        if not bench.train(stop):
            return
        ended = bench.end_epochs()
        yield from bench.results(ended)
        bench.replace(ended, waiting)


class _Lane:
    """A recipe on its way: how far it has come, and the plan of its epoch."""

    def __init__(self, order: Order, material: Material) -> None:
        self.order, self.material = order, material
        self.planner = own_planner(
            order.recipe,
            material.data,
            material.targets,
            copies=material.copies,
            batch_size=material.settings.batch_size,
        )
        self.sampler = self.planner.sampler
        self.epoch = self.steps = 0
        self.noted: list[tuple[Tensor, Tensor]] = []
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Draw the epoch's plan, and switch on what is deferred until now."""
        progress = self.epoch / self.material.settings.epochs
        self.order.loss.advance(progress)
        self.plan: Plan = self.planner.plan(self.epoch, progress)
        self.step = 0
        self.total = 0.0

    def end_epoch(self) -> None:
        """Count the epoch, and hand its losses to a sampler that asks for them."""
        self.epoch += 1
        if self.noted:
            indices, losses = zip(*self.noted, strict=True)
            self.sampler.observe(torch.cat(indices), torch.cat(losses))
            self.noted.clear()

    @property
    def left(self) -> int:
        """Steps that are left of the epoch."""
        return len(self.plan) - self.step

    @property
    def is_done(self) -> bool:
        """Whether all epochs are trained."""
        return self.epoch == self.material.settings.epochs

    @property
    def train_loss(self) -> float:
        """Mean loss over the epoch's samples."""
        return self.total / int(self.plan.sizes.sum())

    def rate(self, step: int) -> float:
        """Learning rate so many steps from now."""
        share = (self.step + step) / len(self.plan)
        settings = self.material.settings
        return settings.rate((self.epoch + share) / settings.epochs)

    def row(self) -> Row:
        """The row of the loss as it acts now; that of bare logits if it has none."""
        return row_of(self.order.loss) or bare_row(self.order.loss)


class _Bench:
    """The lanes at work, and their stack."""

    def __init__(
        self, orders: Sequence[Order], material: Material, head: Head, kind: Kind | None
    ) -> None:
        self.material, self.head = material, head
        self.validation = material.validation(head)
        size = (len(orders), material.classes, material.width)
        self.stack = Stack(*size, features=material.features_wide, head=head, dtype=material.dtype)
        self.gradient: Gradient = (
            partial(self._through_modules) if kind is None else GRADIENTS[kind]
        )
        self.lanes: list[_Lane] = []
        for order in orders:
            self.lanes.append(_Lane(order, material))
            self._seat(len(self.lanes) - 1)
        self.stack.table.note()

    def _seat(self, lane: int) -> None:
        order = self.lanes[lane].order
        order.admit(self.stack, lane)
        self.stack.table.set(lane, self.lanes[lane].row())

    def train(self, stop: Stop) -> bool:
        """Steps until a lane's epoch ends; False if ``stop`` said so before."""
        chunk = min(lane.left for lane in self.lanes)
        slices = [slice(lane.step, lane.step + chunk) for lane in self.lanes]
        pairs = list(zip(self.lanes, slices, strict=True))
        self.places = torch.stack([lane.plan.places[part] for lane, part in pairs], 1)
        self.targets = torch.stack([lane.plan.targets[part] for lane, part in pairs], 1)
        self.sizes = torch.stack([lane.plan.sizes[part] for lane, part in pairs], 1)
        rates = [[lane.rate(step) for lane in self.lanes] for step in range(chunk)]
        self.rates = torch.tensor(rates, dtype=self.material.dtype)
        for step in range(chunk):
            self._step(step)
            if stop():
                return False
        return True

    def _step(self, step: int) -> None:
        material, sizes = self.material, self.sizes[step]
        inputs = material.inputs(self.places[step], self.head)
        real = torch.arange(inputs.shape[1]) < sizes[:, None]
        weight = (real.to(material.dtype) / sizes[:, None])[:, None]
        targets = self.targets[step]
        steps = torch.tensor([lane.steps for lane in self.lanes])
        batch = Batch(targets, material.hits(targets), weight, sizes[:, None], steps)
        logits = self.stack.logits(inputs)
        self._note(inputs)
        gradient, losses = self.gradient(logits, batch, self.stack.table, True)
        assert losses is not None
        self.stack.step(inputs, gradient, self.rates[step][:, None, None])
        sums = (losses.double().sum((1, 2)) * sizes).tolist()
        for lane, total in zip(self.lanes, sums, strict=True):
            lane.total += total
            lane.step += 1
            lane.steps += 1

    def _note(self, inputs: Tensor) -> None:
        """Cross-entropy of the bare outputs, for samplers that ask for it."""
        for k, lane in enumerate(self.lanes):
            if lane.sampler.needs_losses:
                size = int(lane.plan.sizes[lane.step])
                outputs = inputs[k, :size] @ self.stack.acting[k].t() + self.stack.bias[k].t()
                targets = lane.plan.targets[lane.step, :size]
                losses = cross_entropy(outputs, targets, reduction="none")
                lane.noted.append((lane.plan.images[lane.step, :size], losses))

    def _through_modules(
        self, u: Tensor, batch: Batch, table: Table, value: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Autograd through each lane's own loss."""
        gradient = torch.zeros_like(u)
        losses = torch.zeros(len(u), 1, 1, dtype=u.dtype)
        for k, lane in enumerate(self.lanes):
            size = int(lane.plan.sizes[lane.step])
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
        for k, lane in enumerate(self.lanes):
            if lane.left > 0:
                continue
            lane.end_epoch()
            finite = bool(self.stack.weight[k].isfinite().all())
            if lane.is_done or not finite:
                ended.append(k)
                continue
            lane.begin_epoch()
            self.stack.table.set(k, lane.row())
        self.stack.table.note()
        return ended

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
                self.lanes[k] = _Lane(waiting.popleft(), self.material)
                self._seat(k)
            else:
                empty.append(k)
        if empty:
            rest = [k for k in range(len(self.lanes)) if k not in empty]
            self.lanes = [self.lanes[k] for k in rest]
            self.stack.keep(rest)
        self.stack.table.note()
