"""What a rung searches, what it holds fixed, and what it cannot do, for people."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from tuner.augment import MIXING
from tuner.entries import Fixed
from tuner.ladder import ACTING, FEWEST_PAIRS, Rung
from tuner.shares import comparisons
from tuner.space import Space
from tuner.study import StudyFile


def searched_rows(file: StudyFile, rung: Rung) -> list[tuple[str, str]]:
    """What a rung searches as (name, what it ranges over)."""
    return [] if rung == "confirm" else file.space_at(rung).rows()


def held_rows(file: StudyFile, rung: Rung) -> list[tuple[str, str]]:
    """What the study searches or sets, and this rung holds at another value, as (name, value)."""
    if rung == "confirm":
        return []
    space = file.space_at(rung)
    open_ = {name for name, _ in space.rows()}
    closed = [name for name, _ in file.space.rows() if name not in open_]
    closed += [name for name, entry in _starts(file.space) if str(entry) != _value(space, name)]
    values = {name: _value(space, name) for name in closed}
    return [(name, value) for name, value in values.items() if value is not None]


def how_held(file: StudyFile, rung: Rung) -> str:
    """Why a rung holds fixed what it does, in a few words."""
    if rung == "full":
        return "nothing"
    if rung == "confirm":
        return "everything: the best recipes again, with fresh seeds"
    if rung == "deferred":
        switch = f"{100 * file.ladder.deferred.switch:g} %"
        late = f"everything but loss and sampler, which act from {switch} of the training on"
        apart = "full" in file.ladder.rungs and not _acts_late(file.space)
        return late + "; full trains no such recipes without [space.training.deferred]" * apart
    backbones = {
        "baseline": "the network of plain cross-entropy",
        "initial": "the model as it is built, with the weights_file it is given",
    }
    known = backbones[file.ladder.head.backbone]
    mixes = any(
        entries.get(name, Fixed(0)) != Fixed(0)
        for entries in file.space.parts["augment"].values()
        for name in MIXING
    )
    mixed = ", which sees no mixed images here" * mixes
    return f"everything but loss and sampler: the classifier alone is trained, on {known}{mixed}"


def remarks(file: StudyFile) -> Iterator[str]:
    """What a ladder cannot do with the trials and epochs that it has, and the way out."""
    ladder, epochs = file.ladder, file.budget.epochs
    for rung in ladder.searched:
        below, count = ladder.below(rung), 0
        if below is not None and (count := comparisons(file, rung)) < FEWEST_PAIRS:
            key = "budget.trials" if rung == ladder.last else f"ladder.{rung}.trials"
            yield (
                f"{below} is followed untested: {count} recipes will be trained on both {below} "
                f"and {rung}, and it takes {FEWEST_PAIRS} to say whether they rank alike; raise "
                f"{key}"
            )
    if "head" in ladder.searched and file.search.algorithm == "gp":
        yield "the head rung proposes by tpe: gp would take longer than the trials there"
    switch = ladder.deferred.switch
    if "deferred" in ladder.searched and switch > (epochs - 1) / epochs:
        yield (
            f"the deferred rung tells nothing: ladder.deferred.switch = {switch:g} of {epochs} "
            "epochs leaves none in which loss and sampler act, as they wait for an epoch to begin; "
            f"raise budget.epochs to {math.ceil(1 / (1 - switch) - 1e-9)}, or leave the rung out"
        )


def _acts_late(space: Space) -> bool:
    """Whether recipes whose loss or sampler begins to act late are among those searched."""
    late = any(entry != Fixed(0.0) for _, entry in _starts(space))
    return late or "deferred" in space.parts["training"]


def _starts(space: Space) -> Iterator[tuple[str, Any]]:
    """When parts of a recipe that can begin late do so: names and entries."""
    for part in ACTING:
        for name, entries in space.parts[part].items():
            if "start" in entries:
                yield f"{part}.{name}.start", entries["start"]


def _value(space: Space, name: str) -> str | None:
    """The value a closed hyperparameter has; None where its component is not in the space."""
    part, _, rest = name.partition(".")
    branches = space.parts[part]
    if not rest:
        return next(iter(branches))
    component, _, key = rest.partition(".")
    entry = branches.get(component, {}).get(key)
    return None if entry is None else str(entry)
