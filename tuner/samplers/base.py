"""The sampler every component builds: draws a class, then an image from the ring of the class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from tuner.checkpoint import CheckpointError
from tuner.errors import DataError
from tuner.imbalance import Groups, class_counts
from tuner.registry import Registry
from tuner.samplers.rings import Rings, draw, unseen_share
from tuner.seeding import derive_seed, generator

EpochLength = Literal["natural", "keep_head"]


class ClassSampler(Sampler[int]):
    """Draws image indices, in epochs or in passes; the same seed gives the same ones everywhere.

    An epoch has as many images as there are, so that equal epochs are equal budgets of
    optimizer steps; a pass is as long as the component says (``num_draws``).

    Classes are drawn with replacement by their probabilities, the images of a class without
    replacement from its ring, which runs on across epochs and passes. Every rank plans the same
    and takes every ``world_size``-th index of it, so shards may differ in length by one.

    ``epoch(progress)`` is for the trainer. As an ordinary ``Sampler`` in a ``DataLoader``
    each iteration is a pass at ``set_progress(...)``, by default 1.0: whoever never sets
    it samples as at the end of training, without deferral.
    """

    needs_losses: ClassVar[bool] = False

    def __init__(
        self,
        component: SamplerComponent,
        targets: Tensor,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        groups: Groups | None = None,
        num_classes: int = 0,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not below world_size {world_size}")
        if targets.numel() == 0:
            raise DataError("sampler: the training part has no samples")
        self.component, self.groups = component, groups
        known = max(num_classes, _num_grouped(groups), int(targets.max()) + 1)
        self.class_counts = class_counts(targets, known)
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self._counts = self.class_counts.numpy()
        self._images = int(self._counts.sum())
        self._order = np.argsort(targets.cpu().numpy(), kind="stable")
        self._start = np.cumsum(self._counts) - self._counts
        self._drawn = np.zeros_like(self._counts)
        self._epoch = 0
        self._progress = 1.0
        self.class_probabilities(1.0)

    def class_probabilities(self, progress: float) -> Tensor:
        """Probability of each class at ``progress``, (C,) float64."""
        return self.component.probabilities(self.class_counts, progress, self.groups)

    def num_draws(self, progress: float) -> int:
        """Images drawn in a pass at ``progress``, over all ranks."""
        return self.component.num_draws(self.class_counts, progress, self.groups)

    def epoch(self, progress: float) -> Tensor:
        """Image indices (this rank's share of the next epoch), int64; moves on by one epoch."""
        return self._share(self._drawn_plan(progress, self._images))

    def one_pass(self, progress: float) -> Tensor:
        """Image indices (this rank's share) of a pass, int64; moves on as an epoch does."""
        return self._share(self._drawn_plan(progress, self.num_draws(progress)))

    def _share(self, plan: Tensor) -> Tensor:
        return plan[self.rank :: self.world_size].contiguous()

    def _drawn_plan(self, progress: float, draws: int) -> Tensor:
        if self.component.is_natural(progress):
            shuffle = generator(self.seed, "natural", self._epoch)
            plan = torch.randperm(self._images, generator=shuffle)
        else:
            plan = self._class_plan(progress, draws)
        self._epoch += 1
        return plan

    def _class_plan(self, progress: float, draws: int) -> Tensor:
        classes = torch.multinomial(
            self.class_probabilities(progress),
            draws,
            replacement=True,
            generator=generator(self.seed, "classes", self._epoch),
        ).numpy()
        plan = draw(self._rings(progress), classes)
        self._drawn += np.bincount(classes, minlength=len(self._counts))
        return torch.from_numpy(plan)

    def _rings(self, progress: float) -> Rings:
        key = derive_seed(self.seed, "rings")
        return Rings(self._order, self._start, self._counts, self._drawn, key)

    def observe(self, indices: Tensor, losses: Tensor) -> None:
        """Take note of per-sample training losses (N,); only if ``needs_losses``."""

    def set_progress(self, progress: float) -> None:
        """Share of training done, in [0, 1], that the next iterations are drawn for."""
        self._progress = progress

    def __iter__(self) -> Iterator[int]:
        yield from self.one_pass(self._progress).tolist()

    def __len__(self) -> int:
        return len(range(self.rank, self.num_draws(self._progress), self.world_size))

    def state_dict(self) -> dict[str, Tensor]:
        """Number of epochs and draws of each class: all that the continuation depends on."""
        return {
            "epoch": torch.tensor(self._epoch),
            "drawn": torch.from_numpy(self._drawn.copy()),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue bit for bit where ``state`` was taken, given the same data and seed.

        Raises:
            CheckpointError: The state is of another sampler or of other data.
        """
        for name, own in self.state_dict().items():
            if name not in state or state[name].shape != own.shape:
                raise CheckpointError(
                    f"sampler state: {name!r} is missing or of another shape than "
                    f"{tuple(own.shape)}; it was saved for another sampler or other data"
                )
        self._epoch = int(state["epoch"])
        self._drawn = state["drawn"].cpu().numpy().copy()

    def expected_repeats(self, progress: float) -> Tensor:
        """How often an image of each class is drawn per epoch on average, (C,) float64."""
        if self.component.is_natural(progress):
            return (self.class_counts > 0).to(torch.float64)
        draws = self.class_probabilities(progress) * self._images
        return draws / self.class_counts.clamp(min=1)

    def unseen_share(self, progress: float) -> Tensor:
        """Expected share of the images of each class that an epoch misses, (C,) float64."""
        if self.component.is_natural(progress):
            return torch.zeros(len(self.class_counts), dtype=torch.float64)
        return torch.from_numpy(unseen_share(self.expected_repeats(progress).numpy()))

    def describe(self) -> str:
        """One sentence on how often images repeat, at the progress that was set."""
        if self.component.is_natural(self._progress):
            return "every image is drawn once per epoch"
        head, head_name, tail, tail_name = self._ends()
        repeats = self._mean(self.expected_repeats(self._progress), tail)
        unseen = self._mean(self.unseen_share(self._progress), head)
        return (
            f"{tail_name} are drawn {repeats:.1f} times per epoch; "
            f"{100 * unseen:.0f} % of {head_name} are not seen in an epoch"
        )

    def _ends(self) -> tuple[Sequence[int], str, Sequence[int], str]:
        groups = self.groups
        if groups and all(self._counts[list(g)].sum() for g in (groups.head, groups.tail)):
            return groups.head, "head images", groups.tail, "tail images"
        largest = int(self._counts.argmax())
        smallest = int(np.where(self._counts > 0, self._counts, self._counts.max()).argmin())
        return (
            [largest],
            "the images of the largest class",
            [smallest],
            "the images of the smallest class",
        )

    def _mean(self, per_class: Tensor, classes: Sequence[int]) -> float:
        """Mean over the images of ``classes`` of a value per class."""
        chosen = list(classes)
        counts = self.class_counts[chosen].to(torch.float64)
        return float((per_class[chosen] * counts).sum() / counts.sum())


def _num_grouped(groups: Groups | None) -> int:
    named = groups.named().values() if groups else ()
    return 1 + max((c for group in named for c in group), default=-1)


class SamplerComponent(ABC):
    """Hyperparameters of a sampler; says how likely each class is at which progress."""

    sampler_class: ClassVar[type[ClassSampler]] = ClassSampler

    @abstractmethod
    def probabilities(
        self, class_counts: Tensor, progress: float, groups: Groups | None = None
    ) -> Tensor:
        """Probability of each class, (C,) float64; 0 for a class without samples."""

    def is_natural(self, progress: float) -> bool:
        """Whether a pass at ``progress`` shows every image exactly once."""
        return False

    def num_draws(self, class_counts: Tensor, progress: float, groups: Groups | None = None) -> int:
        """Images drawn in a pass at ``progress``, over all ranks; at least 1."""
        return int(class_counts.sum())

    def exponent_share(self, class_counts: Tensor, groups: Groups | None = None) -> float:
        """Share s of the total correction κ at the end of training, p_c ∝ n_c^(1-s).

        What follows no power of the counts is given its least-squares slope.
        """
        present = class_counts > 0
        counts = class_counts[present].to(torch.float64).log()
        p = self.probabilities(class_counts, 1.0, groups)[present].log()
        centred = counts - counts.mean()
        spread = (centred**2).sum()
        return 1 - float((centred * p).sum() / spread) if spread > 0 else 0.0

    def canonical(self) -> SamplerComponent:
        """The simplest component that samples alike."""
        return self

    def build(
        self,
        targets: Tensor,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        groups: Groups | None = None,
        num_classes: int = 0,
    ) -> ClassSampler:
        """Sampler over the training images with class indices ``targets`` (N,).

        ``num_classes`` is needed only if the last classes have neither samples nor a group.

        Raises:
            DataError: No samples, or the component needs ``groups`` with a tail.
        """
        return self.sampler_class(
            self,
            targets,
            seed=seed,
            rank=rank,
            world_size=world_size,
            groups=groups,
            num_classes=num_classes,
        )


SAMPLERS: Registry[SamplerComponent] = Registry("sampler")
