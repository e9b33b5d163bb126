"""The first lines of a report: what was searched for, and the verdict."""

from __future__ import annotations

from collections.abc import Iterator

from tuner.confirmation import ONE_TRAINING_EACH
from tuner.report.data import ConfirmedData, OverviewData, VerdictData, VerdictRow
from tuner.report.markup import Html, element, table
from tuner.report.words import amount, capital, count, difference, estimate, label, p_value, size


def lead(
    overview: OverviewData, verdict: VerdictData | None, confirmed: ConfirmedData | None
) -> Iterator[Html]:
    """The answer first; what is missing is said where it would stand."""
    yield element("p", _goal(overview), " ", _progress(overview), class_="soft")
    yield element("h2", "Verdict")
    if verdict is None:
        yield element("p", _why_no_verdict(overview), class_="note")
        return
    yield element("p", *_headline(verdict), class_="lead")
    yield from (element("p", note, class_="note") for note in _cautions(verdict, confirmed))
    where = f"{count(verdict.images, 'image')} of the {verdict.part} part"
    how = f", the best recipe with logit adjustment τ = {verdict.tau:.2f}" if verdict.tau else ""
    yield table(
        f"Both models on the same {where}{how}; in brackets, 95 % intervals. The p-values, unlike "
        "the intervals, are corrected for several metrics; a difference counts where both show it.",
        ["", "plain cross-entropy", "best recipe", "difference", "p-value"],
        [_verdict_row(row, verdict.part) for row in verdict.rows],
    )
    yield from _free_gain(verdict)
    yield from _optimism(verdict)


def _goal(overview: OverviewData) -> str:
    how = "after logit adjustment" if overview.adjusted else "without adjustment"
    text = f"Searched for the best {label(overview.metric)} on validation, {how}"
    floor = overview.floor
    if floor is None:
        return f"{text}."
    name = label(floor.metric)
    if floor.plain is None or floor.bound is None:
        drop = size(floor.metric, floor.drop)
        return f"{text}, while {name} stays within {drop} of plain cross-entropy."
    plain, bound = amount(floor.metric, floor.plain), amount(floor.metric, floor.bound)
    side = "above" if floor.bound <= floor.plain else "below"
    return f"{text}, while {name} stays at {bound} or {side}; plain cross-entropy has {plain}."


def _progress(overview: OverviewData) -> str:
    states = ", ".join(f"{number} {state}" for state, number in sorted(overview.states.items()))
    planned = f"{count(overview.budget, 'trial')} planned"
    if not overview.below:
        return f"{planned}; {states or 'none started yet'}."
    first = " and ".join(
        f"{count(number, 'trial')} of the {rung} rung" for rung, number in overview.below.items()
    )
    where = f"{planned} at the {overview.last} rung"
    return f"{where}; {states or 'none started yet'}. Before them, {first} ended."


def _why_no_verdict(overview: OverviewData) -> str:
    if overview.best is None:
        return "No trial is complete yet, so there is nothing to compare."
    return (
        f"Not decided yet: the best trial so far, number {overview.best.number}, has not been "
        "compared with plain cross-entropy. tuner run does so once all trials are done; after "
        f"other workers, do it where the data are: tuner export {overview.name} -o best"
    )


def _headline(verdict: VerdictData) -> Iterator[object]:
    """The objective and the overall accuracy first, then whatever became worse."""
    if verdict.best == verdict.baseline:
        but = " What differs is the logit adjustment alone." if verdict.tau else ""
        yield f"The search found no training better than plain cross-entropy.{but} "
    first = [r for name in (verdict.metric, "accuracy") for r in verdict.rows if r.metric == name]
    worse = [r for r in verdict.rows if r.difference and r.difference.outcome == "worse"]
    for row in dict.fromkeys(first + worse):
        yield f"{capital(label(row.metric))}: "
        yield _difference(row, verdict.part)
        yield ". "


def _difference(row: VerdictRow, part: str) -> Html:
    outcome = row.difference.outcome if row.difference else None
    return element("span", difference(row.metric, row.difference, part), class_=outcome)


def _verdict_row(row: VerdictRow, part: str) -> list[object]:
    plain, best = (_number(estimate(row.metric, found)) for found in (row.baseline, row.best))
    told, chance = _difference(row, part), _number(p_value(row.difference))
    return [capital(label(row.metric)), plain, best, told, chance]


def _number(text: str) -> Html:
    """A number that stays on one line with what belongs to it."""
    return element("span", text, class_="number") if text else Html("")


def _cautions(verdict: VerdictData, confirmed: ConfirmedData | None) -> Iterator[str]:
    told = verdict.rows[0].difference
    rivals = () if confirmed is None else confirmed.rivals
    if verdict.baseline in rivals and told is not None and told.outcome != "unclear":
        yield ONE_TRAINING_EACH
    if verdict.part == "validation":
        yield (
            "The data have no test part. These are the images the search chose by, so the best "
            "recipe looks better here than it will on new images."
        )
    if verdict.newer_best is not None:
        yield (
            f"Trial {verdict.newer_best} is better on validation than trial {verdict.best}, "
            "which is compared here; the comparison with it is still to come."
        )


def _free_gain(verdict: VerdictData) -> Iterator[Html]:
    """What logit adjustment alone gives, so that the search is not praised for it."""
    gains = [
        f"{amount(row.metric, row.adjusted.value)} {label(row.metric)}"
        for row in verdict.rows
        if row.adjusted and row.metric in (verdict.metric, "accuracy")
    ]
    if gains and verdict.plain_tau is not None:
        yield element(
            "p",
            "Adjusting the logits of plain cross-entropy after training, "
            f"τ = {verdict.plain_tau:.2f}, needs no search and gives {' and '.join(gains)}.",
            class_="soft",
        )


def _optimism(verdict: VerdictData) -> Iterator[Html]:
    found, held = verdict.validation_value, verdict.test_value
    if verdict.part == "test" and found is not None and held is not None:
        name = label(verdict.metric)
        yield element(
            "p",
            f"The search measured a {name} of {amount(verdict.metric, found)} on validation; on "
            f"images it never saw, the same recipe has {amount(verdict.metric, held)}.",
            class_="soft",
        )
