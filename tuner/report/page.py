"""The report: one HTML file that holds everything it shows."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.errors import StorageError
from tuner.report import data as numbers
from tuner.report.assets import SCRIPT
from tuner.report.climb import climb
from tuner.report.confirmed import confirmed
from tuner.report.data import (
    OverviewData,
    PruningData,
    RecallData,
    Setting,
)
from tuner.report.lead import lead
from tuner.report.markup import (
    Html,
    content_policy,
    element,
    html,
    json_block,
    page,
    plot,
    script,
    table,
)
from tuner.report.words import (
    HEAD_ONLY,
    amount,
    count,
    duration,
    estimate,
    size,
)

if TYPE_CHECKING:
    from tuner.session import Session


def write_report(session: Session, path: Path) -> None:
    """Write the report of a study to ``path``, all of it or nothing.

    Raises:
        StorageError: The file cannot be written.
    """
    text = report_html(session)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise StorageError(f"{path}: the report cannot be written: {error.strerror}") from None


def report_html(session: Session) -> str:
    """The report as HTML text; it needs no network and runs no script but its own."""
    session = numbers.still(session)
    overview, seeds = numbers.overview_data(session), numbers.confirmed_data(session)
    content = [
        *lead(overview, numbers.verdict_data(session), seeds),
        *confirmed(seeds),
        *_recipe(overview),
        *_data(overview),
        *climb(numbers.ladder_data(session)),
        *_figures(session),
        *_reproduce(overview),
        *_scripts(),
    ]
    policy = f'<meta http-equiv="Content-Security-Policy" content="{html(_policy())}">'
    return page(f"Study {overview.name}", *content, head=[Html(policy)])


def _scripts() -> Iterator[Html]:
    from plotly.offline import get_plotlyjs

    from tuner.report.drawing import template

    yield json_block("looks", {"light": template(dark=False), "dark": template(dark=True)})
    yield script(get_plotlyjs())
    yield script(SCRIPT)


@cache
def _policy() -> str:
    from plotly.offline import get_plotlyjs

    return content_policy(get_plotlyjs(), SCRIPT)


def _recipe(overview: OverviewData) -> Iterator[Html]:
    best = overview.best
    if best is None:
        return
    yield element("h2", "Best recipe")
    rung = f" ({best.rung} rung)" if best.rung != "full" else ""
    value = amount(overview.metric, best.value)
    facts = [f"Trial {best.number}{rung}, {value} on validation"]
    if best.tau is not None:
        facts.append(f"logit adjustment τ = {best.tau:.2f}")
    if best.kappa is not None:
        facts.append(f"correction by sampling and weights κ = {best.kappa:.2f}")
    yield element("p", "; ".join(facts) + ".")
    chosen = [_setting(s) for s in best.settings if s.searched]
    fixed = [_setting(s) for s in best.settings if not s.searched]
    if chosen:
        yield table("What the search chose.", ["setting", "value"], chosen)
    everything = table("Fixed by the study file or by default.", ["setting", "value"], fixed)
    yield element("details", element("summary", "What it did not search"), everything)


def _setting(setting: Setting) -> tuple[str, str]:
    return f"{setting.part} {setting.key}".strip(), _value(setting.value)


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_value(part)}" for key, part in value.items())
    return str(value)


def _data(overview: OverviewData) -> Iterator[Html]:
    yield element("h2", "Data")
    test = "not looked at yet" if overview.test is None else f"{overview.test:,}"
    ratio = overview.imbalance_ratio
    facts = [
        ("classes", f"{overview.classes:,}"),
        ("training images", f"{overview.training:,}"),
        ("validation images", f"{overview.validation:,}"),
        ("test images", test),
        ("imbalance ratio", "–" if ratio is None else f"{ratio:.1f} : 1"),
        *(
            (f"{g.name} classes", f"{g.classes:,} with {g.images:,} images")
            for g in overview.groups
        ),
        ("fingerprint", overview.fingerprint[:16]),
    ]
    yield table(f"What was learned from, by Tuner {overview.version}.", ["fact", "value"], facts)
    yield from (element("p", warning, class_="note") for warning in overview.warnings)


def _figures(session: Session) -> Iterator[Html]:
    """Each figure with what to look for; one without data says what it waits for."""
    from tuner.report import figures

    yield element("h2", "Figures")
    recall = numbers.recall_data(session)
    history, losses = numbers.history_data(session), numbers.loss_data(session)
    tradeoff, pruning = numbers.head_tail_data(session), numbers.pruning_data(session)
    if recall is None:
        yield element("p", "Recall per class comes with the verdict.", class_="soft")
    else:
        hint = "Each class once per model, with 95 % intervals; small classes are on the left."
        yield plot("recall", figures.recall_figure(recall), hint, _recall_table(recall))
    if not history.points:
        yield element("p", "No trial has been started yet.", class_="soft")
        return
    if history.rung not in (None, "full"):
        note = "is plain cross-entropy, trained in full; all others below are of the"
        yield element("p", f"Trial 0 {note} {history.rung} rung.", class_="soft")
    hint = "Points that break the floor do not count, however high they are."
    yield plot("history", figures.history_figure(history), hint)
    hint = "Each trial's value on validation; the bar is the median of the complete ones."
    yield plot("losses", figures.loss_figure(losses), hint)
    if tradeoff.points:
        hint = "Towards the upper right is better; open marks break the floor."
        yield plot("tradeoff", figures.head_tail_figure(tradeoff), hint)
    if session.file.ladder.last == "head":
        yield element("p", "The head rung trains no epochs and prunes nothing.", class_="soft")
        return
    yield plot("pruning", figures.pruning_figure(pruning), _pruning_hint(pruning, history.metric))


def _recall_table(recall: RecallData) -> Html:
    rows = [
        (c.name, c.group, c.training, estimate("recall", c.baseline), estimate("recall", c.best))
        for c in recall.classes
    ]
    head = ["class", "group", "training images", "plain cross-entropy", "best recipe"]
    caption = f"Recall on the {recall.part} part, with 95 % Wilson intervals."
    return element("details", element("summary", "The numbers"), table(caption, head, rows))


def _pruning_hint(pruning: PruningData, metric: str) -> str:
    parts = [f"{number} {reason.replace('_', ' ')}" for reason, number in pruning.reasons.items()]
    told = [f"Ended early: {', '.join(parts)}." if parts else "No trial ended early."]
    if pruning.seconds_saved:
        told.append(f"About {duration(pruning.seconds_saved)} were saved.")
    if pruning.duplicates:
        known = count(pruning.duplicate_epochs, "epoch")
        told.append(f"Known results spared {known} more.")
    return " ".join([*told, _control(pruning, metric)])


def _control(pruning: PruningData, metric: str) -> str:
    control = pruning.control
    if not control.flagged:
        return "No trial was trained on against the pruner's advice, so its price is not known."
    who = f"{count(control.flagged, 'trial')} trained on against the pruner's advice"
    if control.above_best_pruned is not None:
        who += f" ({control.above_best_pruned} of them ended above every pruned trial)"
    if control.regret is None:
        return f"{who}."
    if control.regret == 0:
        return f"{who}: none of them became the best, so pruning cost nothing that they can show."
    return f"{who}: pruning all of them would have cost {size(metric, control.regret)}."


def _reproduce(overview: OverviewData) -> Iterator[Html]:
    quoted = shlex.quote(overview.name)
    yield element("h2", "Train it again")
    yield element("p", "The first command writes the recipe and its weights to a folder.")
    yield element(
        "pre", element("code", f"tuner export {quoted} -o best\ntuner train best/recipe.toml")
    )
    if overview.best is not None and overview.best.rung == "head":
        yield element("p", HEAD_ONLY, class_="note")
