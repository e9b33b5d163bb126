"""Tickets of a study that climbs the ladder: the cheapest rung first, then who is promoted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from optuna.trial import FrozenTrial

from tuner.entries import Fixed
from tuner.ladder import ACTING, Agreement, Rung, agreement, is_judged, rung_of
from tuner.plain import shared_out
from tuner.planned import at, everyone, is_planned, planned
from tuner.shares import (
    COMPARES,
    Ticket,
    attrs_of,
    budget,
    compared_first,
    comparing_presets,
    presets,
    promotions,
    room,
)

if TYPE_CHECKING:
    from tuner.session import Session

DECISIVE = {"baseline", *COMPARES}
"""What marks trials that are trained before it is decided whether to follow the rung below."""


def climb(session: Session) -> Iterator[Ticket]:
    """Tickets that are due after the baseline's, as far as that can be said by now.

    What a rung promotes is known once it is over; whether it is followed, once the recipes that
    compare the two rungs are trained: one default per loss, and half of those promoted.
    """
    if not _has_backbone(session):
        return
    ladder = session.file.ladder
    for rung in ladder.searched:
        below = ladder.below(rung)
        yield from _first(session, rung) if below is None else _above(session, rung, below)
        if not is_over(session, rung):
            return


def _has_backbone(session: Session) -> bool:
    """Whether the baseline, whose network the rungs below build on, came to its end."""
    return session.baseline() is not None


def is_over(session: Session, rung: Rung) -> bool:
    """Whether all trials of a rung have ended, those too that are tried again."""
    own, most = everyone(session, rung), planned(session, rung)
    return sum(map(is_planned, own)) >= most and all(t.state.is_finished() for t in own)


def early(session: Session) -> list[Ticket]:
    """Trials of the full rung that are due whatever the rungs below find: the losses' defaults.

    They keep a worker busy that would wait for others to end a rung or the baseline.
    """
    ladder = session.file.ladder
    climbs = ladder.last == "full" and ladder.below("full") is not None
    return comparing_presets(session.file, "full") if climbs else []


def _first(session: Session, rung: Rung) -> Iterator[Ticket]:
    open_ = planned(session, rung) - (rung == "full")
    made = list(presets(session.file, rung))[:open_]
    yield from made
    yield from (({}, attrs_of(rung)) for _ in range(open_ - len(made)))


def _above(session: Session, rung: Rung, below: Rung) -> Iterator[Ticket]:
    """What the rung below promotes, one default per loss, and the algorithm's own."""
    ladder, most = session.file.ladder, room(session.file, rung)
    count, defaults = promotions(session.file, rung), comparing_presets(session.file, rung)
    chosen = promoted(session, below, count, apart=_preset_digests(session, rung, defaults))
    half = compared_first(session.file, rung)
    first = [_promotion(session, trial, rung) for trial in chosen[:half]]
    first = [(params, attrs | COMPARES) for params, attrs in first] + defaults
    yield from first
    if not _have_ended(session, rung, first):
        return
    more: list[Ticket] = []
    if not compared(session, below, rung, decisive=True).is_low(ladder.trust):
        unseen = round(ladder.unseen * most) if rung == "full" and _has_unseen(session) else 0
        best = promoted(session, below, count) if unseen else []
        others = [_promotion(session, trial, rung) for trial in chosen[half:]]
        more = _open(session, best, count - len(chosen[:half]) + unseen) if best else others
    more = more[: most - len(first)]
    yield from more
    left = most - len(first) - len(more)
    yield from shared_out(session, left) if rung == "full" else [({}, attrs_of(rung))] * left


def _have_ended(session: Session, rung: Rung, tickets: Sequence[Ticket]) -> bool:
    """Whether the trials of tickets have ended, and none of them is tried again."""
    own = everyone(session, rung)
    ended = {_origin(t.user_attrs) for t in own if t.state.is_finished()}
    ended -= {_origin(t.user_attrs) for t in own if not t.state.is_finished()}
    return all(_origin(attrs) in ended for _, attrs in tickets)


def _origin(attrs: Mapping[str, Any]) -> tuple[Any, ...]:
    """What recipe a ticket of the rung above is for: a promoted one, or a loss's default."""
    return attrs.get("promoted_from"), attrs.get("unseen"), attrs.get("preset")


def promoted(
    session: Session, rung: Rung, count: int, apart: Collection[str] = ()
) -> list[FrozenTrial]:
    """The best trials of a rung, of different recipes; a third at most of one loss and sampler.

    With fewer kinds than that allows, the best of the others fill up. Recipes ``apart`` are given
    by their digests at this rung.
    """
    ranked = session.ranked(everyone(session, rung))
    most, kinds, digests = max(1, -(-count // 3)), Counter[Any](), set(apart)
    chosen: list[FrozenTrial] = []
    spare: list[FrozenTrial] = []
    for trial in ranked:
        attrs = trial.user_attrs
        if attrs["digest"] in digests:
            continue
        digests.add(attrs["digest"])
        kind = (attrs["loss"], attrs["sampler"])
        kinds[kind] += 1
        (chosen if kinds[kind] <= most else spare).append(trial)
    return session.ranked((chosen + spare)[:count])


def _preset_digests(session: Session, rung: Rung, made: Sequence[Ticket]) -> set[str]:
    """Digests, at the rung below, of recipes that are trained at ``rung`` without a promotion."""
    below = session.file.ladder.below(rung)
    assert below is not None
    names = {attrs["preset"] for _, attrs in made}
    if rung == "full" and session.file.baseline_is_default:
        names.add("cross_entropy")
    own = (t.user_attrs for t in everyone(session, below) if t.user_attrs.get("preset") in names)
    return {attrs["digest"] for attrs in own if "digest" in attrs}


def _promotion(session: Session, trial: FrozenTrial, rung: Rung) -> Ticket:
    """The same loss and sampler, with everything else at its published default."""
    space, known = session.file.space_at(rung), _known(session, trial, rung)
    names = {part: value for part, value in known.items() if "." not in part}
    return {**space.defaults(**names), **known}, {**attrs_of(rung), "promoted_from": trial.number}


def _known(session: Session, trial: FrozenTrial, rung: Rung) -> dict[str, Any]:
    """What a trial says of a recipe: loss, sampler, and that they act late, if it can be said."""
    found = {key: v for key, v in trial.params.items() if key.partition(".")[0] in ACTING}
    trainings = session.file.space_at(rung).parts["training"]
    if rung_of(trial) != "deferred" or "deferred" not in trainings:
        return found
    if len(trainings) > 1:
        found["training"] = "deferred"
    if not isinstance(trainings["deferred"].get("switch", Fixed(None)), Fixed):
        path = "training.deferred.switch"
        found[path] = session.file.space.within(path, session.file.ladder.deferred.switch)
    return found


def _open(session: Session, chosen: list[FrozenTrial], count: int) -> list[Ticket]:
    """Promoted recipes in turn, with everything open that the rung below could not see."""
    return [
        (_known(session, t, "full"), {"promoted_from": t.number, "unseen": True})
        for t in (chosen[i % len(chosen)] for i in range(count))
    ]


def _has_unseen(session: Session) -> bool:
    """Whether the full rung searches what the rung below cannot see."""
    return bool(set(session.file.space.rows()) - set(_seen_rows(session)))


def _seen_rows(session: Session) -> list[tuple[str, str]]:
    ladder = session.file.ladder
    below = ladder.below("full")
    return [] if below is None else session.file.space_at(below).rows()


def twins(
    session: Session, lower: Rung, upper: Rung, *, decisive: bool = False
) -> list[tuple[FrozenTrial, FrozenTrial]]:
    """Trials of two rungs that were trained to their end with one loss and sampler.

    These are the promoted ones and the defaults of each loss; that of cross-entropy may be the
    baseline. What acts late at both rungs is one and the same training, and says nothing of how
    they rank; nor does a copy. ``decisive`` leaves those out that came after the decision to
    follow.
    """
    ended, baselines = session.ended(), session.file.baseline_is_default
    lowest = (t for t in ended.given[lower] if "preset" in t.user_attrs)
    defaults = {t.user_attrs["preset"]: t for t in lowest}
    found, seen = [], set[str]()
    for trial in ended.given[upper]:
        attrs = trial.user_attrs
        early = not decisive or DECISIVE & attrs.keys()
        if {"unseen", "again"} & attrs.keys() or not early:
            continue
        is_default = baselines and attrs.get("baseline")
        loss = "cross_entropy" if is_default else attrs.get("preset", "")
        twin = ended.known.get(attrs.get("promoted_from", -1)) or defaults.get(loss)
        recipe = attrs.get("digest", str(trial.number))
        if twin is None or recipe in seen or _is_same_training(twin, trial):
            continue
        seen.add(recipe)
        found.append((twin, trial))
    return found


def _is_same_training(lower: FrozenTrial, upper: FrozenTrial) -> bool:
    """Whether two rungs trained a recipe alike; the head rung trains no recipe as full does."""
    if rung_of(lower) != "deferred":
        return False
    return bool(lower.user_attrs["digest"] == upper.user_attrs["digest"])


def compared(session: Session, lower: Rung, upper: Rung, *, decisive: bool = False) -> Agreement:
    """How two rungs rank the recipes that were trained to their end on both: see ``twins``."""
    pairs = twins(session, lower, upper, decisive=decisive)
    return agreement(lower, upper, [(a.values[0], b.values[0]) for a, b in pairs])


def is_undecided(session: Session, upper: Rung) -> bool:
    """Whether a rung has no trials yet but those that compare it with the one below."""
    return all(DECISIVE & trial.user_attrs.keys() for trial in at(session, upper))


def _followed(session: Session, lower: Rung, upper: Rung, now: Agreement) -> str:
    """What was decided about the rung below, where the correlation ``now`` does not show it."""
    ladder, then = session.file.ladder, compared(session, lower, upper, decisive=True)
    if then.is_low(ladder.trust):
        return ", too low to follow"
    if not now.is_low(ladder.trust) or is_undecided(session, upper):
        return ""
    if then.correlation is None:
        recipes = "1 recipe" if len(then.pairs) == 1 else f"{len(then.pairs)} recipes"
        return f"; followed, as {recipes} were too few or too alike to say before"
    return f"; followed, as it was {then.correlation:.2f} before"


def ladder_lines(session: Session) -> list[str]:
    """Where each rung stands, how it ranks beside the one below, and whether that is followed."""
    ladder, lines = session.file.ladder, []
    for rung in ladder.searched:
        own = at(session, rung)
        ended = sum(t.state.is_finished() for t in own)
        most = planned(session, rung)
        fewer = ", as many as its share of the time allows" * (most < budget(session.file, rung))
        lines.append(f"{rung} {ended} of {most} trials{fewer}")
        below = ladder.below(rung)
        if below is not None and any(map(is_judged, own)):
            found = compared(session, below, rung)
            lines.append(f"{found}{_followed(session, below, rung, found)}")
    return lines
