"""The confirm rung seed by seed: which recipes go on, what is due, and which is the answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from optuna.trial import FrozenTrial

from tuner.confirm import Standing, entrants, plain_of, ranked, tuned_with
from tuner.shares import Ticket

if TYPE_CHECKING:
    from tuner.session import Session


def rounds(session: Session, found: Sequence[Standing]) -> Iterator[list[Standing]]:
    """The recipes that are trained with each seed, plain cross-entropy beside them, so far.

    After each seed only the best go on (see ``ConfirmRung``), and none that failed. That depends
    on nothing but what was trained with the seeds until then, so everybody finds the same, in
    whatever order results came. Plain cross-entropy gets every seed: it is what the answer is
    compared with.
    """
    settings, plain = session.file.ladder.confirm, plain_of(found)
    going = [each for each in found if each.role == "recipe"]
    beside = [each for each in found if each.role != "recipe"]
    for seeds in range(1, settings.seeds + 1):
        yield sorted(going + beside, key=lambda each: each.trial.number)
        needed = going if plain is None else [*going, plain]
        if any(seeds - 1 not in each.ended for each in needed):
            return
        so_far = [each.up_to(seeds) for each in going if each.runs.keys() >= set(range(seeds))]
        floor = None if plain is None else plain.up_to(seeds)
        best = ranked(session, so_far, floor)[: settings.going_on(len(going))]
        numbers = {each.trial.number for each in best}
        going = [each for each in going if each.trial.number in numbers]


def confirming(session: Session) -> Iterator[Ticket]:
    """The rung's tickets that are due, seed by seed."""
    for index, each in _planned(session, entrants(session)):
        yield _ticket(each, index)


def spare(session: Session, *, searched: bool) -> Iterator[Ticket]:
    """Trainings of plain cross-entropy, due whoever goes on: for workers that would wait.

    Which one the search tuned best is known once all is ``searched``.
    """
    roles = ("plain", "tuned") if searched else ("plain",)
    found = [each for each in entrants(session) if each.role in roles]
    for index in range(session.file.ladder.confirm.seeds):
        yield from (_ticket(each, index) for each in found)


def _planned(session: Session, found: Sequence[Standing]) -> Iterator[tuple[int, Standing]]:
    for index, going in enumerate(rounds(session, found)):
        yield from ((index, each) for each in going)


def _ticket(each: Standing, index: int) -> Ticket:
    trial = each.trial
    return trial.params, {"fidelity": "confirm", "confirms": trial.number, "fold": index}


def is_decided(session: Session) -> bool:
    """Whether the rung is over: all recipes were trained with all their seeds, or failed to."""
    return session.file.ladder.confirms and _is_over(session, entrants(session))


def _is_over(session: Session, found: Sequence[Standing]) -> bool:
    return bool(found) and all(index in each.ended for index, each in _planned(session, found))


def winner(session: Session) -> FrozenTrial | None:
    """The trial of the search whose recipe the rung confirmed as the best; None until it is over.

    A recipe that failed with one of the seeds is not the answer; None too when all did.
    """
    found = answer(session)
    return None if found is None else found.trial


def answer(session: Session) -> Standing | None:
    """The recipe that ``winner`` is a trial of, with its trainings."""
    found = entrants(session) if session.file.ladder.confirms else []
    if not _is_over(session, found):
        return None
    first = ranked(session, found, plain_of(found))[0]
    return first if len(first.runs) == session.file.ladder.confirm.seeds else None


def best_value(session: Session) -> str | None:
    """What the best trial has, in words: where it was confirmed, the mean over fresh seeds first.

    None without a complete trial.
    """
    best, found = session.best(), answer(session)
    if best is None or found is None:
        return None if best is None else f"{best.values[0]:.4f}"
    fresh = found.objective().values()
    return (
        f"{fmean(fresh):.4f} with {len(fresh)} fresh seeds ({found.trial.values[0]:.4f} in the "
        "search)"
    )


def dropped(session: Session) -> dict[int, list[int]]:
    """Trials of the search whose recipes get no further seed, by the number of seeds they had."""
    found = entrants(session)
    last = {each.trial.number: 0 for each in found}
    for index, going in enumerate(rounds(session, found)):
        last |= {each.trial.number: index + 1 for each in going}
    most = max(last.values(), default=0)
    by_seeds: dict[int, list[int]] = {}
    for number, seeds in sorted(last.items()):
        if seeds < most:
            by_seeds.setdefault(seeds, []).append(number)
    return dict(sorted(by_seeds.items()))


def confirm_lines(session: Session) -> list[str]:
    """How far the rung is, and what it says of its best recipe once it is over."""
    own = [t for t in session.trials() if "confirms" in t.user_attrs]
    own = [t for t in own if "retry_of" not in t.user_attrs]
    ended, over = sum(t.state.is_finished() for t in own), is_decided(session)
    settings, (plain, trials) = session.file.ladder.confirm, tuned_with(session)
    lines = [f"plain cross-entropy was tuned with {plain} of {trials} trials"] if trials else []
    lines += [f"confirm {ended} of {len(own) if over else f'at most {settings.most()}'} trials"]
    lines += [
        f"{named(numbers)} dropped after {seeds} of {settings.seeds} seeds"
        for seeds, numbers in dropped(session).items()
    ]
    first = answer(session)
    if first is not None:
        values = list(first.objective().values())
        fresh = f"{fmean(values):.4f} ± {stdev(values):.4f}"
        lines.append(
            f"trial {first.trial.number}: {fresh} with {len(values)} fresh seeds, "
            f"{first.trial.values[0]:.4f} in the search"
        )
    return lines


def named(numbers: Sequence[int]) -> str:
    """Trials by their numbers, in words."""
    return f"trial{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
