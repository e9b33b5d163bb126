"""What a person sees while trials run: progress bars on a terminal, lines elsewhere."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from optuna.trial import Trial
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tuner.datasets import Data
from tuner.evaluation import certainty
from tuner.imbalance import imbalance_ratio
from tuner.ladder import RUNGS
from tuner.planned import all_planned
from tuner.rungs.outcome import Outcome
from tuner.session import Session
from tuner.space import Space
from tuner.trainer import EpochResult
from tuner.worker import progress

STOPPED_BY = {
    "gpu_hours": "its limit budget.gpu_hours",
    "hours": "its limit budget.hours",
    "target": "its goal budget.target",
    "plateau": "its goal budget.plateau",
    "code_error": "the same error three times in a row",
}

LEFT = ("interrupted", "lost")
"""How a trial leaves a worker without having ended."""

log = logging.getLogger(__name__)


def describe_data(data: Data) -> list[str]:
    """The data in a few lines: size, imbalance, groups, and every warning."""
    counts = data.class_counts
    groups = data.groups.named()
    sizes = ", ".join(f"{len(classes)} {name}" for name, classes in groups.items() if classes)
    return [
        f"data {data.name}: {data.num_classes} classes ({sizes}), {int(counts.sum())} training, "
        f"{len(data.validation)} validation and {data.test_images or 'no'} test images, "
        f"{int(counts.min())} to {int(counts.max())} per class in training{_by_size(data)}, "
        f"imbalance ratio {imbalance_ratio(counts):.1f}",
        *(f"note: {warning}" for warning in (*data.warnings, *certainty(data))),
    ]


def _by_size(data: Data) -> str:
    """What classes are head and tail by, where validation took images out of it."""
    counts = data.pool_counts
    if not data.carved:
        return ""
    return f" ({int(counts.min())} to {int(counts.max())} with validation, as data.tail counts)"


def describe_steps(space: Space, images: int) -> str:
    """The budget of a trial in optimizer steps; from fewest to most if batch sizes differ."""
    fewest, most = space.steps(images)
    total, each = (
        f"{low}" if low == high else f"{low} to {high}"
        for low, high in ((fewest, most), (fewest // space.epochs, most // space.epochs))
    )
    return f"a trial has {total} optimizer steps: {each} in each of its epochs, for every sampler"


class Display:
    """Two progress bars (trials, epochs) on a terminal; one line per trial elsewhere.

    Trials of the head rung, which come by the hundred, have one line per cohort on both.
    """

    def __init__(self, session: Session, *, terminal: bool) -> None:
        self.session, self.terminal = session, terminal
        self.best: float | None = None
        self.ended = 0
        self.at_hand: dict[int, int] = {}
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
            disable=not terminal,
        )
        self.trials = self.bars.add_task("trials", total=all_planned(session), note="")
        self.epochs = self.bars.add_task("epochs", total=session.file.budget.epochs, note="")

    def __enter__(self) -> Display:
        counts = progress(self.session)
        self.ended = counts["complete"] + counts["pruned"] + counts["fail"]
        self._show_best()
        self.bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bars.stop()

    def epoch(self, trial: Trial, result: EpochResult, value: float) -> None:
        """Show one epoch of a trial."""
        self.at_hand[trial.number] = result.epoch + 1
        note = f"trial {trial.number} {trial.user_attrs.get('loss', '')} {value:.3f}"
        if len(self.at_hand) > 1:
            note += f", {len(self.at_hand)} side by side"
        done, total = (
            sum(self.at_hand.values()),
            len(self.at_hand) * self.session.file.budget.epochs,
        )
        self.bars.update(self.epochs, completed=done, total=total, note=note)
        log.debug(
            "trial %d epoch %d loss %.4f %s %.4f %.0f samples/s",
            trial.number,
            result.epoch,
            result.train_loss,
            self.session.file.objective.metric,
            value,
            result.samples / result.seconds,
        )

    def trial(self, outcome: Outcome) -> None:
        """Show how a trial ended."""
        self.at_hand.pop(outcome.number, None)
        self.ended += outcome.state != "interrupted"
        self._show_best()
        if self.terminal:
            if outcome.state == "failed":
                self.bars.console.print(f"trial {outcome.number} failed: {outcome.reason}")
            return
        log.info("trial %d/%d %s", outcome.number, all_planned(self.session) - 1, describe(outcome))

    def cohort(self, outcomes: Sequence[Outcome], seconds: float) -> None:
        """Show how trials ended that were trained together."""
        self.ended += sum(outcome.state not in LEFT for outcome in outcomes)
        self._show_best()
        self.bars.update(self.epochs, completed=0, note="head rung: no epochs")
        line = describe_cohort(self.session, outcomes, seconds)
        if self.terminal:
            self.bars.console.print(line, markup=False, highlight=False)
        else:
            log.info("%s", line)

    def _show_best(self) -> None:
        best = self.session.best()
        note = "" if best is None else f"best {best.value:.3f} (trial {best.number})"
        total = all_planned(self.session)
        self.bars.update(self.trials, completed=self.ended, total=total, note=note)


def describe(outcome: Outcome) -> str:
    """How a trial ended, in a few words.

    At the end of a rung below the last one it is pruned for Optuna, but done for people.
    """
    value = "" if outcome.value is None else f" {outcome.value:.4f}"
    if outcome.reason in RUNGS:
        return f"done{value} ({outcome.reason} rung)"
    reason = "" if outcome.reason is None else f" ({outcome.reason.replace('_', ' ')})"
    return f"{outcome.state}{value}{reason}"


def describe_cohort(session: Session, outcomes: Sequence[Outcome], seconds: float) -> str:
    """How many trials of the head rung ended together, the rung's best so far, the speed."""
    states = Counter(o.reason if o.reason == "not_finite" else o.state for o in outcomes)
    ended = len(outcomes) - states["interrupted"] - states["lost"]
    rest = [f"{states[s]} {s.replace('_', ' ')}" for s in ("not_finite", *LEFT) if states[s]]
    apart = f" ({', '.join(rest)})" if rest else ""
    best = session.ended().of_rung["head"].best
    parts = [
        f"head rung · {ended} trials{apart}",
        "" if best is None else f"best so far {best.values[0]:.4f} (trial {best.number})",
        f"{60 * ended / max(seconds, 1e-9):.0f} trials/min",
    ]
    return " · ".join(filter(None, parts))


def percent(value: float | None, interval: Any = None) -> str:
    """A share as percent, with its interval if there is one."""
    if value is None:
        return "–"
    text = f"{100 * value:.1f}"
    return (
        text if interval is None else f"{text} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
    )


def wide_console() -> Console:
    """A console for wide tables: what is no terminal does not cut them to 80 columns."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, 160))
