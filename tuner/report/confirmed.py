"""The confirm rung in a report: the best recipes again, with fresh seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import plotly.graph_objects as go

from tuner.confirm import ROLE_NAMES
from tuner.confirmation import better_but
from tuner.report.data import ConfirmedData, ConfirmedRecipe, Difference, Repeated
from tuner.report.drawing import BLUE, GREY, ORANGE, add_points, axis_title, new_figure, scaled
from tuner.report.markup import Html, element, plot, table
from tuner.report.words import amount, capital, count, in_figure, label, p_value, size
from tuner.rounds import named

HEADS = (
    "recipe",
    "in the search",
    "with fresh seeds",
    "to plain cross-entropy",
    "one-sided p",
    "test",
)


def confirmed(found: ConfirmedData | None) -> Iterator[Html]:
    """The section of a study whose confirm rung is over; nothing for others."""
    if found is None:
        return
    yield element("h2", "Confirmed")
    yield element("p", f"{shrinkage(found)} {tuned(found)}")
    images = " and on other validation images" if found.other_images else ""
    adjusted = ", all with logit adjustment" if found.adjusted else ""
    name = f"{label(found.metric).capitalize()}{adjusted}"
    yield table(
        f"{name}: what each recipe was picked for, and mean ± standard deviation with "
        f"{found.seeds} fresh seeds{images}. The best recipe is chosen by all of these; plain "
        f"cross-entropy and the best one are then looked at on the test part.{_why_fewer(found)}",
        HEADS,
        [_row(found, recipe) for recipe in found.recipes],
    )
    hint = "Each point is one training; how far the points fall below the mark is what luck gave."
    yield plot("confirmed", confirmed_figure(found), hint)


def shrinkage(found: ConfirmedData) -> str:
    """How the best recipe fared without the luck it was picked for, and who it is not told from."""
    first, metric = found.recipes[0], found.metric
    images = " and validation images it was not chosen by" if found.other_images else ""
    seen = amount(metric, first.search)
    text = (
        f"Trial {first.trial} had a {label(metric)} of {seen} in the search. "
        f"With fresh seeds{images} the same recipe has {spread(metric, first.fresh)}."
    )
    beyond = f" {capital(better_but(found.passed_over))}" if found.passed_over else ""
    return f"{text} {_told_from(found)}{beyond}"


def _told_from(found: ConfirmedData) -> str:
    """Who the best recipe is told from, if there is anybody whom it could be taken for."""
    if found.rivals:
        return f"These trainings do not tell it from {named(found.rivals)}."
    first, *others = found.recipes
    every = " with every seed" if any(recipe.dropped for recipe in others) else ""
    if not first.keeps_floor:
        return f"No recipe{every} keeps the floor; this one breaks it least."
    kept = [each.trial for each in others if each.keeps_floor and not each.dropped]
    if len(kept) == 1:
        only = f"the only other{every} that keeps the floor"
        return f"These trainings tell it from {named(kept)}, {only}."
    if kept:
        return f"These trainings tell it from every other{every} that keeps the floor."
    return f"No other{every} keeps the floor." if others else "No other recipe was trained again."


def tuned(found: ConfirmedData) -> str:
    """How plain cross-entropy was tuned, and what the best recipe has beyond that."""
    (own, trials), told = found.tuned_with, found.recipes[0].to_tuned
    text = f"Plain cross-entropy was tuned with {own:,} of {count(trials, 'trial')}"
    if told is None:
        return f"{text}."
    return (
        f"{text}; the difference to that is {_gain(found.metric, told)}, one-sided {p_value(told)}."
    )


def _why_fewer(found: ConfirmedData) -> str:
    """What a recipe with fewer seeds than the others says."""
    if not any(recipe.dropped for recipe in found.recipes):
        return ""
    return (
        " A recipe with fewer seeds was dropped on the way: it stood behind, which does not show "
        "it to be worse."
    )


def spread(metric: str, found: Repeated) -> str:
    """Mean and standard deviation over seeds."""
    lost = f", {found.failed} failed" if found.failed else ""
    if found.mean is None:
        return f"–{lost}"
    deviation = "" if found.deviation is None else f" ± {amount(metric, found.deviation)}"
    return f"{amount(metric, found.mean)}{deviation}{lost}"


def name_of(recipe: ConfirmedRecipe) -> str:
    """A recipe's trial and what it is."""
    what = ROLE_NAMES.get(recipe.role, f"{recipe.loss}, {recipe.sampler}")
    return f"{recipe.trial}: {what}"


def _row(found: ConfirmedData, recipe: ConfirmedRecipe) -> list[object]:
    metric, told = found.metric, recipe.to_plain
    floor = "" if recipe.keeps_floor else " (breaks the floor)"
    had = len(recipe.fresh.values) + recipe.fresh.failed
    dropped = f" (dropped after {had} of {count(found.seeds, 'seed')})" if recipe.dropped else ""
    beside = "" if told is None else _gain(metric, told)
    return [
        f"{name_of(recipe)}{floor}{dropped}",
        amount(metric, recipe.search),
        _number(spread(metric, recipe.fresh)),
        "" if told is None else element("span", beside, class_=told.outcome),
        _number(p_value(told)),
        "" if recipe.test is None else _number(spread(metric, recipe.test)),
    ]


def _gain(metric: str, told: Difference) -> str:
    """A difference with its interval."""
    plus = "+" if told.estimate > 0 else ""
    interval = f"{size(metric, told.low).removesuffix(' points')} to {size(metric, told.high)}"
    return f"{plus}{size(metric, told.estimate)} ({interval})"


def _number(text: str) -> Html:
    return element("span", text, class_="number") if text else Html("")


def confirmed_figure(data: ConfirmedData) -> go.Figure:
    """A line per recipe: its value in the search, and that of every fresh training."""
    figure = new_figure(_title(data), axis_title(data.metric), "")
    order = [in_figure(name_of(recipe)) for recipe in data.recipes]
    rows = list(zip(order, data.recipes, strict=True))
    _add(figure, data, "fresh seeds", [(n, v) for n, r in rows for v in r.fresh.values], BLUE)
    tested = [(n, v) for n, r in rows if r.test is not None for v in r.test.values]
    if tested:
        _add(figure, data, "fresh seeds, test part", tested, ORANGE, "diamond-open")
    _add(figure, data, "in the search", [(n, r.search) for n, r in rows], GREY, "line-ns-open")
    figure.data[-1].marker.update(size=22, line={"width": 2})
    figure.update_yaxes(categoryorder="array", categoryarray=order[::-1])
    figure.update_layout(height=max(300, 180 + 34 * len(order)))
    return figure


def _add(
    figure: go.Figure,
    data: ConfirmedData,
    name: str,
    points: Sequence[tuple[str, float]],
    colour: str,
    symbol: str = "circle",
) -> None:
    texts = [f"{row}<br>{name}: {amount(data.metric, value)}" for row, value in points]
    xs = [scaled(data.metric, value) for _, value in points]
    add_points(figure, name, xs, [row for row, _ in points], texts, colour, symbol)


def _title(data: ConfirmedData) -> str:
    first = data.recipes[0]
    return (
        f"{count(data.seeds, 'fresh seed')}: trial {first.trial} has "
        f"{spread(data.metric, first.fresh)}, {amount(data.metric, first.search)} in the search"
    )
