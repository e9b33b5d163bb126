"""The ladder in a report: what each rung did, and whether two rungs agree on recipes."""

from __future__ import annotations

from collections.abc import Iterator

from tuner.report.data import Comparison, Estimate, LadderData, RungRow
from tuner.report.markup import Html, element, plot, table
from tuner.report.words import count, duration

HEADS = ("rung", "trials that ended", "promoted", "training in total", "per trial", "held fixed")


def climb(ladder: LadderData | None) -> Iterator[Html]:
    """The section of a study that has several rungs; nothing for others."""
    if ladder is None:
        return
    yield element("h2", "Ladder")
    yield table(
        f"From the cheapest rung up. The best recipe is one of the {ladder.last} rung. The time "
        "leaves out what is made once for all trials of a rung, such as the backbone's features.",
        HEADS,
        [_row(row) for row in ladder.rows],
    )
    held = [(row.rung, row.held) for row in ladder.rows if row.held]
    for rung, values in held:
        rows = table(f"Searched by the study, the same for all of the {rung} rung.", *_held(values))
        yield element("details", element("summary", f"What the {rung} rung held fixed"), rows)
    for comparison in ladder.comparisons:
        yield from _comparison(ladder.metric, comparison)


def _held(values: tuple[tuple[str, str], ...]) -> tuple[list[str], tuple[tuple[str, str], ...]]:
    return ["setting", "value"], values


def _row(row: RungRow) -> list[object]:
    short = row.ended - row.judged
    trials = f"{row.ended:,} of {row.planned:,}"
    if short:
        trials += f" ({short:,} not to the end)"
    promoted = "–" if row.promoted is None else f"{row.promoted:,}"
    # In a narrow column a time would be broken within its word.
    times = (
        element("span", _time(seconds), class_="number") for seconds in (row.seconds, row.per_trial)
    )
    name = element("span", row.rung, class_="number")
    return [name, trials, promoted, *times, row.why_held]


def _time(seconds: float | None) -> str:
    """A time that may be long or far below a second."""
    if seconds is None:
        return "not known"
    if seconds >= 10:
        return duration(seconds)
    return f"{seconds:.2g} seconds" if seconds >= 0.1 else f"{1000 * seconds:.2g} ms"


def _comparison(metric: str, found: Comparison) -> Iterator[Html]:
    from tuner.report.figures import agreement_figure

    class_ = "note" if found.decision == "not followed" else None
    yield element("p", agreement(found), class_=class_)
    if found.twins:
        hint = "Each point is a recipe trained on both; ranks count, not the distance to a line."
        name = f"agreement_{found.lower}_{found.upper}"
        yield plot(name, agreement_figure(found, metric), hint)


def agreement(found: Comparison) -> str:
    """What can be said of two rungs, and what the study did about it."""
    return f"{_ranks(found)} {_decision(found)}".strip()


def _ranks(found: Comparison) -> str:
    recipes = f"{count(len(found.twins), 'recipe')} trained to the end on both"
    rungs = f"the {found.lower} and the {found.upper} rung"
    if found.correlation is None:
        return f"How {rungs} rank recipes is not known: there are {recipes}, too few or too alike."
    return (
        f"Over {recipes}, the ranks at {rungs} have Spearman's correlation "
        f"{_interval(found.correlation)}."
    )


def _interval(found: Estimate) -> str:
    if found.low is None or found.high is None:
        return _bare(found.value)
    return f"{_bare(found.value)} (95 % interval {_bare(found.low)} to {_bare(found.high)})"


def _bare(value: float) -> str:
    return f"{value:.2f}".replace("-", "\N{MINUS SIGN}")


def _decision(found: Comparison) -> str:
    if found.decision == "open":
        return "Whether the study follows it is not decided yet."
    asked = f"{_bare(found.trust)} that the study asks for (ladder.trust)"
    if found.decision == "not followed" and found.decided is not None:
        return (
            f"When the study had to decide, it was {_bare(found.decided.value)} over "
            f"{count(found.deciders, 'recipe')}, less than the {asked}: the {found.lower} rung "
            "was not followed, and its share of the budget went to the algorithm's own proposals."
        )
    if found.decided is None:
        return (
            f"When the study had to decide, {count(found.deciders, 'recipe')} had been trained on "
            f"both, too few or too much alike to say, so the {found.lower} rung was followed."
        )
    return (
        f"When the study had to decide, it was {_bare(found.decided.value)}, at least the "
        f"{asked}: the {found.lower} rung was followed."
    )
