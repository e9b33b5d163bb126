"""How a rung's trials are shared out: recipes of the rung below, and defaults beside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tuner.ladder import FEWEST_PAIRS, Rung
from tuner.study import StudyFile

Ticket = tuple[dict[str, Any], dict[str, Any]]
"""Optuna parameters that are fixed beforehand, and user attributes."""

COMPARES = {"compares": True}
"""Marks the trials that tell whether a rung is to be followed; they are never pruned."""


def budget(file: StudyFile, rung: Rung) -> int:
    """Trials of a rung at most."""
    return file.ladder.trials(rung, file.trials())


def room(file: StudyFile, rung: Rung) -> int:
    """Trials of a rung without the baseline, which is one of the full rung."""
    return budget(file, rung) - (rung == "full")


def attrs_of(rung: Rung) -> dict[str, Any]:
    """User attributes that tell the rung of a ticket."""
    return {} if rung == "full" else {"fidelity": rung}


def presets(file: StudyFile, rung: Rung = "full") -> Iterator[Ticket]:
    """One published default per loss; at ``full`` that of cross-entropy may be the baseline."""
    space = file.space_at(rung)
    for loss in space.parts["loss"]:
        if loss != "cross_entropy" or not _has_baseline(file, rung):
            yield space.defaults(loss=loss), {**attrs_of(rung), "preset": loss}


def comparing_presets(file: StudyFile, rung: Rung) -> list[Ticket]:
    """One published default per loss, as far as those promoted leave room; trained early."""
    made = list(presets(file, rung))[: room(file, rung) - promotions(file, rung)]
    return [(params, attrs | COMPARES) for params, attrs in made]


def promotions(file: StudyFile, rung: Rung) -> int:
    """How many recipes a rung gets of the one below: its share, or what comparing them takes."""
    most = room(file, rung)
    share = max(1, round(file.ladder.promoted * most))
    return min(most, max(share, needed(file, rung)))


def needed(file: StudyFile, rung: Rung) -> int:
    """Promoted recipes without which too few are trained on both rungs to compare these.

    Where they would take more than half of a rung, it is as many as that.
    """
    fewest = FEWEST_PAIRS - len(list(presets(file, rung))) - _has_baseline(file, rung)
    return max(0, min(fewest, room(file, rung) // 2))


def compared_first(file: StudyFile, rung: Rung) -> int:
    """Of the promoted recipes those that are trained before it is known whether to follow."""
    return max((promotions(file, rung) + 1) // 2, needed(file, rung))


def comparisons(file: StudyFile, rung: Rung) -> int:
    """Recipes that are planned to be trained on a rung and the one below, to compare the two."""
    defaults = len(comparing_presets(file, rung)) + _has_baseline(file, rung)
    return compared_first(file, rung) + defaults


def _has_baseline(file: StudyFile, rung: Rung) -> int:
    return int(rung == "full" and file.baseline_is_default)
