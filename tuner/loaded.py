"""An exported recipe inside somebody else's training loop: its loss, sampler and adjustment."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tuner.errors import StudyFileError
from tuner.imbalance import class_counts as count_classes
from tuner.imbalance import log_priors
from tuner.losses import Loss
from tuner.posthoc import adjust_logits
from tuner.recipe import Recipe, read_toml
from tuner.samplers import ClassSampler

EXTRA_TABLES = ("result", "provenance")


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe file: what to train with, and the post-hoc adjustment found for it.

    Attributes:
        recipe: The parts, epochs and seed.
        tau: Strength of the logit adjustment; 0 for none.
        class_counts: Training images of each class (C,) it was found with.
        class_names: Names of the classes, in the order of the logits.
        provenance: Where the recipe comes from: study, trial, versions, data fingerprint.
    """

    recipe: Recipe
    tau: float
    class_counts: Tensor
    class_names: tuple[str, ...]
    provenance: Mapping[str, Any]

    def loss(self, class_counts: Tensor | Sequence[int]) -> Loss:
        """The recipe's loss for your class counts (C,): a module ``(logits, targets)``.

        Deferred weights act once you call ``loss.advance(progress)`` with the share of your
        training that is done, at the start of each epoch.
        """
        return self.recipe.loss.build(torch.as_tensor(class_counts))  # type: ignore[no-any-return]

    def sampler(
        self, targets: Tensor | Sequence[int], *, rank: int = 0, world_size: int = 1
    ) -> ClassSampler:
        """The recipe's sampler for your training targets (N,), for ``DataLoader(sampler=...)``.

        Tail classes are found in your counts by the recipe's own rule.
        """
        targets = torch.as_tensor(targets)
        counts = count_classes(targets, max(len(self.class_names), int(targets.max()) + 1))
        names = self.class_names or [str(c) for c in range(len(counts))]
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
        """
        counts = self.class_counts if class_counts is None else torch.as_tensor(class_counts)
        return adjust_logits(logits, log_priors(counts).to(logits), self.tau)


def load_recipe(path: str | os.PathLike[str]) -> LoadedRecipe:
    """Read a recipe file that ``tuner export`` wrote, or one written by hand.

    Raises:
        StudyFileError: The file is missing or does not validate; the key is named.
    """
    values = read_toml(Path(path))
    result = values.pop("result", {})
    provenance = values.pop("provenance", {})
    recipe = Recipe.from_dict(values, where=str(path))
    if not isinstance(result, Mapping) or not isinstance(provenance, Mapping):
        raise StudyFileError(f"{path}: result and provenance must be tables")
    return LoadedRecipe(
        recipe=recipe,
        tau=float(result.get("tau", 0.0)),
        class_counts=torch.tensor(result.get("class_counts", []), dtype=torch.int64),
        class_names=tuple(result.get("class_names", ())),
        provenance=provenance,
    )
