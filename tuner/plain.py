"""Plain cross-entropy in a search: which trials are it, and its fair share of them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tuner.ladder import HasAttributes
from tuner.space import Space
from tuner.study import StudyFile

if TYPE_CHECKING:
    from tuner.session import Session

BALANCING = ("two_stage",)
"""Trainings that sample by class in one of their stages, whatever a recipe's sampler is."""
FEWEST = 4
"""Trials that tune plain cross-entropy at the least, its default among them."""
MOST = 0.5
"""Share at the most: as many as all other recipes together."""


def is_plain(trial: HasAttributes) -> bool:
    """Whether a trial's recipe is cross-entropy with natural sampling all through."""
    attrs = trial.user_attrs
    training = attrs.get("recipe", {}).get("training", {}).get("name")
    alike = attrs.get("loss") == "cross_entropy" and attrs.get("sampler") == "natural"
    return alike and training not in BALANCING


def choice(space: Space) -> dict[str, str] | None:
    """Optuna parameters that make a recipe plain cross-entropy and leave the rest open.

    None where the space has no such recipe, or nothing is left open.
    """
    trainings = [name for name in space.parts["training"] if name not in BALANCING]
    wanted = {"loss": ["cross_entropy"], "sampler": ["natural"], "training": trainings}
    parts, chosen = dict(space.parts), dict[str, str]()
    for part, names in wanted.items():
        found = [name for name in names if name in parts[part]]
        if not found:
            return None
        if len(found) < len(parts[part]):
            chosen[part] = found[0]
            parts[part] = {found[0]: parts[part][found[0]]}
    return chosen if replace(space, parts=parts).rows() else None


def fair_share(file: StudyFile) -> int:
    """How many trials of the full rung tune plain cross-entropy, its default among them.

    As many as each loss has on average, ``FEWEST`` at the least, or the share that
    ``ladder.confirm.plain`` says; never more than ``MOST``. None are set apart without a confirm
    rung, where trials are not proposed one by one, and where the space has none to propose.
    """
    search, setting = file.search, file.ladder.confirm.plain
    planned = search.algorithm == "grid" or search.strategy == "progressive"
    if not file.ladder.confirms or planned or setting == 0 or choice(file.space) is None:
        return 0
    trials, losses = file.trials(), len(file.space.parts["loss"])
    wanted = max(FEWEST, math.ceil(trials / losses))
    if setting != "equal":
        wanted = math.ceil(setting * trials)
    return min(wanted, int(MOST * trials))


def shared_out(session: Session, room: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Tickets for ``room`` proposals of the full rung, those of plain cross-entropy evenly among.

    They are at most half of them, and have everything open but loss and sampler.
    """
    chosen = choice(session.file.space) or {}
    count = max(0, min(fair_share(session.file) - 1, room // 2))
    free = [((place + 0.5) / (room - count), False) for place in range(room - count)]
    plain = [((place + 0.5) / count, True) for place in range(count)]
    order = [is_for_plain for _, is_for_plain in sorted(free + plain)]
    return [(dict(chosen), {"plain": True}) if own else ({}, {}) for own in order]
