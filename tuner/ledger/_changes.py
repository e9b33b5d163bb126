"""What a worker wants to write about its trial, collected until it is written in one go."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Changes:
    """Writes of one trial; JSON values throughout, so that they can travel.

    ``params`` are Optuna's internal value and the distribution as JSON text, ``steps`` its
    intermediate values, ``epochs`` rows of ours: epoch, seconds, samples, metrics.
    """

    params: dict[str, tuple[float, str]] = field(default_factory=dict)
    user: dict[str, Any] = field(default_factory=dict)
    system: dict[str, Any] = field(default_factory=dict)
    steps: dict[int, float] = field(default_factory=dict)
    epochs: dict[int, dict[str, Any]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any((self.params, self.user, self.system, self.steps, self.epochs))

    def clear(self) -> None:
        """Forget everything: it is written."""
        for part in (self.params, self.user, self.system, self.steps, self.epochs):
            part.clear()


@dataclass(frozen=True)
class Lease:
    """The right to write one trial's result; ``token`` is what the database checks."""

    token: int
    study_id: int
    trial_id: int
    number: int
    attempt: int
    worker_id: str
    generation: int


@dataclass(frozen=True)
class Limits:
    """What ends a study besides its number of trials, in hours; None: no limit."""

    gpu_hours: float | None = None
    hours: float | None = None

    def exceeded(self, spent: float, age: float) -> str | None:
        """Which limit ``spent`` training seconds or a study's ``age`` in seconds exceed."""
        if self.gpu_hours is not None and spent >= self.gpu_hours * 3600:
            return "gpu_hours"
        if self.hours is not None and age >= self.hours * 3600:
            return "hours"
        return None


@dataclass(frozen=True)
class Order:
    """What the fleet of a study has been told: ``run``, ``pause`` or ``stop``, and why."""

    state: str
    reason: str | None = None
    detail: str | None = None


@dataclass(frozen=True)
class Ending:
    """How one of several trials ends: what is still to be written, and what ``finish`` takes.

    ``state`` is the name of one of Optuna's; ``WAITING`` puts the trial back.
    """

    lease: Lease
    changes: Changes
    state: str
    end: str
    values: list[float] | None = None
    reason: str | None = None
    detail: str | None = None
    seconds: float = 0.0


class LeaseLostError(Exception):
    """Another worker has the trial, or it ended: nothing was written."""


class SupersededError(Exception):
    """Another process works under this worker's name now."""


class WorkerAliveError(Exception):
    """A worker of this name is alive: its row is the argument."""

    def __init__(self, row: dict[str, Any]) -> None:
        super().__init__(row)
        self.row = row
