"""The trials of a study that ended, each looked at once: by rank, by recipe, by time."""

from __future__ import annotations

from bisect import bisect, insort
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from datetime import datetime
from operator import attrgetter

from optuna.trial import FrozenTrial, TrialState

from tuner.ladder import Rung, is_judged, rung_of

Place = tuple[bool, float, float, int]
"""What trials are ranked by, the best first."""

GIVEN = {"baseline", "preset", "promoted_from"}
by_number = attrgetter("number")


def fresh(trials: Sequence[FrozenTrial], known: Collection[int]) -> list[FrozenTrial]:
    """Those of the trials, by number, whose number is not known; what is known stays among them.

    They are looked for from the end on: what ended last began late.
    """
    missing, found = len(trials) - len(known), list[FrozenTrial]()
    for trial in reversed(trials):
        if len(found) == missing:
            break
        if trial.number not in known:
            found.append(trial)
    return found[::-1]


class Ranking:
    """Trials, the best first; one more finds its place without a look at the others."""

    def __init__(self) -> None:
        self.trials: list[FrozenTrial] = []
        self._places: list[Place] = []

    def add(self, trial: FrozenTrial, place: Place) -> None:
        """Take in a trial."""
        index = bisect(self._places, place)
        self._places.insert(index, place)
        self.trials.insert(index, trial)

    @property
    def best(self) -> FrozenTrial | None:
        """The first one, if there is one."""
        return self.trials[0] if self.trials else None


class Ended:
    """What is asked of ended trials at every end of one more; they never change.

    ``known`` are all of them, by number. ``complete`` ranks those that are complete, so of the
    last rung; ``of_rung`` those that were trained to the end of a rung, ``apart`` are the others,
    by number. Of a rung ``given`` are those, trained to its end, whose recipes nobody proposed:
    defaults, and what the rung below promoted. ``again`` are numbers of trials that confirm one.
    ``baseline`` is the plain cross-entropy trial, once it is complete: with it the floor is
    known, and all trials are ranked anew. Of several it is the one that was complete first, for
    everybody, whenever they look.
    """

    def __init__(self) -> None:
        self.baseline: FrozenTrial | None = None
        self._clear()

    def _clear(self) -> None:
        self.known: dict[int, FrozenTrial] = {}
        self.complete = Ranking()
        self.of_rung: dict[Rung, Ranking] = defaultdict(Ranking)
        self.apart: dict[Rung, list[FrozenTrial]] = defaultdict(list)
        self.given: dict[Rung, list[FrozenTrial]] = defaultdict(list)
        self.again: dict[int, list[int]] = defaultdict(list)
        self._recipes: dict[tuple[Rung, str], list[int]] = defaultdict(list)
        self._ends: list[tuple[datetime, int]] = []

    def take_in(
        self,
        trials: Sequence[FrozenTrial],
        place: Callable[[FrozenTrial, FrozenTrial | None], Place],
    ) -> None:
        """Look at those that are new among all ended trials, by number.

        ``place`` says where one ranks, given the baseline.
        """
        new = fresh(trials, self.known)
        known = [] if self.baseline is None else [self.baseline]
        first = min(known + list(filter(_is_baseline, new)), key=_end, default=None)
        if first is not self.baseline:
            self.baseline = first
            self._clear()
            new = list(trials)
        for trial in new:
            self.known[trial.number] = trial
            if is_judged(trial):
                self._rank(trial, place(trial, self.baseline))
            else:
                insort(self.apart[rung_of(trial)], trial, key=by_number)
            if "confirms" in trial.user_attrs:
                self.again[trial.user_attrs["confirms"]].append(trial.number)
            if trial.state == TrialState.COMPLETE and "duplicate_of" not in trial.user_attrs:
                self._note(trial)

    def _rank(self, trial: FrozenTrial, place: Place) -> None:
        self.of_rung[rung_of(trial)].add(trial, place)
        if trial.state == TrialState.COMPLETE:
            self.complete.add(trial, place)
        if GIVEN & trial.user_attrs.keys():
            insort(self.given[rung_of(trial)], trial, key=by_number)

    def _note(self, trial: FrozenTrial) -> None:
        insort(self._recipes[rung_of(trial), trial.user_attrs.get("digest", "")], trial.number)
        if trial.datetime_complete is not None:
            insort(self._ends, (trial.datetime_complete, trial.number))

    def trained(self, digest: str, rung: Rung, *, apart_from: int) -> FrozenTrial | None:
        """The first complete trial of a rung, but for one and for copies, of an equivalent recipe.

        Another rung trains the same recipe to other numbers.
        """
        numbers = (n for n in self._recipes.get((rung, digest), ()) if n != apart_from)
        return next((self.known[n] for n in numbers), None)

    def complete_since(self, trial: FrozenTrial) -> int:
        """Complete trials, but for copies, that ended after this one, which is complete too."""
        assert trial.datetime_complete is not None
        return len(self._ends) - bisect(self._ends, (trial.datetime_complete, trial.number))


def _end(trial: FrozenTrial) -> tuple[datetime, int]:
    return trial.datetime_complete or datetime.max, trial.number


def _is_baseline(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.COMPLETE and bool(trial.user_attrs.get("baseline"))
