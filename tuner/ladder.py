"""The ladder of fidelities: its rungs, what each searches, and how far one is to be trusted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from optuna.trial import FrozenTrial, TrialState
from pydantic import AfterValidator, Field

from tuner.entries import Fixed
from tuner.heads import HeadTraining
from tuner.registry import component
from tuner.space import Space
from tuner.statistics import Interval, rank_correlation

Rung = Literal["head", "deferred", "full", "confirm"]
RUNGS: tuple[Rung, ...] = ("head", "deferred", "full", "confirm")
ACTING = ("loss", "sampler")
"""The parts of a recipe that the rungs below ``full`` search; the others are held fixed."""

LARGEST = 100_000
FEWEST_PAIRS = 6
FEWEST_HEADS, MOST_HEADS = 100, 1000
"""Trials of the head rung where what they cost decides."""
BASELINES = 2
"""Plain cross-entropy at the confirm rung: with its defaults, and tuned."""
FEWEST_GOING_ON = 2
"""Recipes that are trained with every seed of the confirm rung, if there are so many."""

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=LARGEST)]


class HasAttributes(Protocol):
    """A trial, stored or at work."""

    @property
    def user_attrs(self) -> dict[str, Any]:
        """Its user attributes."""


@component
class HeadRung(HeadTraining):
    """The rung that trains classifiers only, hundreds at once, on the features of one backbone.

    ``trials``: how many. With ``auto`` the rung ends once its trials have taken ``share`` of the
    time that training those of ``full`` takes, after ``FEWEST_HEADS`` at the earliest and
    ``MOST_HEADS`` at the latest. ``backbone``: ``baseline`` for the network of the study's plain
    cross-entropy trial, ``initial`` for the model with the ``weights_file`` it is given.
    """

    trials: Count | Literal["auto"] = "auto"
    share: Annotated[float, Field(ge=0)] = 0.1
    backbone: Literal["baseline", "initial"] = "baseline"


@component
class DeferredRung:
    """The rung that branches recipes from shared checkpoints at ``switch`` of the training."""

    trials: Count = 40
    switch: Annotated[float, Field(gt=0, lt=1)] = 0.8


@component
class ConfirmRung:
    """The rung that trains the best recipes of ``full`` again, each with several fresh seeds.

    ``recipes``: how many. Plain cross-entropy is trained beside them, with its defaults and as
    the search tuned it best. ``seeds``: trainings of each; the search's seed is not among them.
    Where validation was carved out of the training part, every seed has other images there.
    ``keep``: the share of the recipes, the best of them, that goes on after each seed, two at the
    least (successive halving, Karnin et al. 2013); 1 trains all with every seed. ``plain``: the
    share of the trials of ``full`` that tune plain cross-entropy, "equal" for as many as each loss
    has on average (see ``tuner.plain``); 0 for as many as the algorithm happens to propose.
    """

    recipes: Annotated[int, Field(ge=1, le=100)] = 7
    seeds: Annotated[int, Field(ge=2, le=100)] = 4
    keep: Annotated[float, Field(gt=0, le=1)] = 0.5
    plain: Annotated[float, Field(ge=0, le=0.5)] | Literal["equal"] = "equal"

    def going_on(self, recipes: int) -> int:
        """How many of so many recipes go on after a seed."""
        return min(recipes, max(FEWEST_GOING_ON, math.ceil(self.keep * recipes - 1e-9)))

    def most(self) -> int:
        """Trainings of the rung at most, those of plain cross-entropy among them."""
        recipes, total = self.recipes, BASELINES * self.seeds
        for _ in range(self.seeds):
            total += recipes
            recipes = self.going_on(recipes)
        return total


def _climbing(rungs: tuple[Rung, ...]) -> tuple[Rung, ...]:
    if list(rungs) != sorted(set(rungs), key=RUNGS.index):
        raise ValueError(f"must name rungs once each, in this order: {', '.join(RUNGS)}")
    if "confirm" in rungs and "full" not in rungs:
        raise ValueError("has confirm, which trains the best of full again: name full before it")
    return rungs


@component
class Ladder:
    """The rungs a study climbs, cheapest first; the last one gives the answer.

    ``[budget] trials`` are those of the last rung that searches; ``confirm`` does not. Of them
    ``promoted`` is the share for the best recipes of the rung below, and ``unseen`` the share for
    such recipes with everything searched that the rung below cannot see. Half of the promoted, or
    as many as make a comparison, are trained with everything else at its default, which shows how
    the two rungs rank them; where there is an ``unseen`` share, the others join it. Where the ranks
    correlate by less than ``trust`` (Spearman), what is left of both shares goes to the algorithm's
    own proposals; else these learn from the rung below too, unless ``prior`` is false.
    """

    rungs: Annotated[
        tuple[Rung, ...], Field(min_length=1, max_length=4), AfterValidator(_climbing)
    ] = ("full",)
    promoted: Share = 0.25
    unseen: Share = 0.25
    trust: Annotated[float, Field(ge=-1, le=1)] = 0.5
    prior: bool = True
    head: HeadRung = HeadRung()
    deferred: DeferredRung = DeferredRung()
    confirm: ConfirmRung = ConfirmRung()

    @property
    def searched(self) -> tuple[Rung, ...]:
        """The rungs that look for recipes: all but ``confirm``."""
        return tuple(rung for rung in self.rungs if rung != "confirm")

    @property
    def last(self) -> Rung:
        """The last rung that looks for recipes; its trials are complete for Optuna."""
        return self.searched[-1]

    @property
    def confirms(self) -> bool:
        """Whether the best recipes are trained again before one is the answer."""
        return "confirm" in self.rungs

    def below(self, rung: Rung) -> Rung | None:
        """The rung before ``rung``, if there is one."""
        place = self.rungs.index(rung)
        return self.rungs[place - 1] if place else None

    def may_end_before(self, rung: Rung) -> bool:
        """Whether a rung may have fewer trials than ``trials`` says: it depends on what is seen."""
        by_cost = rung == "head" and self.head.trials == "auto" and "full" in self.rungs
        return by_cost or rung == "confirm"

    def trials(self, rung: Rung, budget: int) -> int:
        """How many trials a rung has at most, given those of the last one that searches."""
        if rung == "confirm":
            return self.confirm.most()
        if rung == self.last:
            return budget
        if rung == "deferred":
            return self.deferred.trials
        return MOST_HEADS if self.head.trials == "auto" else self.head.trials


def rung_of(trial: HasAttributes) -> Rung:
    """The rung a trial is trained at."""
    rung: Rung = trial.user_attrs.get("fidelity", "full")
    return rung


def is_judged(trial: FrozenTrial) -> bool:
    """Whether a trial was trained to the end of its rung, and has a value there.

    Below the last rung such a trial is ``PRUNED`` for Optuna, with the rung as the reason: the
    study's best is one of the last rung.
    """
    attrs = trial.user_attrs
    done = trial.state == TrialState.COMPLETE or attrs.get("reason") == attrs.get("fidelity", "")
    return bool(done and trial.values and "metrics" in attrs)


def space_at(space: Space, ladder: Ladder, rung: Rung) -> Space:
    """What a rung searches: below ``full`` loss and sampler, which act from its beginning."""
    if rung in ("full", "confirm"):
        return space
    held = space.held({part for part in space.parts if part not in ACTING})
    parts = dict(held.parts)
    for part in ACTING:
        branches = parts[part].items()
        parts[part] = {
            name: {key: Fixed(0.0) if key == "start" else e for key, e in entries.items()}
            for name, entries in branches
        }
    if rung == "deferred":
        parts["training"] = {"deferred": _deferred(parts["training"], ladder)}
    return Space(parts, space.epochs, space.seed)


def _deferred(branches: dict[str, dict[str, Any]], ladder: Ladder) -> dict[str, Any]:
    entries = next(iter(branches.values()))
    kept: dict[str, Any] = {
        key: entries[key] for key in ("batch_size", "precision", "layout") if key in entries
    }
    return kept | {"switch": Fixed(ladder.deferred.switch)}


@dataclass(frozen=True)
class Agreement:
    """How two rungs rank the recipes that were trained on both.

    ``pairs`` are their objectives, the lower rung's first. ``correlation`` is Spearman's, None
    below ``FEWEST_PAIRS`` pairs or where one side has no differences.
    """

    lower: Rung
    upper: Rung
    pairs: tuple[tuple[float, float], ...]
    correlation: float | None
    interval: Interval | None

    def is_low(self, trust: float) -> bool:
        """Whether the lower rung is not to be followed."""
        return self.correlation is not None and self.correlation < trust

    def __str__(self) -> str:
        both = f"{self.lower} and {self.upper}"
        if len(self.pairs) < FEWEST_PAIRS:
            return f"too few recipes trained on both {both} to compare them ({len(self.pairs)})"
        if self.correlation is None or self.interval is None:
            alike = self.upper if len({upper for _, upper in self.pairs}) == 1 else self.lower
            count = len(self.pairs)
            return f"all {count} recipes trained on both {both} have the same value on {alike}"
        low, high = self.interval.low, self.interval.high
        found = f"{self.correlation:.2f} [{low:.2f}, {high:.2f}]"
        return f"{both} rank {len(self.pairs)} recipes with correlation {found}"


def agreement(lower: Rung, upper: Rung, pairs: list[tuple[float, float]]) -> Agreement:
    """Rank correlation of two rungs from the objectives of recipes trained on both."""
    found = rank_correlation(pairs) if len(pairs) >= FEWEST_PAIRS else None
    correlation, interval = found or (None, None)
    return Agreement(lower, upper, tuple(pairs), correlation, interval)
