"""What lanes must have in common to take the same seat: all that a recorded step takes as given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tuner.augment import Augmenter
from tuner.lane import Lane
from tuner.rows import row_of
from tuner.stacks._device import Uncapturable
from tuner.stacks._module import numbers_of


@dataclass(frozen=True)
class Kind:
    """Lanes of one kind differ in weights, moments, rates, losses, samplers and draws only.

    ``data`` is the identity of the data, ``drawn`` what chance decides and its shapes, ``modes``
    what of the model trains, and how. ``loss`` is None for losses that have rows and hard targets:
    these may differ; else it is all that the loss is made of.
    """

    data: int
    model: str
    optimizer: tuple[object, ...]
    augment: str
    drawn: tuple[tuple[str, tuple[int, ...]], ...]
    modes: tuple[object, ...]
    formats: tuple[object, ...]
    notes: bool
    loss: tuple[object, ...] | None
    compiles: bool


def kind_of(lane: Lane) -> Kind:
    """The kind of a lane in the epoch that it has begun.

    Raises:
        Uncapturable: Its augmentation draws inside of steps.
    """
    if type(lane.augment).forward is not Augmenter.forward:
        raise Uncapturable("its augmentation draws inside of steps")
    recipe, drawn = lane.recipe, _drawn(lane)
    parameters = [(n, p.requires_grad) for n, p in lane.model.named_parameters()]
    modules = [module.training for module in lane.model.modules()]
    training = recipe.training
    return Kind(
        data=id(lane.data),
        model=f"{recipe.model} {recipe.loss.head}",
        optimizer=_of_optimizer(lane),
        augment=repr(recipe.canonical().augment),
        drawn=drawn,
        modes=(tuple(modules), tuple(parameters)),
        formats=(training.batch_size, training.precision, training.layout, lane.dtype),
        notes=bool(lane.samplers[lane.stage].needs_losses),
        loss=_of_loss(lane, hard="share" not in dict(drawn)),
        compiles=lane.compiles,
    )


def _drawn(lane: Lane) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """What the coming epoch draws for a step of two images."""
    found = lane.augment.plan(1, 2, lane.data.image_shape[1:], torch.Generator(), lane.progress)
    return tuple(sorted((name, tuple(tensor.shape)) for name, tensor in found.items()))


def _of_optimizer(lane: Lane) -> tuple[object, ...]:
    names = {id(parameter): name for name, parameter in lane.model.named_parameters()}
    groups = lane.optimizer.param_groups
    options: dict[str, Any] = groups[0]
    kept = tuple((key, options[key]) for key in ("betas", "eps") if key in options)
    grouped = tuple(tuple(names[id(p)] for p in group["params"]) for group in groups)
    return type(lane.recipe.optimizer), kept, grouped


def _of_loss(lane: Lane, *, hard: bool) -> tuple[object, ...] | None:
    if hard and row_of(lane.loss) is not None:
        return None
    return type(lane.loss), repr(loss_of(lane)), numbers_of(lane.loss)


def loss_of(lane: Lane) -> Any:
    """The component of the loss of the stage at hand."""
    return lane.recipe.training.losses(lane.recipe.loss)[lane.stage]
