"""All lanes on the same batches: one gather for all, the sampler as weights of the samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from tuner.heads._adaptive import GRADIENTS
from tuner.heads._gradients import Batch
from tuner.heads._plans import MIXTURE, Plan, lines, sampler_of, shared_planner
from tuner.heads._rows import Kind, row_of
from tuner.heads._stack import Stack
from tuner.heads._work import HeadResult, Material, Order, Stop
from tuner.models import Head


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
        wave = _Wave(orders[first : first + lanes], material, head, kind)
        if not wave.train(stop):
            return
        for lane, order in enumerate(wave.orders):
            loss = float(wave.losses[lane])
            yield order.index, material.result(wave.stack, lane, order, validation, loss)


class _Wave:
    """Lanes that begin and end together."""

    def __init__(self, orders: Sequence[Order], material: Material, head: Head, kind: Kind) -> None:
        self.orders, self.material, self.head = orders, material, head
        self.gradient = GRADIENTS[kind]
        size = (len(orders), material.classes, material.width)
        self.stack = Stack(*size, features=material.features_wide, head=head, dtype=material.dtype)
        self.ratios = torch.zeros(*size[:2], dtype=material.dtype)
        size_of_batch = material.settings.batch_size
        self.sizes = torch.tensor([[size_of_batch]])
        self.real = (torch.arange(lines(size_of_batch)) < size_of_batch).to(material.dtype)
        self.real /= size_of_batch
        self.steps = 0
        self.losses = torch.zeros(len(orders), dtype=torch.float64)
        for lane, order in enumerate(orders):
            order.admit(self.stack, lane)
        self.planner = shared_planner(
            material.data,
            material.targets,
            copies=material.copies,
            batch_size=material.settings.batch_size,
            seed=orders[0].recipe.seed,
        )

    def train(self, stop: Stop) -> bool:
        """Train to the end; False if ``stop`` said so before."""
        epochs = self.material.settings.epochs
        for epoch in range(epochs):
            self._begin(epoch, epoch / epochs)
            plan = self.planner.whole(epoch, epoch / epochs)
            for step in range(len(plan)):
                self._step(plan, step, (epoch + step / len(plan)) / epochs, epoch == epochs - 1)
                if stop():
                    return False
        self.losses /= len(plan)
        return True

    def _begin(self, epoch: int, progress: float) -> None:
        """Losses and samplers as they act from ``progress`` on."""
        data = self.material.data
        for lane, order in enumerate(self.orders):
            acted = order.loss.active
            order.loss.advance(progress)
            if epoch == 0 or acted != order.loss.active:
                row = row_of(order.loss)
                assert row is not None
                self.stack.table.set(lane, row)
            sampler = sampler_of(order.recipe)
            own = sampler.probabilities(data.class_counts, progress, data.groups)
            self.ratios[lane] = MIXTURE.ratio(own, data.class_counts)
        self.stack.table.note()

    def _step(self, plan: Plan, step: int, progress: float, value: bool) -> None:
        material, settings = self.material, self.material.settings
        inputs = material.inputs(plan.places[step], self.head)[None]
        targets = plan.targets[step]
        weight = self.ratios.index_select(1, targets)[:, None] * self.real
        steps = torch.tensor([self.steps])
        self.steps += 1
        batch = Batch(targets, material.hits(targets)[None], weight, self.sizes, steps)
        logits = self.stack.logits(inputs)
        gradient, losses = self.gradient(logits, batch, self.stack.table, value)
        self.stack.step(inputs, gradient, torch.tensor(settings.rate(progress), dtype=inputs.dtype))
        if losses is not None:
            self.losses += losses.double().sum((1, 2))
