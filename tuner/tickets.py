"""The queue of a study: tickets, who works on which, and what goes back into it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from optuna.trial import FrozenTrial, TrialState

from tuner.climbing import climb, early, ladder_lines
from tuner.ladder import rung_of
from tuner.ledger import Lease
from tuner.plain import shared_out
from tuner.rounds import confirm_lines, confirming, spare
from tuner.shares import COMPARES, Ticket, budget, presets
from tuner.study import PROGRESSIVE, distinct_grid

if TYPE_CHECKING:
    from tuner.session import Session

AHEAD = 256
MAX_BASELINES = 3
CALMER = 0.3
KIND = ("fidelity", "rung", "promoted_from", "unseen", "plain", "confirms", "fold")


def fill_queue(session: Session) -> int:
    """Put tickets for the trials of the budget that are due and not there yet; their number.

    First the plain cross-entropy baseline, then one published default per loss, then the grid
    or free tickets for the algorithm. The progressive strategy's tickets are due rung by rung.
    At most ``AHEAD`` wait at a time, and none are put while half as many do. Any number of
    workers may call it at once: the tickets are queued only if nobody queued any since the
    trials were read. When none is due before others have ended theirs, whoever asks gets one
    that is due later in any case.
    """
    while True:
        trials = session.trials()
        due = _due(session, trials)
        if not due or session.ledger.enqueue(due, len(trials)):
            return len(due)


def is_done(session: Session) -> bool:
    """Whether all trials have ended, and none is due."""
    trials = session.trials()
    return all(trial.state.is_finished() for trial in trials) and not _due(session, trials)


def _due(session: Session, trials: list[FrozenTrial]) -> list[Ticket]:
    waiting = sum(t.state == TrialState.WAITING for t in trials)
    # Many workers come together when the queue runs dry: it is filled once, not topped up by each.
    room = AHEAD - waiting if waiting <= AHEAD // 2 else 0
    due = list(_within_budget(session, trials, _missing(trials, _tickets(session))))
    if not due and session.file.ladder.confirms and _is_searched(trials):
        due = _missing(trials, confirming(session))
    if not due and not waiting and any(t.state == TrialState.RUNNING for t in trials):
        due = _missing(trials, _meanwhile(session, trials))[:1]
    return due[:room] + _another_baseline(session)


def _meanwhile(session: Session, trials: list[FrozenTrial]) -> Iterator[Ticket]:
    """Tickets that are due later whatever comes of the trials that run, and those before them."""
    yield _baseline(session)
    yield from early(session)
    if session.file.ladder.confirms:
        yield from spare(session, searched=_is_searched(trials))


def _missing(trials: list[FrozenTrial], tickets: Iterable[Ticket]) -> list[Ticket]:
    """The tickets that no trial is there for."""
    have = Counter(_kind(t.user_attrs) for t in trials if not beyond_budget(t))
    missing = []
    for params, attrs in tickets:
        have[_kind(attrs)] -= 1
        if have[_kind(attrs)] < 0:
            missing.append((params, attrs))
    return missing


def _within_budget(
    session: Session, trials: list[FrozenTrial], tickets: list[Ticket]
) -> Iterator[Ticket]:
    """As many of the tickets as their rungs have room for, the first ones.

    A larger budget may change what is promoted: what was trained until then counts all the same.
    """
    have = Counter(rung_of(t) for t in trials if not beyond_budget(t))
    searched = session.file.ladder.searched
    for params, attrs in tickets:
        rung = attrs.get("fidelity", "full")
        have[rung] += 1
        if rung not in searched or have[rung] <= budget(session.file, rung):
            yield params, attrs


def _is_searched(trials: list[FrozenTrial]) -> bool:
    """Whether every trial that looks for recipes has ended."""
    return all(t.state.is_finished() for t in trials if "confirms" not in t.user_attrs)


def _kind(attrs: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tickets are counted by: as many as there are of a kind are there already."""
    return tuple(attrs.get(key) for key in KIND)


def beyond_budget(trial: FrozenTrial) -> bool:
    """Whether a trial takes the place of another one that failed."""
    return "again" in trial.user_attrs or "retry_of" in trial.user_attrs


def retry_failed(session: Session) -> list[int]:
    """Queue every failed trial that was not yet queued again; the numbers of those that failed.

    A trial that ended stays as it is, in Optuna too: its parameters get a new trial, which does
    not count against the budget.
    """
    while True:
        trials = session.trials()
        again = {t.user_attrs.get("retry_of") for t in trials}
        failed = [t for t in trials if t.state == TrialState.FAIL and t.number not in again]
        if session.ledger.enqueue([_retry(trial) for trial in failed], len(trials)):
            return [trial.number for trial in failed]


def _retry(trial: FrozenTrial) -> Ticket:
    kept = ("baseline", "again", "preset", *COMPARES, *KIND)
    attrs = {key: trial.user_attrs[key] for key in kept if key in trial.user_attrs}
    params = trial.params or trial.system_attrs.get("fixed_params", {})
    return params, attrs | {"retry_of": trial.number}


def is_baseline_to_come(session: Session) -> bool:
    """Whether a baseline waits, runs, or is due because those before gave no result."""
    tried = (t for t in session.trials() if t.user_attrs.get("baseline"))
    return any(not t.state.is_finished() for t in tried) or bool(_another_baseline(session))


def _another_baseline(session: Session) -> list[Ticket]:
    """A further baseline, beyond the budget, while those there are ended without a result.

    Without a baseline there is no floor and no answer. Each further one learns more slowly,
    where the space leaves the learning rate open.
    """
    tried = [t for t in session.trials() if t.user_attrs.get("baseline")]
    ended = (TrialState.PRUNED, TrialState.FAIL)
    if not 0 < len(tried) < MAX_BASELINES or any(t.state not in ended for t in tried):
        return []
    params = session.file.space.defaults(**_plain_loss(session))
    rates = {key: value for key, value in params.items() if key.endswith(".lr")}
    calmer = {
        key: session.file.space.within(key, value * CALMER ** len(tried))
        for key, value in rates.items()
    }
    return [(params | calmer, {"baseline": True, "again": len(tried)})]


def _plain_loss(session: Session) -> dict[str, str]:
    """The part that makes a default ticket the baseline's, if the space has it."""
    offered = "cross_entropy" in session.file.space.parts["loss"]
    return {"loss": "cross_entropy"} if offered else {}


def _baseline(session: Session) -> Ticket:
    return session.file.space.defaults(**_plain_loss(session)), {"baseline": True}


def _tickets(session: Session) -> Iterator[Ticket]:
    file = session.file
    yield _baseline(session)
    if file.search.algorithm == "grid":
        yield from ((params, {}) for params in distinct_grid(file.space)[: file.trials() - 1])
    elif file.search.strategy == "progressive":
        yield from _progressive_tickets(session)
    elif file.ladder.searched == ("full",):
        yield from _full_tickets(session)
    else:
        yield from climb(session)


def _full_tickets(session: Session) -> Iterator[Ticket]:
    """One published default per loss, the rest free but for what plain cross-entropy is due."""
    room = session.file.trials() - 1
    made = list(presets(session.file))[:room]
    yield from made
    yield from shared_out(session, room - len(made))


def _progressive_tickets(session: Session) -> Iterator[Ticket]:
    """A quarter of the budget for every rung that is reached, its published default first."""
    file, space = session.file, session.file.space
    count, size = divmod(file.trials() - 1, len(PROGRESSIVE))
    for rung, loss in enumerate(PROGRESSIVE):
        if rung > 0 and not _climbs(session, rung - 1, count + (rung - 1 < size)):
            return
        natural = "natural" if "natural" in space.parts["sampler"] else "class_aware"
        names = {"loss": loss, "sampler": natural if rung < 3 else "class_aware"}
        open_ = {part: name for part, name in names.items() if len(space.parts[part]) > 1}
        for position in range(count + (rung < size)):
            # The baseline is the published default of the first rung already.
            first = position == 0 and rung > 0
            params = space.defaults(**names) if first else open_
            yield params, {"rung": rung, **({"preset": loss} if first else {})}


def _climbs(session: Session, rung: int, size: int) -> bool:
    """Whether the progressive strategy goes on after a rung: its trials ended below the gate."""
    own = [t for t in session.trials() if t.user_attrs.get("rung") == rung]
    if len(own) < size or any(not t.state.is_finished() for t in own):
        return False
    return _best_tail(session) < session.file.search.gate


def _best_tail(session: Session) -> float:
    kind = "adjusted" if session.file.objective.adjusted else "raw"
    tails = [
        t.user_attrs["metrics"][kind]["tail_accuracy"] or 0.0
        for t in session.trials(TrialState.COMPLETE)
        if "metrics" in t.user_attrs and session.keeps_floor(t)
    ]
    return max(tails, default=0.0)


def ladder_state(session: Session) -> list[str]:
    """Where the rungs or the progressive strategy stand, line by line; none in a plain search."""
    lines = confirm_lines(session) if session.file.ladder.confirms else []
    if session.file.ladder.searched != ("full",):
        return _why_not_climbed(session) + ladder_lines(session) + lines
    return _progressive_state(session) + lines


def _why_not_climbed(session: Session) -> list[str]:
    """That no rung begins without plain cross-entropy, where that gave no result."""
    tried = sum("baseline" in t.user_attrs for t in session.trials())
    if session.baseline() is not None or is_baseline_to_come(session) or not tried:
        return []
    return [
        f"plain cross-entropy gave no result in {tried} trials, and the ladder begins with it; "
        f"why: tuner trials {session.file.name}"
    ]


def _progressive_state(session: Session) -> list[str]:
    search = session.file.search
    if search.strategy != "progressive":
        return []
    rungs = {t.user_attrs["rung"] for t in session.trials() if "rung" in t.user_attrs}
    rung = max(rungs, default=0)
    passed = "reached" if _best_tail(session) >= search.gate else "not reached"
    return [
        f"progressive strategy: rung {rung + 1} of {len(PROGRESSIVE)} ({PROGRESSIVE[rung]}), "
        f"gate {search.gate:.2f} {passed}"
    ]


def next_lease(
    session: Session, worker: tuple[str, int], beside: Sequence[int] = ()
) -> Lease | None:
    """Claim the worker's own trial or the next ticket, queueing more when there are due ones.

    None when there is nothing to claim at this moment, or the fleet was told not to work.
    ``beside`` are tokens of leases that the worker knows it has.
    """
    lease = session.ledger.claim(worker, beside)
    if lease is None and session.ledger.order().state == "run":
        fill_queue(session)
        # Should another worker have filled it, there is something to claim as well.
        lease = session.ledger.claim(worker, beside)
    return lease
