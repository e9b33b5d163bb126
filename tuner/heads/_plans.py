"""Which samples the steps of an epoch see: one plan for all lanes, or a lane's own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from tuner.datasets import Data
from tuner.imbalance import Groups, class_priors
from tuner.recipe import Recipe
from tuner.rows import lines
from tuner.samplers import ClassSampler, SamplerComponent
from tuner.seeding import derive_seed, generator


@dataclass(frozen=True)
class Mixture(SamplerComponent):
    """Half natural, half class-balanced: near every sampler that a recipe may ask for.

    A sampler with probabilities p is this one with samples weighted by p / q. For natural and
    class-balanced sampling and all between them no weight is above 2, so that the gradient
    keeps its mean and hardly more noise than own draws would give it.
    """

    def probabilities(
        self, class_counts: Tensor, progress: float, groups: Groups | None = None
    ) -> Tensor:
        """q = (natural + balanced) / 2."""
        present = (class_counts > 0).to(torch.float64)
        return (class_priors(class_counts) + present / present.sum()) / 2

    def ratio(self, probabilities: Tensor, class_counts: Tensor) -> Tensor:
        """p / q of each class, (C,) float64; 0 where there is nothing to draw."""
        own = self.probabilities(class_counts, 0.0)
        return torch.where(own > 0, probabilities / own.clamp(min=1e-300), 0.0)


MIXTURE = Mixture()


def sampler_of(recipe: Recipe) -> SamplerComponent:
    """The sampler that a recipe's classifier is trained with, in the end."""
    sampler: SamplerComponent = recipe.training.samplers(recipe.sampler)[-1]
    return sampler


def is_by_class(sampler: SamplerComponent) -> bool:
    """Whether the classes' probabilities say all: within a class, draws are uniform."""
    return sampler.sampler_class is ClassSampler


@dataclass(frozen=True, eq=False)
class Plan:
    """Samples of an epoch's steps: places in the features (S, B), classes (S, B).

    ``images`` are the places without the copy; ``sizes`` (S,) says how many samples of each
    step are real, the rest fill up: B is in whole ``lines``.
    """

    places: Tensor
    images: Tensor
    targets: Tensor
    sizes: Tensor

    def __len__(self) -> int:
        return len(self.places)


class Planner:
    """Draws the plans of a sampler from generators of its own, epoch by epoch."""

    def __init__(
        self, sampler: ClassSampler, targets: Tensor, *, copies: int, batch_size: int, seed: int
    ) -> None:
        self.sampler, self.targets = sampler, targets
        self.copies, self.batch_size, self.seed = copies, batch_size, seed

    def plan(self, epoch: int, progress: float) -> Plan:
        """The plan of the next epoch; a last batch that is not full is filled up."""
        images = self.sampler.epoch(progress)
        steps = -(-len(images) // self.batch_size)
        sizes = torch.full((steps,), self.batch_size)
        sizes[-1] = len(images) - (steps - 1) * self.batch_size
        filled = torch.zeros(steps * self.batch_size, dtype=torch.int64)
        filled[: len(images)] = images
        return self._plan(filled.view(steps, -1), sizes, epoch)

    def whole(self, epoch: int, progress: float) -> Plan:
        """The same in full batches only; fewer samples than a batch are shown again."""
        images = self.sampler.epoch(progress)
        steps = max(1, len(images) // self.batch_size)
        images = images.repeat(-(-self.batch_size // len(images)))[: steps * self.batch_size]
        sizes = torch.full((steps,), self.batch_size)
        return self._plan(images.view(steps, -1), sizes, epoch)

    def _plan(self, images: Tensor, sizes: Tensor, epoch: int) -> Plan:
        images = pad(images, (0, lines(self.batch_size) - self.batch_size))
        draws = generator(self.seed, "copies", epoch)
        copy = torch.randint(self.copies, images.shape, generator=draws)
        targets = self.targets[images]
        return Plan(copy * len(self.targets) + images, images, targets, sizes)


def shared_planner(
    data: Data, targets: Tensor, *, copies: int, batch_size: int, seed: int
) -> Planner:
    """Plans of the mixture, for all lanes with this seed."""
    sampler = MIXTURE.build(targets, seed=derive_seed(seed, "shared"), num_classes=data.num_classes)
    return Planner(sampler, targets, copies=copies, batch_size=batch_size, seed=seed)


def own_planner(
    recipe: Recipe, data: Data, targets: Tensor, *, copies: int, batch_size: int
) -> Planner:
    """Plans of the recipe's own sampler."""
    sampler = sampler_of(recipe).build(
        targets, seed=derive_seed(recipe.seed, "sampler"), groups=data.groups,
        num_classes=data.num_classes,
    )  # fmt: skip
    return Planner(sampler, targets, copies=copies, batch_size=batch_size, seed=recipe.seed)
