"""Curriculum sampling: from easy and class-balanced to every image, naturally."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from tuner.imbalance import Groups, class_priors
from tuner.registry import component
from tuner.samplers.base import SAMPLERS, ClassSampler, SamplerComponent
from tuner.samplers.classwise import balanced
from tuner.samplers.rings import Rings
from tuner.seeding import derive_seed, generator


class CurriculumSampler(ClassSampler):
    """Draws from the easiest images of each class by their latest training loss.

    An image without a loss yet counts as easier than all others, in a seeded order: the
    early epochs so try every image before the ranking decides. Rings begin anew in every
    epoch, because the offer changes: it is drawn with the losses of all epochs before.
    """

    needs_losses: ClassVar[bool] = True
    component: Curriculum

    def __init__(
        self, component: Curriculum, targets: Tensor, *, seed: int, **options: Any
    ) -> None:
        super().__init__(component, targets, seed=seed, **options)
        self._targets = targets.cpu().numpy()
        self._ties = torch.randperm(len(targets), generator=generator(seed, "ties")).numpy()
        self._losses = np.full(len(targets), -np.inf, dtype=np.float32)

    def observe(self, indices: Tensor, losses: Tensor) -> None:
        """Take note of per-sample losses (n,) of the images ``indices`` (n,).

        Of an image given twice the last loss counts. Copies to the CPU: best called once per
        epoch. With several ranks each must be given the losses of all.
        """
        values = losses.detach().to("cpu", torch.float32).numpy()
        self._losses[indices.cpu().numpy()] = values

    def _rings(self, progress: float) -> Rings:
        order = np.lexsort((self._ties, self._losses, self._targets))
        sizes = self.component.pool_sizes(self.class_counts, progress).numpy()
        key = derive_seed(self.seed, "pools", self._epoch)
        return Rings(order, self._start, sizes, np.zeros_like(self._drawn), key)

    def unseen_share(self, progress: float) -> Tensor:
        """Expected share of the images of each class that an epoch misses, (C,) float64."""
        offered = self.component.pool_sizes(self.class_counts, progress)
        shown = self.expected_repeats(progress).minimum(offered / self.class_counts.clamp(min=1))
        return torch.where(self.class_counts > 0, 1 - shown, 0.0)

    def state_dict(self) -> dict[str, Tensor]:
        """Number of epochs, draws of each class, and the latest loss of each image."""
        return super().state_dict() | {"losses": torch.from_numpy(self._losses.copy())}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue bit for bit where ``state`` was taken, given the same data and seed.

        Raises:
            CheckpointError: The state is of another sampler or of other data.
        """
        super().load_state_dict(state)
        self._losses = state["losses"].cpu().numpy().copy()


@SAMPLERS.register("curriculum")
@component
class Curriculum(SamplerComponent):
    """Class-balanced from the easiest images of every class, growing to the full natural set.

    At the beginning each class offers its easiest ``easy_fraction`` of images; offer and
    class probabilities grow linearly to the natural set at ``until`` (share of training).
    """

    sampler_class: ClassVar[type[ClassSampler]] = CurriculumSampler

    until: Annotated[float, Field(gt=0, le=1)] = 0.5
    easy_fraction: Annotated[float, Field(gt=0, le=1)] = 0.3

    def probabilities(
        self, class_counts: Tensor, progress: float, groups: Groups | None = None
    ) -> Tensor:
        """(1 - u)·balanced + u·natural with u = progress / until."""
        u = self.growth(progress)
        return (1 - u) * balanced(class_counts) + u * class_priors(class_counts)

    def is_natural(self, progress: float) -> bool:
        """From ``until`` on."""
        return progress >= self.until

    def growth(self, progress: float) -> float:
        """How far the curriculum has come, 0 to 1."""
        return min(1.0, progress / self.until)

    def pool_sizes(self, class_counts: Tensor, progress: float) -> Tensor:
        """Number of images each class offers at ``progress``, (C,) int64; at least 1 if any."""
        share = self.easy_fraction + (1 - self.easy_fraction) * self.growth(progress)
        return torch.ceil(class_counts.to(torch.float64) * share - 1e-9).long()

    def exponent_share(self, class_counts: Tensor, groups: Groups | None = None) -> float:
        """None at the end."""
        return 0.0
