"""What a person sees of a machine's slots: two progress bars, or lines where no terminal is."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import TracebackType

from optuna.trial import Trial
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tuner.cli import say
from tuner.cli.show import describe, describe_cohort
from tuner.planned import all_planned
from tuner.rungs.outcome import Outcome
from tuner.session import Session
from tuner.supervisor import Sight
from tuner.trainer import EpochResult

ENDED = ("complete", "pruned", "fail")

log = logging.getLogger(__name__)


class SlotLines:
    """What a slot says: one line per epoch, and one per trial or cohort that ended."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.epochs = session.file.budget.epochs
        self.metric = session.file.objective.metric

    def epoch(self, trial: Trial, result: EpochResult, value: float) -> None:
        """Say what an epoch brought."""
        log.info(
            "trial %d · %s · epoch %d/%d · loss %.4f · %s %.4f · %.0f samples/s",
            trial.number,
            trial.user_attrs.get("loss", "?"),
            result.epoch + 1,
            self.epochs,
            result.train_loss,
            self.metric,
            value,
            result.samples / max(result.seconds, 1e-9),
        )

    def trial(self, outcome: Outcome) -> None:
        """Say how a trial ended; louder when it failed."""
        level = logging.WARNING if outcome.state == "failed" else logging.INFO
        log.log(level, "trial %d · %s", outcome.number, describe(outcome))

    def cohort(self, outcomes: Sequence[Outcome], seconds: float) -> None:
        """Say how trials ended that were trained together."""
        log.info("%s", describe_cohort(self.session, outcomes, seconds))


class Bars:
    """The study's trials and the epochs of this machine's running ones; no bars elsewhere."""

    def __init__(self, session: Session, *, terminal: bool) -> None:
        self.session = session
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
            disable=not terminal,
        )
        self.trials = self.progress.add_task("trials", total=all_planned(session), note="")
        self.epochs = self.progress.add_task("epochs", total=None, note="starting")

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.progress.stop()

    def say(self, slot: str, line: str) -> None:
        """Show a line of a slot, above the bars."""
        say(f"slot {slot} · {line}")

    def show(self, sight: Sight) -> None:
        """Show what is known of the study."""
        best = "" if sight.best is None else f"best {sight.best[1]:.3f} (trial {sight.best[0]})"
        ended = sum(sight.counts[state] for state in ENDED)
        total = sight.counts["budget"]
        self.progress.update(self.trials, completed=ended, total=total, note=best)
        done = [0 if row["epoch"] is None else row["epoch"] + 1 for row in sight.mine]
        speed = sum(row["speed"] or 0.0 for row in sight.mine)
        # A slot at the head rung trains no epochs and tells no speed.
        fast = f", {speed:.0f} samples/s" if speed else ""
        note = f"{len(done)} training here{fast}" if done else _idle(sight)
        total = len(done) * self.session.file.budget.epochs
        self.progress.update(self.epochs, completed=sum(done), total=total or None, note=note)


def _idle(sight: Sight) -> str:
    """What a machine waits for that trains nothing."""
    if sight.order.state != "run":
        return f"told to {sight.order.state}"
    if sight.waiting:
        return "nothing training here"
    return f"{sight.running} training elsewhere" if sight.running else ""
