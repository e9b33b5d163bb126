"""The rungs of a study: what each cost and held fixed, and how two of them rank recipes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from optuna.trial import FrozenTrial

from tuner.climbing import compared, is_undecided, twins
from tuner.held import held_rows, how_held
from tuner.ladder import Agreement, Rung, is_judged, rung_of
from tuner.planned import at, planned
from tuner.report.data._answer import Estimate
from tuner.report.data._moment import loss_of, number, still

if TYPE_CHECKING:
    from tuner.session import Session

Decision = Literal["open", "followed", "not followed"]


@dataclass(frozen=True)
class RungRow:
    """A rung: its trials that ended, of how many planned, what they cost, what it held fixed.

    ``judged`` were trained to the end of the rung, ``promoted`` trained again further up (None
    at the last rung). ``seconds`` of training are in total, of all tries, None when not known;
    ``per_trial`` is over the trials that were trained. The ``baseline`` of a study without the
    full rung has a row of its own.
    """

    rung: Rung | Literal["baseline"]
    ended: int
    planned: int
    judged: int
    promoted: int | None
    seconds: float | None
    per_trial: float | None
    why_held: str
    held: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Twin:
    """A recipe that was trained to its end on two rungs, with its objective on both."""

    lower_trial: int
    upper_trial: int
    lower: float
    upper: float
    loss: str
    sampler: str


@dataclass(frozen=True)
class Comparison:
    """How two rungs rank the recipes trained on both; Spearman's correlation where it is defined.

    ``decided`` is the correlation over the ``deciders`` that were there when the study had to
    follow the lower rung or not.
    """

    lower: Rung
    upper: Rung
    twins: tuple[Twin, ...]
    correlation: Estimate | None
    decided: Estimate | None
    deciders: int
    trust: float
    decision: Decision


@dataclass(frozen=True)
class LadderData:
    """The rungs of a study, the cheapest first, and the comparisons of neighbours.

    ``last`` is the one whose recipes can be the answer.
    """

    metric: str
    last: Rung
    rows: tuple[RungRow, ...]
    comparisons: tuple[Comparison, ...]


def ladder_data(session: Session) -> LadderData | None:
    """What each rung did, and whether they agree; None in a study with one rung."""
    session = still(session)
    ladder = session.file.ladder
    if len(ladder.rungs) < 2:
        return None
    spent = _spent(session)
    rows = [_row(session, rung, spent) for rung in ladder.rungs]
    if ladder.last != "full":
        rows.insert(0, _baseline_row(session, spent))
    return LadderData(
        metric=session.file.objective.metric,
        last=ladder.last,
        rows=tuple(rows),
        comparisons=tuple(
            _comparison(session, lower, upper)
            for lower, upper in zip(ladder.searched, ladder.searched[1:], strict=False)
        ),
    )


def _row(session: Session, rung: Rung, spent: dict[int, float]) -> RungRow:
    file, own = session.file, at(session, rung)
    tries = [trial for trial in session.trials() if rung_of(trial) == rung]
    above = "confirms" if rung == file.ladder.last else "promoted_from"
    sources = {t.user_attrs.get(above) for t in session.trials()}
    seconds, per_trial = _cost(tries, spent)
    return RungRow(
        rung=rung,
        ended=sum(trial.state.is_finished() for trial in own),
        planned=planned(session, rung),
        judged=sum(map(is_judged, own)),
        promoted=None if rung == file.ladder.rungs[-1] else sum(t.number in sources for t in own),
        seconds=seconds,
        per_trial=per_trial,
        why_held=how_held(file, rung),
        held=tuple(held_rows(file, rung)),
    )


def _baseline_row(session: Session, spent: dict[int, float]) -> RungRow:
    own = [trial for trial in session.trials() if trial.user_attrs.get("baseline")]
    ended, judged = sum(t.state.is_finished() for t in own), sum(map(is_judged, own))
    seconds, per_trial = _cost(own, spent)
    why = "everything: it is plain cross-entropy, trained in full"
    return RungRow("baseline", ended, 1, judged, None, seconds, per_trial, why, ())


def _cost(trials: Sequence[FrozenTrial], spent: dict[int, float]) -> tuple[float | None, ...]:
    known = [spent[trial.number] for trial in trials if spent.get(trial.number)]
    return (sum(known), sum(known) / len(known)) if known else (None, None)


def _spent(session: Session) -> dict[int, float]:
    """Training seconds of trials by number; trials trained together note their share."""
    noted = {t.number: number(t.user_attrs.get("seconds")) for t in session.trials()}
    return {trial: seconds for trial, seconds in noted.items() if seconds is not None}


def _comparison(session: Session, lower: Rung, upper: Rung) -> Comparison:
    trust = session.file.ladder.trust
    found = compared(session, lower, upper)
    decisive = compared(session, lower, upper, decisive=True)
    return Comparison(
        lower=lower,
        upper=upper,
        twins=tuple(_twin(*pair) for pair in twins(session, lower, upper)),
        correlation=_estimate(found),
        decided=_estimate(decisive),
        deciders=len(decisive.pairs),
        trust=trust,
        decision=_decision(session, upper, low=decisive.is_low(trust)),
    )


def _estimate(found: Agreement) -> Estimate | None:
    if found.correlation is None or found.interval is None:
        return None
    return Estimate(found.correlation, found.interval.low, found.interval.high)


def _decision(session: Session, upper: Rung, *, low: bool) -> Decision:
    """It is made once there are other tickets than those of the trials that compare."""
    if is_undecided(session, upper):
        return "open"
    return "not followed" if low else "followed"


def _twin(lower: FrozenTrial, upper: FrozenTrial) -> Twin:
    sampler = str(upper.user_attrs.get("sampler", "unknown"))
    values = lower.values[0], upper.values[0]
    return Twin(lower.number, upper.number, *values, loss_of(upper), sampler)
