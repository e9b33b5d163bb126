"""The recipe of a ticket, what is noted of it, and whether it was trained before."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from optuna.trial import FrozenTrial

from tuner.backends import settled
from tuner.confirm import contenders, fresh_seed
from tuner.datasets import Data
from tuner.imbalance import correction_warning
from tuner.ladder import rung_of
from tuner.losses import LOSSES
from tuner.recipe import Recipe, plain
from tuner.samplers import SAMPLERS
from tuner.session import Session
from tuner.trained import stored_recipe

log = logging.getLogger(__name__)


def resolve(
    session: Session, trial: Any, data: Data | None = None, device: str | None = None
) -> Recipe:
    """Recipe of a trial, live or stored; the plain one for the baseline.

    With ``data`` given, the recipe and what follows from it are noted in the trial. What it
    leaves to the machine is chosen for ``device``, unless an earlier attempt did.
    """
    space = session.file.space_at(rung_of(trial))
    recipe = replace(space.suggest(trial), data=session.file.data)
    if trial.user_attrs.get("baseline"):
        recipe = plain(recipe)
    if rung_of(trial) == "confirm":
        recipe = _again(session, trial)
    recipe = _as_before(recipe, trial.user_attrs.get("recipe", {}).get("training", {}))
    if data is not None and device is not None:
        recipe = settled(recipe, data, device)
    if data is not None:
        facts: dict[str, Any] = {
            "recipe": recipe.to_dict(),
            "digest": recipe.digest(),
            "loss": LOSSES.name_of(recipe.loss),
            "sampler": SAMPLERS.name_of(recipe.sampler),
            "kappa": recipe.correction(data.class_counts, data.groups),
            "epochs": recipe.epochs,
            "settled": recipe.settled(),
        }
        at_head = rung_of(trial) == "head"
        warning = " ".join(_warnings(recipe, facts["kappa"], at_head=at_head))
        if warning:
            level = logging.DEBUG if at_head else logging.INFO
            log.log(level, "trial %d: %s", trial.number, warning)
            facts["warning"] = warning
        stale = ("reason", "detail", "would_prune_at")
        facts |= {key: None for key in stale if trial.user_attrs.get(key) is not None}
        for key, value in facts.items():
            trial.set_user_attr(key, value)
    return recipe


def _again(session: Session, trial: Any) -> Recipe:
    """The recipe that a trial of the confirm rung trains again, with its fresh seed."""
    attrs = trial.user_attrs
    found = session.ended().known[attrs["confirms"]]
    return replace(stored_recipe(found), seed=fresh_seed(session, attrs["fold"]))


def _as_before(recipe: Recipe, training: Mapping[str, Any]) -> Recipe:
    """The recipe in the precision and layout of an earlier attempt, where they are open."""
    chosen = {
        key: training[key]
        for key in ("precision", "layout")
        if getattr(recipe.training, key) == "auto" and key in training
    }
    return replace(recipe, training=replace(recipe.training, **chosen))


def _warnings(recipe: Recipe, kappa: float, *, at_head: bool) -> Iterator[str]:
    warning = correction_warning(kappa)
    if warning:
        yield warning
    epochs = recipe.epochs
    # The head rung has epochs of its own, and one stage.
    if not at_head and (start := recipe.last_start()) > (epochs - 1) / epochs:
        yield (
            f"a part that starts at {100 * start:.0f} % of the training never acts in {epochs} "
            f"epoch{'' if epochs == 1 else 's'}, because it waits for an epoch to begin; raise "
            "budget.epochs or let it start earlier"
        )


def kept_trials(session: Session) -> set[int]:
    """Numbers of the trials whose weights are kept: those the best and the baseline are from.

    Until a study that confirms its best recipes has decided, those are all of them, with what
    they are trained again for: only then is it known which are looked at on the test part.
    """
    wanted = {t.number for t in (session.best(), session.baseline()) if t is not None}
    if session.file.ladder.confirms:
        wanted |= contenders(session).keys()
        # Also of trials that have not ended: by the time that others' weights go, they may have.
        wanted |= {t.number for t in session.trials() if t.user_attrs.get("confirms") in wanted}
    known = session.ended().known
    return {known[n].user_attrs.get("duplicate_of", n) if n in known else n for n in wanted}


def equivalent(session: Session, recipe: Recipe, trial: Any) -> FrozenTrial | None:
    """Another complete trial that trained an equivalent recipe at the rung of ``trial``."""
    return session.ended().trained(recipe.digest(), rung_of(trial), apart_from=trial.number)
