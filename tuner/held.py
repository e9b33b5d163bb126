"""What a rung searches and what it holds fixed, for people."""

from __future__ import annotations

from tuner.entries import Fixed
from tuner.ladder import ACTING, Rung
from tuner.space import Space
from tuner.study import StudyFile


def searched_rows(file: StudyFile, rung: Rung) -> list[tuple[str, str]]:
    """What a rung searches as (name, what it ranges over)."""
    return [] if rung == "confirm" else file.space_at(rung).rows()


def held_rows(file: StudyFile, rung: Rung) -> list[tuple[str, str]]:
    """What the study searches but this rung holds fixed, as (name, its value here)."""
    if rung == "confirm":
        return []
    space = file.space_at(rung)
    open_ = {name for name, _ in space.rows()}
    closed = [name for name, _ in file.space.rows() if name not in open_]
    return [(name, value) for name in closed if (value := _value(space, name)) is not None]


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
    return f"everything but loss and sampler: the classifier alone is trained, on {known}"


def _acts_late(space: Space) -> bool:
    """Whether recipes whose loss or sampler begins to act late are among those searched."""
    starts = (entries.get("start") for part in ACTING for entries in space.parts[part].values())
    late = any(entry not in (None, Fixed(0.0)) for entry in starts)
    return late or "deferred" in space.parts["training"]


def _value(space: Space, name: str) -> str | None:
    """The value a closed hyperparameter has; None where its component is not in the space."""
    part, _, rest = name.partition(".")
    branches = space.parts[part]
    if not rest:
        return next(iter(branches))
    component, _, key = rest.partition(".")
    entry = branches.get(component, {}).get(key)
    return None if entry is None else str(entry)
