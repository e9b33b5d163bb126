"""What a rung is given, a slot, and what it says of a trial, an outcome."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from optuna.trial import Trial

from tuner.confirm import fold_of
from tuner.datasets import Data, fold
from tuner.heads import COHORT
from tuner.ladder import HasAttributes
from tuner.pulse import Pulse
from tuner.rungs.peers import Peers
from tuner.session import Session
from tuner.stacks import Stacks
from tuner.trained import Backbone
from tuner.trainer import EpochResult

State = Literal["complete", "duplicate", "pruned", "failed", "interrupted", "lost"]
OnEpoch = Callable[[Trial, EpochResult, float], None]


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: its state, the reason unless it is complete, its value if any."""

    number: int
    state: State
    reason: str | None = None
    detail: str | None = None
    value: float | None = None


@dataclass
class Slot:
    """A share of a device worked by one process: what it keeps from one trial to the next.

    ``pieces`` are the images of which memory holds no more at once, of each model where that had
    to be found out; ``lanes`` so many classifiers, whose ``backbone`` is kept once it was needed.
    Of the head rung's trials so many are trained ``together``: fewer after one of them raised.
    Others are trained ``side_by_side``, as many as suit the last recipe, but at most ``most``,
    once memory set that limit; ``beside`` says how many there are just now. Not before
    ``ask_again`` is the queue worth another look. ``stages`` are the keys of the shared stages
    that trials here are training, ``stacks`` what trials on a GPU have seats in.
    """

    session: Session
    pulse: Pulse
    data: Data
    device: str
    peers: Peers
    pieces: dict[str, int] = field(default_factory=dict)
    lanes: int = COHORT
    together: int = COHORT
    backbone: Backbone | None = None
    side_by_side: int = 1
    most: int | None = None
    ask_again: float = 0.0
    stages: set[str] = field(default_factory=set)
    stacks: Stacks = field(default_factory=Stacks)
    folds: dict[int, Data] = field(default_factory=dict)
    beside: Callable[[], int] = lambda: 1

    def data_for(self, trial: HasAttributes) -> Data:
        """The data that a trial is trained and judged on: at the confirm rung, a fold of them."""
        index = fold_of(trial)
        if index is None:
            return self.data
        if index not in self.folds:
            # Trials come fold by fold; each fold is a copy of the images.
            self.folds = {index: fold(self.data, index)}
        return self.folds[index]

    @property
    def room(self) -> int:
        """How many trials may be trained here at once."""
        return min(self.side_by_side, self.most or self.side_by_side)
