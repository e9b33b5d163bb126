"""Numbers in plain words, the same on the page and in its figures."""

from __future__ import annotations

from html import escape

from tuner.confirmation import p_value as shown
from tuner.report.data import Difference, Estimate

UNIT = "\N{NO-BREAK SPACE}%"
HEAD_ONLY = (
    "The best recipe is of the head rung: its classifier was trained on the fixed features of the "
    "plain cross-entropy network, or of the model as it was given. The exported weights hold that "
    "backbone and the classifier. The second command trains the recipe from the start, everything "
    "of it, which is another training with other numbers."
)
LABELS = {
    "accuracy": "overall accuracy",
    "worst_class": "recall of the worst class",
    "geometric_mean": "geometric mean of recalls",
    "macro_f1": "macro F1",
    "nll": "negative log-likelihood",
    "ece": "calibration error",
    "classwise_ece": "class-wise calibration error",
}


def label(metric: str) -> str:
    """A metric's name for people."""
    return LABELS.get(metric, metric.replace("_", " "))


def capital(text: str) -> str:
    """The text with its first letter in upper case, the others as they are."""
    return text[:1].upper() + text[1:]


def is_share(metric: str) -> bool:
    """Whether a metric is read in percent."""
    return metric != "nll"


def amount(metric: str, value: float | None) -> str:
    """A metric's value with its unit."""
    if value is None:
        return "–"
    return f"{_bare(metric, value)}{UNIT if is_share(metric) else ''}"


def size(metric: str, value: float) -> str:
    """How large a difference is: percentage points, or the metric's own scale."""
    return f"{_bare(metric, value)} points" if is_share(metric) else _bare(metric, value)


def estimate(metric: str, found: Estimate | None) -> str:
    """A value with its interval: ``61.3 % (57.0 to 65.4)``."""
    if found is None:
        return "no images to tell"
    if found.low is None or found.high is None:
        return amount(metric, found.value)
    return (
        f"{amount(metric, found.value)} ({_bare(metric, found.low)} to {_bare(metric, found.high)})"
    )


def difference(metric: str, found: Difference | None, part: str) -> str:
    """What can be said about a difference, and no more: better, worse or not to be told."""
    if found is None:
        return "not compared"
    low, high = _bare(metric, found.low), _bare(metric, found.high)
    if found.outcome == "unclear":
        middle = size(metric, found.estimate)
        return f"no difference that this {part} part can show ({middle}, {low} to {high})"
    if found.estimate < 0:
        low, high = _bare(metric, -found.high), _bare(metric, -found.low)
    return f"{found.outcome} by {size(metric, abs(found.estimate))} ({low} to {high})"


def p_value(found: Difference | None) -> str:
    """The p-value to three places: ``p = 0.012``."""
    return "" if found is None else shown(found.p_value)


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def count(number: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun: ``1 trial``, ``2,000 trials``, ``3 classes``."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def in_figure(text: str) -> str:
    """Text as plotly shall show it: its labels are a small HTML, in which names stay names."""
    return escape(text, quote=False)


def _bare(metric: str, value: float) -> str:
    text = f"{100 * value:.1f}" if is_share(metric) else f"{value:.3f}"
    return text.replace("-", "\N{MINUS SIGN}")
