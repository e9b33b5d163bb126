"""Recipes and features for tests of the head rung's engine, and an ordinary loop beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from trainer_cases import recipe

from tuner.augment import Augmenter
from tuner.datasets import Data
from tuner.heads import Features, HeadTraining, cached_features
from tuner.heads._plans import MIXTURE, Plan, own_planner, sampler_of, shared_planner
from tuner.losses import LOSSES, EqualizationLoss, Loss
from tuner.models import Classifier, CosineHead
from tuner.recipe import Recipe

SETTINGS = HeadTraining(epochs=3, steps=0, batch_size=64)

HYPERPARAMETERS: dict[str, Callable[[Callable[[float, float], float]], dict[str, Any]]] = {
    "weighted_cross_entropy": lambda u: {"power": u(0, 1), "start": 0.5},
    "class_balanced": lambda u: {"effective_samples": 10 ** u(0, 4), "start": 0.5},
    "class_balanced sigmoid": lambda u: {"base": "sigmoid", "beta": u(0.9, 0.9999)},
    "class_balanced focal": lambda u: {"base": "focal", "gamma": u(0, 3), "start": 0.5},
    "focal": lambda u: {"gamma": u(0, 4)},
    "asymmetric": lambda u: {"gamma_pos": u(0, 2), "gamma_neg": u(0, 4), "eps": u(0, 0.3)},
    "weighted_asymmetric": lambda u: {
        "gamma_pos": u(0, 2),
        "gamma_neg": u(0, 4),
        "eps": u(0, 0.3),
        "power": u(0, 1),
        "start": 0.5,
    },
    "asymmetric without eps": lambda u: {"gamma_pos": u(0, 2), "eps": 0.0},
    "fnr_adaptive": lambda u: {"half_life": u(0.1, 2), "floor": u(0.05, 0.5), "start": 0.5},
    "fnr_adaptive reference": lambda u: {"mode": "reference", "alpha": u(0.01, 0.5)},
    "label_smoothing": lambda u: {"eps": u(0.01, 0.4)},
    "label_aware_smoothing": lambda u: {"smooth_head": u(0.2, 0.4), "smooth_tail": u(0, 0.2)},
    "balanced_softmax": lambda u: {"start": 0.5},
    "logit_adjusted": lambda u: {"tau": u(0.1, 2), "start": 0.5},
    "vector_scaling": lambda u: {"gamma": u(0.01, 0.4), "tau": u(0, 2), "start": 0.5},
    "ldam": lambda u: {"max_margin": u(0, 1), "scale": u(5, 30), "beta": 0.999, "start": 0.5},
    "equalization": lambda u: {"gamma": u(0.1, 1), "threshold": u(0.03, 0.2), "start": 0.5},
}
CASES = sorted({*HYPERPARAMETERS, *LOSSES})


def loss_table(case: str, seed: int) -> dict[str, Any]:
    """A loss of a recipe with random hyperparameters, as far as this file knows them."""
    draws = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=draws))

    values = HYPERPARAMETERS[case](uniform) if case in HYPERPARAMETERS else {}
    return {"name": case.partition(" ")[0], **values}


def head_recipe(
    loss: dict[str, Any] | None = None, sampler: str = "natural", **more: Any
) -> Recipe:
    """A recipe of which only loss, sampler and seed act here."""
    parts: dict[str, Any] = {"sampler": {"name": sampler, **more.pop("sampling", {})}}
    seed = more.pop("seed", 7)
    made = recipe(loss=loss or {"name": "cross_entropy"}, model={"name": "linear"}, **parts)
    return Recipe.from_dict({**made.to_dict(), "seed": seed})


def pixels(data: Data) -> tuple[Classifier, Augmenter]:
    """A classifier whose features are the pixels, and the augmenter that normalises them."""
    chosen = head_recipe()
    model: Classifier = chosen.model.build(data.num_classes, data.image_shape)
    augmenter: Augmenter = chosen.augment.build(
        data.image_shape,
        mean=data.mean,
        std=data.std,
        class_counts=data.class_counts,
        groups=data.groups,
    )
    return model, augmenter


def pixel_features(data: Data, folder: Path) -> Features:
    """Features (2, N, 64) of the digits: their pixels."""
    model, augmenter = pixels(data)
    return cached_features(model, data, augmenter, copies=2, seed=0, folder=folder)


class Loop:
    """The ordinary way: one recipe, ``nn.Linear``, autograd and ``torch.optim.SGD``."""

    def __init__(
        self, chosen: Recipe, features: Features, data: Data, dtype: torch.dtype, *, shared: bool
    ) -> None:
        self.recipe, self.features, self.data, self.dtype = chosen, features, data, dtype
        self.cosine = chosen.loss.head == "cosine"
        self.shared = shared
        self.loss: Loss = chosen.loss.build(data.class_counts).follow(chosen.seed)
        self.head = self._head()
        first = features.train[0].to(dtype)
        self.mean = first.mean(0)
        self.unit = (first - self.mean).square().sum(1).mean().sqrt()
        size = {"copies": 2, "batch_size": SETTINGS.batch_size}
        targets = features.train_targets
        self.planner = (
            shared_planner(data, targets, seed=chosen.seed, **size)
            if shared
            else own_planner(chosen, data, targets, **size)
        )

    def _head(self) -> nn.Module:
        width, classes = self.features.train.shape[2], self.data.num_classes
        if self.cosine:
            from tuner.seeding import seeded

            with seeded(self.recipe.seed, "head"):
                return CosineHead(width, classes).to(self.dtype)
        head = nn.Linear(width, classes, dtype=self.dtype)
        nn.init.zeros_(head.weight)
        nn.init.constant_(head.bias, self.recipe.loss.head_bias(classes) or 0.0)
        return head

    def inputs(self, values: Tensor) -> Tensor:
        """Features as the head takes them."""
        values = values.to(self.dtype)
        return values if self.cosine else (values - self.mean) / self.unit

    def weight(self) -> Tensor:
        """The classifier's weight for the backbone's own features."""
        weight = self.head.get_parameter("weight").detach()
        return weight if self.cosine else weight / (self.unit * self.features.scale)

    def train(self) -> tuple[Tensor, float]:
        """Validation logits and the mean training loss of the last epoch."""
        parameters = dict(self.head.named_parameters())
        groups: list[dict[str, Any]] = [{"params": [parameters["weight"]], "weight_decay": 5e-4}]
        if "bias" in parameters:
            groups.append({"params": [parameters["bias"]]})
        self.optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
        for epoch in range(SETTINGS.epochs):
            progress = epoch / SETTINGS.epochs
            self.loss.advance(progress)
            draw = self.planner.whole if self.shared else self.planner.plan
            plan = draw(epoch, progress)
            total = self._epoch(plan, epoch)
        outputs = self.head(self.inputs(self.features.validation)).detach().float()
        return outputs * self.recipe.loss.output_scale(), total / int(plan.sizes.sum())

    def _epoch(self, plan: Plan, epoch: int) -> float:
        rows = self.features.train.flatten(0, 1)
        noted, total = [], 0.0
        pace = 4 / self.recipe.loss.output_scale() ** 2 if self.cosine else 1.0
        for step, size in enumerate(plan.sizes.tolist()):
            places, targets = plan.places[step, :size], plan.targets[step, :size]
            for group in self.optimizer.param_groups:
                group["lr"] = pace * SETTINGS.rate((epoch + step / len(plan)) / SETTINGS.epochs)
            outputs = self.head(self.inputs(rows[places]))
            noted.append(nn.functional.cross_entropy(outputs, targets, reduction="none").detach())
            loss = self._loss(outputs, targets, epoch / SETTINGS.epochs)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            total += loss.item() * size
        images = torch.cat([plan.images[s, :n] for s, n in enumerate(plan.sizes.tolist())])
        if self.planner.sampler.needs_losses:
            self.planner.sampler.observe(images, torch.cat(noted))
        return total

    def _loss(self, outputs: Tensor, targets: Tensor, progress: float) -> Tensor:
        if not self.shared:
            loss: Tensor = self.loss(outputs, targets)
            return loss
        counts, groups = self.data.class_counts, self.data.groups
        own = sampler_of(self.recipe).probabilities(counts, progress, groups)
        ratio = MIXTURE.ratio(own, counts).to(outputs)
        losses = self.loss.per_sample(outputs, targets)
        if isinstance(self.loss, EqualizationLoss):
            self.loss.steps.add_(1)
        return (losses * ratio[targets]).mean()


def unlike(a: Tensor, b: Tensor) -> float:
    """Largest difference in units of the largest value."""
    return float((a - b).abs().max() / b.abs().max())
