"""The look that all figures share, and the marks they are drawn with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from tuner.report.data import Point
from tuner.report.words import in_figure, is_share, label

BLUE, ORANGE, GREEN, PURPLE, RED, SKY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#D55E00",
    "#56B4E9",
)
"""Colours that stay apart for colour-blind readers, of Okabe and Ito (2008)."""

GREY = "#8c8c8c"
PALE = "rgba(140, 140, 140, 0.3)"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, SKY)
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star")


@dataclass(frozen=True)
class Mark:
    """How a kind of trial is drawn."""

    name: str
    colour: str
    symbol: str


MARKS = {
    "complete": Mark("complete", BLUE, "circle"),
    "infeasible": Mark("breaks the floor", ORANGE, "circle-open"),
    "duplicate": Mark("known result", SKY, "diamond-open"),
    "pruned": Mark("pruned", GREY, "x-open"),
    "failed": Mark("failed", RED, "triangle-down-open"),
    "running": Mark("running", GREEN, "triangle-up"),
}


def template(dark: bool) -> dict[str, Any]:
    """The look that all figures share, on a light or a dark page."""
    ink, line = ("#e4e4e4", "#4a4a4a") if dark else ("#2b2b2b", "#dddddd")
    axis = {"gridcolor": line, "linecolor": line, "zeroline": False, "automargin": True}
    return {
        "layout": {
            "font": {"family": "system-ui, sans-serif", "size": 13, "color": ink},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "xaxis": axis,
            "yaxis": axis,
            "hoverlabel": {
                "bgcolor": "#262626" if dark else "#ffffff",
                "font": {"color": ink},
                "align": "left",
            },
        }
    }


def new_figure(title: str, x: str, y: str) -> go.Figure:
    """An empty figure; ``x`` and ``y`` name its axes."""
    figure = go.Figure()
    figure.update_layout(
        template=template(dark=False),
        title={"text": title, "font": {"size": 16}},
        height=400,
        margin={"l": 56, "r": 16, "t": 48, "b": 48},
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0},
        hovermode="closest",
    )
    figure.update_xaxes(title_text=x)
    figure.update_yaxes(title_text=y)
    return figure


def trials_axis(rung: str | None) -> str:
    """Name of an axis along which trials stand; of one rung, where a study has several."""
    return "trial" if rung is None else f"trials of the {rung} rung, in order"


def axis_title(metric: str) -> str:
    """Name of an axis that shows a metric."""
    return f"{label(metric)} (%)" if is_share(metric) else label(metric)


def scaled(metric: str, value: float | None) -> float | None:
    """A metric as its axis shows it: shares in percent."""
    return 100 * value if value is not None and is_share(metric) else value


def look(position: int) -> tuple[str, str]:
    """Colour and symbol of the losses in turn; the pairs come again after 36 of them."""
    turn, place = divmod(position, len(COLOURS))
    return COLOURS[place], SYMBOLS[(place + turn) % len(SYMBOLS)]


def add_states(figure: go.Figure, points: Iterable[Point], x: Any, y: Any) -> None:
    """One trace per kind of trial; those without a value are not drawn."""
    kinds: dict[str, list[Point]] = {}
    for point in points:
        if point.value is not None:
            kinds.setdefault(point.state if point.feasible else "infeasible", []).append(point)
    for kind in (kind for kind in MARKS if kind in kinds):
        mark, own = MARKS[kind], kinds[kind]
        texts = [f"trial {p.number}, {mark.name}<br>{in_figure(p.summary)}" for p in own]
        xs, ys = [x(p) for p in own], [y(p) for p in own]
        add_points(figure, mark.name, xs, ys, texts, mark.colour, mark.symbol)


def add_points(
    figure: go.Figure,
    name: str,
    xs: Sequence[Any],
    ys: Sequence[Any],
    texts: Sequence[str],
    colour: str,
    symbol: str | Sequence[str],
    **more: Any,
) -> None:
    """Points with the text each shows when pointed at."""
    figure.add_scatter(
        name=name,
        mode="markers",
        x=list(xs),
        y=list(ys),
        customdata=list(texts),
        hovertemplate="%{customdata}<extra></extra>",
        marker={"color": colour, "symbol": symbol, "size": 9, "opacity": 0.85},
        **more,
    )


def add_baseline(figure: go.Figure, metric: str, value: float | None, along: str) -> None:
    """A line through the whole figure at plain cross-entropy's value."""
    if value is None:
        return
    at = scaled(metric, value)
    line = {"line_color": GREY, "line_dash": "dash", "line_width": 1}
    text = {"annotation_text": "plain cross-entropy", "annotation_font_color": GREY}
    if along == "h":
        figure.add_hline(at, **line, **text, annotation_position="top right")
    else:
        figure.add_vline(at, **line, **text, annotation_position="top right")
