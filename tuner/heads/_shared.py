"""All lanes on the same batches: one gather for all, the sampler as weights of the samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tuner.heads._device import filled
from tuner.heads._plans import MIXTURE, Plan, sampler_of, shared_planner
from tuner.heads._work import HeadResult, Material, Order, Stop
from tuner.models import Head
from tuner.placing import placed
from tuner.rows import GRADIENTS, Batch, Kind, lines, row_of


def train_shared(
    orders: Sequence[Order],
    material: Material,
    *,
    head: Head,
    kind: Kind | None,
    lanes: int,
    stop: Stop,
) -> Iterator[tuple[int, HeadResult]]:
    """Train recipes of one seed and one kind of loss, ``lanes`` at a time.

    All begin and end together, because lanes of different ages could not share batches.
    """
    assert kind is not None
    validation = material.validation(head)
    for first in range(0, len(orders), lanes):
        wave = _Wave(orders[first : first + lanes], material, head, kind, lanes)
        if not wave.train(stop):
            return
        losses = wave.losses.tolist()
        for lane, order in enumerate(wave.orders):
            yield order.index, material.result(wave.stack, lane, order, validation, losses[lane])


class _Wave:
    """Lanes that begin and end together."""

    def __init__(
        self, orders: Sequence[Order], material: Material, head: Head, kind: Kind, lanes: int
    ) -> None:
        self.orders, self.material, self.head, self.kind = orders, material, head, kind
        self.stack = material.stack(len(orders), lanes, head)
        self.seated = filled(orders, len(self.stack))
        for lane, order in enumerate(self.seated):
            order.admit(self.stack, lane)
        settings, device = material.settings, material.device
        size = settings.batch_size
        self.sizes = torch.tensor([[size]])
        self.sizes_there = placed(self.sizes, device)
        real = torch.arange(lines(size), device=device) < size
        self.real = real.to(material.dtype) / size
        self.losses = torch.zeros(len(self.stack), dtype=torch.float64, device=device)
        self.planner = shared_planner(
            material.data,
            material.targets,
            copies=material.copies,
            batch_size=size,
            seed=orders[0].recipe.seed,
        )

    def train(self, stop: Stop) -> bool:
        """Train to the end; False if ``stop`` said so before."""
        epochs, done = self.material.settings.epochs, 0
        for epoch in range(epochs):
            self._begin(epoch, epoch / epochs)
            plan = self.planner.whole(epoch, epoch / epochs)
            if not self._epoch(plan, epoch, done, stop):
                return False
            done += len(plan)
        self.losses /= len(plan)
        return True

    def _begin(self, epoch: int, progress: float) -> None:
        """Losses and samplers as they act from ``progress`` on."""
        data, table = self.material.data, self.stack.table
        ratios = torch.zeros(len(self.stack), self.material.classes, dtype=self.material.dtype)
        for lane, order in enumerate(self.seated):
            acted = order.loss.active
            order.loss.advance(progress)
            if epoch == 0 or acted != order.loss.active:
                row = row_of(order.loss)
                assert row is not None
                table.set(lane, row)
            sampler = sampler_of(order.recipe)
            own = sampler.probabilities(data.class_counts, progress, data.groups)
            ratios[lane] = MIXTURE.ratio(own, data.class_counts)
        self.ratios = placed(ratios, self.material.device)
        table.note()
        self.decay = None
        if self.kind == "adaptive":
            self.decay = placed(table.decay(self.sizes)[0], self.material.device)

    def _epoch(self, plan: Plan, epoch: int, done: int, stop: Stop) -> bool:
        material, settings = self.material, self.material.settings
        device, last = material.device, epoch == settings.epochs - 1
        places, targets = placed(torch.stack((plan.places, plan.targets)), device)
        progress = [(epoch + step / len(plan)) / settings.epochs for step in range(len(plan))]
        rates = torch.tensor([settings.rate(share) for share in progress], dtype=material.dtype)
        rates = placed(rates, device)
        steps = torch.arange(done, done + len(plan), device=device)
        for step, (inputs, hit) in enumerate(material.steps(places, targets, self.head)):
            batch = self._batch(targets[step], hit, steps[step, None])
            self._step(inputs[None], batch, rates[step], last)
            if stop():
                return False
        return True

    def _batch(self, targets: Tensor, hit: Tensor, steps: Tensor) -> Batch:
        weight = self.ratios.index_select(1, targets)[:, None] * self.real
        return Batch(targets, hit[None], weight, self.sizes_there, steps, self.decay)

    def _step(self, inputs: Tensor, batch: Batch, rate: Tensor, value: bool) -> None:
        logits = self.stack.logits(inputs)
        gradient, losses = GRADIENTS[self.kind](logits, batch, self.stack.table, value)
        self.stack.step(inputs, gradient, rate)
        if losses is not None:
            self.losses += losses.double().sum((1, 2))
