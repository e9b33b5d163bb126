"""An exported recipe inside somebody else's training loop: its loss, sampler and adjustment."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tuner.errors import DataError, StudyFileError, shown
from tuner.imbalance import class_counts as count_classes
from tuner.imbalance import log_priors
from tuner.losses import Loss
from tuner.posthoc import adjust_logits
from tuner.recipe import Recipe, read_toml
from tuner.registry import checked, component
from tuner.samplers import ClassSampler


@component
class Result:
    """The table [result] of a recipe file; see ``LoadedRecipe``."""

    tau: float = 0.0
    class_counts: tuple[Annotated[int, Field(ge=0)], ...] = ()
    class_names: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _as_long(self) -> Self:
        counts, names = len(self.class_counts), len(self.class_names)
        if counts and names and counts != names:
            raise ValueError(f"class_counts has {counts} classes, class_names {names}")
        return self


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe file: what to train with, and the post-hoc adjustment found for it.

    Attributes:
        recipe: The parts, epochs and seed.
        tau: Strength of the logit adjustment; 0 for none.
        class_counts: Training images of each class (C,) it was found with.
        class_names: Names of the classes, in the order of the logits.
        mean: Mean of each channel it was trained with, for images in 0..1.
        std: Standard deviation of each channel, likewise.
        provenance: Where the recipe comes from: study, trial, versions, data fingerprint.
    """

    recipe: Recipe
    tau: float
    class_counts: Tensor
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    provenance: Mapping[str, Any]

    def loss(self, class_counts: Tensor | Sequence[int]) -> Loss:
        """The recipe's loss for your class counts (C,): a module ``(logits, targets)``.

        Deferred weights act once you call ``loss.advance(progress)`` with the share of your
        training that is done, at the start of each epoch. Of a deferred recipe it is the loss
        from the switch on; before that it trains with ``recipe.loss.plain()``.
        """
        loss: Loss = self.recipe.loss.build(torch.as_tensor(class_counts))
        return loss.follow(self.recipe.seed)

    def sampler(
        self, targets: Tensor | Sequence[int], *, rank: int = 0, world_size: int = 1
    ) -> ClassSampler:
        """The recipe's sampler for your training targets (N,), for ``DataLoader(sampler=...)``.

        Tail classes are found in your counts by the recipe's own rule. Of a two-stage or deferred
        recipe it is the sampler of the second stage. It draws as at the end of training; a deferred
        one follows yours if you call ``sampler.set_progress(progress)`` before each epoch.
        Each iteration is a pass; with ``epoch_length = "keep_head"`` that is not a trial's epoch.
        """
        targets = torch.as_tensor(targets)
        counts = count_classes(targets, int(targets.max()) + 1)
        known = len(self.class_names) >= len(counts)
        names = self.class_names if known else [str(c) for c in range(len(counts))]
        component = self.recipe.training.samplers(self.recipe.sampler)[-1]
        return component.build(  # type: ignore[no-any-return]
            targets,
            seed=self.recipe.seed,
            rank=rank,
            world_size=world_size,
            groups=self.recipe.data.tail.groups(counts, names),
        )

    def adjust(self, logits: Tensor, class_counts: Tensor | Sequence[int] | None = None) -> Tensor:
        """Logits (N, C) after the recipe's adjustment, logits - τ·log prior.

        The priors are those of your ``class_counts``, by default those of the study's data.
        The output of a cosine head is scaled first, as the recipe's loss does.

        Raises:
            DataError: The counts are of another number of classes than the logits.
        """
        counts = self.class_counts if class_counts is None else torch.as_tensor(class_counts)
        logits = logits * self.recipe.loss.output_scale()
        if self.tau == 0:
            return logits
        if len(counts) != logits.shape[-1]:
            whose = "the recipe's" if class_counts is None else "your"
            raise DataError(
                f"the logits are of {logits.shape[-1]} classes, {whose} class_counts of "
                f"{len(counts)}; give the counts of your training data"
            )
        return adjust_logits(logits, log_priors(counts).to(logits), self.tau)


def load_recipe(path: str | os.PathLike[str]) -> LoadedRecipe:
    """Read a recipe file that ``tuner export`` wrote, or one written by hand.

    Raises:
        StudyFileError: The file is missing or does not validate; the key is named.
    """
    values = read_toml(Path(path))
    result = checked(Result, values.pop("result", {}), f"{path}: result")
    provenance = values.pop("provenance", {})
    if not isinstance(provenance, Mapping):
        raise StudyFileError(f"{path}: provenance = {shown(provenance)}: must be a table")
    return LoadedRecipe(
        recipe=Recipe.from_dict(values, where=str(path)),
        tau=result.tau,
        class_counts=torch.tensor(result.class_counts, dtype=torch.int64),
        class_names=result.class_names,
        mean=result.mean,
        std=result.std,
        provenance=provenance,
    )
