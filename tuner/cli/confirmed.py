"""What the confirm rung found, for people at a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table

from tuner.confirm import ROLE_NAMES
from tuner.confirmation import amount, better_but, p_value, passed_over, spread, unit
from tuner.rounds import named
from tuner.sections import PLAIN


def confirmed_table(found: dict[str, Any], metric: str) -> Table:
    """Every recipe of the rung: what the search saw, and what fresh seeds give."""
    images = ", other validation images" if found["other_images"] else ""
    name = f"adjusted {metric}" if found["adjusted"] else metric
    table = Table(title=f"{name} with {found['seeds']} fresh seeds{images}")
    table.add_column("recipe", min_width=16)
    for column in ("search", "fresh seeds", "to plain CE", "test"):
        table.add_column(column, justify="right", no_wrap=True)
    on_test = {each["trial"]: each["metrics"][metric] for each in found["test"]}
    for row in found["recipes"]:
        table.add_row(*_cells(found, row, on_test.get(row["trial"], []), metric))
    return table


def _cells(
    found: dict[str, Any], row: dict[str, Any], on_test: Sequence[float | None], metric: str
) -> list[str]:
    name = ROLE_NAMES.get(row["role"], f"{row['loss']}, {row['sampler']}")
    floor = "" if row["keeps_floor"] else " (breaks the floor)"
    had = f" ({len(row['values'])} of {found['seeds']} seeds)" if row["dropped"] else ""
    difference = row["to_plain"].get(metric)
    return [
        f"{row['trial']}: {name}{floor}{had}",
        amount(metric, row["search"]),
        spread(metric, row["values"]),
        "" if difference is None else _difference(metric, difference),
        spread(metric, on_test) if on_test else "",
    ]


def _difference(metric: str, found: dict[str, float]) -> str:
    estimate, low, high = (
        f"{found[key]:+.3f}" if metric == "nll" else f"{100 * found[key]:+.1f}"
        for key in ("estimate", "low", "high")
    )
    return f"{estimate} [{low}, {high}]"


def confirmed_lines(found: dict[str, Any], metric: str) -> Iterator[str]:
    """What the table allows to say: the shrinkage, and who cannot be told apart."""
    first = found["recipes"][0]
    images = " on other validation images" if found["other_images"] else ""
    seen, now = amount(metric, first["search"]), spread(metric, first["values"])
    yield (
        f"Trial {first['trial']} had {seen}{unit(metric)} in the search; trained again with "
        f"{found['seeds']} fresh seeds{images} it has {now}{unit(metric)}."
    )
    if found["rivals"]:
        yield f"The seeds do not tell it from {named(found['rivals'])}."
    if beyond := passed_over(found, metric):
        yield f"With these seeds {better_but(beyond)}"
    if found["adjusted"] and not all(row["keeps_floor"] for row in found["recipes"]):
        yield f"The floor is that {PLAIN}: adjusted, plain cross-entropy too may break it."
    if any(row["dropped"] for row in found["recipes"]):
        yield (
            f"Recipes with fewer than {found['seeds']} seeds were dropped on the way: they stood "
            "behind, which does not show them to be worse."
        )
    tuned, searched = found["tuned_with"]
    told = first["to_tuned"].get(metric)
    more = (
        ""
        if told is None
        else (
            f"; the difference to that is {_difference(metric, told)}{unit(metric) and ' points'}, "
            f"one-sided {p_value(told['p_value'])}"
        )
    )
    yield f"Plain cross-entropy was tuned with {tuned} of {searched} trials{more}."
