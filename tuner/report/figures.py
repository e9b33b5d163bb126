"""The figures of a report, drawn from its data."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from tuner.report.data import (
    ClassRecall,
    Comparison,
    HeadTailData,
    HistoryData,
    LossData,
    PruningData,
    RecallData,
    Tradeoff,
    Training,
    Twin,
)
from tuner.report.drawing import (
    BLUE,
    GREY,
    MARKS,
    PALE,
    add_baseline,
    add_points,
    add_states,
    axis_title,
    look,
    new_figure,
    scaled,
    trials_axis,
)
from tuner.report.words import amount, capital, count, in_figure, is_share, label

ERROR_BARS_UP_TO = 60


def recall_figure(data: RecallData) -> go.Figure:
    """Recall of every class against its training images, before and after."""
    figure = new_figure(
        _recall_title(data), "training images of the class", f"recall, {data.part} (%)"
    )
    models = (("plain cross-entropy", "baseline", GREY, 0.97), ("best recipe", "best", BLUE, 1.03))
    for name, which, colour, shift in models:
        _add_recalls(figure, data.classes, name, which, colour, shift)
    sizes = [c.training for c in data.classes if c.training]
    figure.update_xaxes(type="log", tickvals=_ticks(max(sizes, default=1)))
    figure.update_yaxes(range=[-3, 103])
    return figure


def _ticks(highest: int) -> list[int]:
    """1, 2, 5, 10, 20 ... past ``highest``: every label of a logarithmic axis in full."""
    decades = range(len(str(highest)) + 1)
    return [digit * 10**decade for decade in decades for digit in (1, 2, 5)]


def _recall_title(data: RecallData) -> str:
    pairs = [(c.baseline.value, c.best.value) for c in data.classes if c.baseline and c.best]
    up, down = sum(b > a for a, b in pairs), sum(b < a for a, b in pairs)
    classes = count(len(pairs), "class", "classes")
    return f"Recall rose in {up} of {classes} and fell in {down}"


def _add_recalls(
    figure: go.Figure,
    classes: Sequence[ClassRecall],
    name: str,
    which: str,
    colour: str,
    shift: float,
) -> None:
    known = [(c, r) for c in classes if c.training and (r := getattr(c, which)) is not None]
    bars = {
        "type": "data",
        "symmetric": False,
        "array": [100 * (r.high - r.value) for _, r in known],
        "arrayminus": [100 * (r.value - r.low) for _, r in known],
        "thickness": 1,
        "width": 0,
        "visible": len(known) <= ERROR_BARS_UP_TO,
    }
    texts = [
        f"{in_figure(c.name)} ({c.group})<br>{name}: {100 * r.value:.1f} % "
        f"({100 * r.low:.1f} to {100 * r.high:.1f}) of {count(c.images, 'image')}"
        f"<br>{count(c.training, 'training image')}"
        for c, r in known
    ]
    xs, ys = [c.training * shift for c, _ in known], [100 * r.value for _, r in known]
    add_points(figure, name, xs, ys, texts, colour, "circle", error_y=bars)


def history_figure(data: HistoryData) -> go.Figure:
    """The objective of every trial in order, and the best so far."""
    title = _history_title(data)
    figure = new_figure(title, trials_axis(data.rung), axis_title(data.metric))
    add_states(figure, data.points, lambda p: p.place, lambda p: scaled(data.metric, p.value))
    figure.add_scatter(
        name="best so far",
        mode="lines",
        x=[p.place for p in data.points],
        y=[scaled(data.metric, value) for value in data.best_so_far],
        line={"shape": "hv", "color": BLUE, "width": 1.5},
        hoverinfo="skip",
    )
    add_baseline(figure, data.metric, data.baseline, "h")
    return figure


def _history_title(data: HistoryData) -> str:
    best = next((p for p in data.points if p.number == data.best), None)
    if best is None:
        return "No trial is complete yet"
    value = amount(data.metric, best.value)
    where = "" if data.rung is None else f" at the {data.rung} rung"
    number = f"trial {best.number}, of {count(len(data.points), 'trial')} so far{where}"
    return f"{capital(label(data.metric))} on validation: {value} at {number}"


def loss_figure(data: LossData) -> go.Figure:
    """The objective of every trial, one line per loss, the best loss on top."""
    best = data.rows[0] if data.rows and data.rows[0].best is not None else None
    where = "" if data.rung is None else f" of the {data.rung} rung"
    title = (
        f"{in_figure(best.loss)} has the best trial{where}, {amount(data.metric, best.best)}"
        if best
        else "No loss has a complete trial yet"
    )
    figure = new_figure(title, axis_title(data.metric), "")
    points = [point for row in data.rows for point in row.points]
    add_states(figure, points, lambda p: scaled(data.metric, p.value), lambda p: p.loss)
    rows = [row for row in data.rows if row.median is not None]
    figure.add_scatter(
        name="median of complete",
        mode="markers",
        x=[scaled(data.metric, row.median) for row in rows],
        y=[row.loss for row in rows],
        marker={"symbol": "line-ns-open", "size": 22, "color": GREY, "line": {"width": 2}},
        hovertemplate="median %{x:.1f}<extra></extra>",
    )
    add_baseline(figure, data.metric, data.baseline, "v")
    order = [row.loss for row in reversed(data.rows)]
    figure.update_yaxes(categoryorder="array", categoryarray=order)
    figure.update_layout(height=max(300, 180 + 34 * len(data.rows)))
    return figure


def head_tail_figure(data: HeadTailData) -> go.Figure:
    """Head against tail accuracy: what the tail gains, and what the head pays."""
    front = sorted((p for p in data.points if p.on_front), key=lambda p: p.head)
    title = (
        f"{count(len(front), 'trial')} of {len(data.points)} not beaten on head and tail at once"
    )
    figure = new_figure(title, "head accuracy (%)", "tail accuracy (%)")
    if len(front) > 1:
        figure.add_scatter(
            name="front",
            mode="lines",
            x=[100 * p.head for p in front],
            y=[100 * p.tail for p in front],
            line={"color": GREY, "width": 1, "dash": "dot"},
            hoverinfo="skip",
        )
    for position, loss in enumerate(dict.fromkeys(p.loss for p in data.points)):
        _add_tradeoffs(figure, loss, position, [p for p in data.points if p.loss == loss])
    if data.baseline:
        _add_star(figure, "plain cross-entropy, unadjusted", data.baseline, GREY)
    best = [(p.head, p.tail) for p in data.points if p.number == data.best]
    for pair in best:
        _add_star(figure, "best recipe", pair, BLUE)
    return figure


def _add_tradeoffs(figure: go.Figure, loss: str, position: int, points: Sequence[Tradeoff]) -> None:
    points = sorted(points, key=lambda p: not p.feasible)
    colour, symbol = look(position)
    texts = [
        f"trial {p.number}<br>{in_figure(p.summary)}<br>head {100 * p.head:.1f} %, "
        f"tail {100 * p.tail:.1f} %{'' if p.feasible else '<br>breaks the floor'}"
        for p in points
    ]
    symbols = [symbol if p.feasible else f"{symbol}-open" for p in points]
    xs, ys = [100 * p.head for p in points], [100 * p.tail for p in points]
    add_points(figure, in_figure(loss), xs, ys, texts, colour, symbols)


def _add_star(figure: go.Figure, name: str, pair: tuple[float, float], colour: str) -> None:
    head, tail = 100 * pair[0], 100 * pair[1]
    figure.add_scatter(
        name=name,
        mode="markers",
        x=[head],
        y=[tail],
        marker={"symbol": "circle-open", "size": 18, "color": colour, "line": {"width": 2}},
        hovertemplate=f"{name}<br>head {head:.1f} %, tail {tail:.1f} %<extra></extra>",
    )


def pruning_figure(data: PruningData) -> go.Figure:
    """The epochs of every trial: trained, and not trained because it was pruned."""
    saved = data.unpruned - data.trained
    share = f" ({saved / data.unpruned:.0%})" if saved else ""
    title = f"Pruning saved {saved:,} of {count(data.unpruned, 'epoch')}{share}"
    figure = new_figure(title, trials_axis(data.rung), "epochs")
    for state, mark in MARKS.items():
        rows = [row for row in data.trials if row.state == state and row.trained]
        if rows:
            texts = [f"trial {r.number}: {r.trained} of {r.planned} epochs" for r in rows]
            _add_bars(figure, mark.name, rows, [r.trained for r in rows], texts, mark.colour)
    rest = [row for row in data.trials if row.state == "pruned"]
    texts = [f"trial {r.number}: pruned ({in_figure(r.reason or 'unknown')})" for r in rest]
    epochs = [row.planned - row.trained for row in rest]
    _add_bars(figure, "not trained", rest, epochs, texts, PALE)
    figure.update_layout(barmode="stack", bargap=0.15)
    if max((row.planned for row in data.trials), default=0) <= 10:
        figure.update_yaxes(dtick=1)
    return figure


def _add_bars(
    figure: go.Figure,
    name: str,
    rows: Sequence[Training],
    epochs: Sequence[int],
    texts: Sequence[str],
    colour: str,
) -> None:
    figure.add_bar(
        name=name,
        x=[row.place for row in rows],
        y=list(epochs),
        customdata=list(texts),
        hovertemplate="%{customdata}<extra></extra>",
        marker={"color": colour, "line": {"width": 0}},
    )


def agreement_figure(data: Comparison, metric: str) -> go.Figure:
    """The recipes trained on two rungs: the objective at one against that at the other."""
    figure = new_figure(
        _agreement_title(data),
        f"{data.lower} rung: {axis_title(metric)}",
        f"{data.upper} rung{' (%)' if is_share(metric) else ''}",
    )
    figure.update_layout(height=460)
    for position, loss in enumerate(sorted({twin.loss for twin in data.twins})):
        own = [twin for twin in data.twins if twin.loss == loss]
        xs, ys = ([scaled(metric, v) for v in values] for values in _objectives(own))
        texts = [_twin_text(data, metric, twin) for twin in own]
        colour, symbol = look(position)
        add_points(figure, in_figure(loss), xs, ys, texts, colour, symbol)
    return figure


def _agreement_title(data: Comparison) -> str:
    recipes = (
        f"{count(len(data.twins), 'recipe')} trained at the {data.lower} and {data.upper} rung"
    )
    if data.correlation is None:
        return recipes
    return f"{recipes}: rank correlation {data.correlation.value:.2f}"


def _objectives(twins: Sequence[Twin]) -> tuple[list[float], list[float]]:
    return [twin.lower for twin in twins], [twin.upper for twin in twins]


def _twin_text(data: Comparison, metric: str, twin: Twin) -> str:
    return (
        f"{in_figure(twin.loss)}, {in_figure(twin.sampler)}<br>"
        f"{data.lower}: {amount(metric, twin.lower)} (trial {twin.lower_trial})<br>"
        f"{data.upper}: {amount(metric, twin.upper)} (trial {twin.upper_trial})"
    )
