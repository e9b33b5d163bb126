"""What the ladder is worth to a search, and whether the rung below helps the algorithm as a prior.

On the made-up problem of ``algorithms.py``: nothing is trained, a formula stands in for the tail
accuracy, but studies, queue, promotion and proposals are Tuner's own. The head rung sees loss and
sampler only, through noise of its own and on another scale; ``--noise`` are its standard
deviations, of which the largest leaves it nothing to say. Printed is the best true value met in
``--full`` trials of the last rung, mean and standard error over ``--searches``; the optimum is
0.55.
"""

from __future__ import annotations

import argparse
import copy
import random
import tempfile
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from algorithms import NOISE, STUDY, true_value

from tuner import session as sessions
from tuner.climbing import compared
from tuner.datasets import Data
from tuner.ladder import rung_of
from tuner.pulse import Pulse
from tuner.recipe import Recipe
from tuner.rungs.attempt import Attempt
from tuner.rungs.recipes import resolve
from tuner.rungs.results import constrain, finish
from tuner.session import Session
from tuner.stores import FolderStore
from tuner.study import StudyFile, parse
from tuner.tickets import next_lease

SCALE, OFFSET = 0.6, 0.1
"""What the head rung says of a true value."""


@dataclass(frozen=True)
class Arm:
    """One way to search: the rungs, and whether the lower one is a prior."""

    name: str
    rungs: tuple[str, ...]
    prior: bool = False


ARMS = (
    Arm("full alone", ("full",)),
    Arm("head, then full; no prior", ("head", "full")),
    Arm("head, then full; prior", ("head", "full"), prior=True),
)


def file_of(arm: Arm, given: argparse.Namespace, seed: int) -> StudyFile:
    """The study file of one search."""
    values = tomllib.loads(STUDY)
    values["budget"] = {"trials": given.full, "epochs": 1}
    values["objective"] = {"floor": False}
    values["search"] = {"seed": seed}
    rungs, head = list(arm.rungs), {"trials": given.head}
    values["ladder"] = {"rungs": rungs, "prior": arm.prior, "head": head}
    import tomli_w

    return parse(values, tomli_w.dumps(values), where="made-up")


def search(
    session: Session, data: Data, value: Callable[[Attempt, Recipe], float]
) -> tuple[float, float | None]:
    """Run a study to its end; the best true value at the last rung, and the rungs' correlation."""
    best = float("-inf")
    while (lease := next_lease(session, ("benchmark", 1))) is not None:
        attempt = Attempt(session, lease, Pulse(session.ledger, ("benchmark", 1)))
        recipe = resolve(session, attempt.trial, data)
        seen = value(attempt, recipe)
        metrics = dict.fromkeys(("tail_accuracy", "accuracy", "balanced_accuracy"), seen)
        attempt.note({"metrics": {"raw": metrics, "adjusted": metrics}})
        attempt.at_step(0, seen)
        constrain(attempt, {"raw": metrics, "adjusted": metrics})
        if rung_of(attempt) == "full":
            best = max(best, true_value(recipe))
        finish(attempt, seen)
    below = session.file.ladder.below("full")
    return best, None if below is None else compared(session, below, "full").correlation


def measure(
    arm: Arm, given: argparse.Namespace, noise: float, data: Data, seed: int
) -> tuple[float, float | None]:
    """One search."""
    draws = random.Random(seed)

    def value(attempt: Attempt, recipe: Recipe) -> float:
        true = true_value(recipe)
        if rung_of(attempt) == "head":
            return OFFSET + SCALE * true + draws.gauss(0, noise)
        return true + draws.gauss(0, NOISE)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        url = f"sqlite:///{folder}/tuner.db"
        made = sessions.create(file_of(arm, given, seed), url, FolderStore(folder), data)
        return search(made, data, value)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--searches", type=int, default=20)
    parser.add_argument("--head", type=int, default=300)
    parser.add_argument("--full", type=int, default=40)
    parser.add_argument("--noise", type=float, nargs="+", default=[0.01, 0.03, 0.5])
    given = parser.parse_args()
    data = parse(tomllib.loads(STUDY), STUDY, where="made-up").data.build(None)
    print(f"{date.today()}: {given.searches} searches of {given.full} full trials each")
    print("| search | noise of the head rung | rank correlation | best true value |")
    print("|---|---|---|---|")
    for arm in ARMS:
        for noise in given.noise if len(arm.rungs) > 1 else [0.0]:
            found = [
                measure(arm, given, noise, copy.copy(data), seed) for seed in range(given.searches)
            ]
            values = [value for value, _ in found]
            known: list[Any] = [c for _, c in found if c is not None]
            error = stdev(values) / len(values) ** 0.5
            shown = f"{fmean(known):.2f}" if known else "–"
            print(f"| {arm.name} | {noise or '–'} | {shown} | {fmean(values):.4f} ± {error:.4f} |")


if __name__ == "__main__":
    main()
