"""What the search benchmark prints: what was the best from when on, and when the target was met."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median, stdev
from typing import Any

from search_sides import CONFIRMED

GOAL = 20
Found = dict[str, Any]
"""One search: its side, seconds and trials, and ``points``: what was the best from when on."""


def reached(found: Found, metric: str, target: float) -> tuple[float, float]:
    """Seconds until a choice has the target on test, first and for good; infinite if never."""
    good = [fmean(point["confirmed"][metric]) >= target for point in found["points"]]
    moments = [point["seconds"] for point in found["points"]]
    first = next((m for m, g in zip(moments, good, strict=True) if g), math.inf)
    stays = next((i for i in range(len(good)) if all(good[i:])), None)
    return first, math.inf if stays is None else moments[stays]


def print_curve(found: Found, metric: str) -> None:
    """What was the best from when on: on validation, and confirmed on test."""
    print(f"\n{found['side']}: {found['what']}, {found['seconds']:.1f} s")
    print("| from second | trial | loss, sampler | validation | confirmed on test | others |")
    print("|---|---|---|---|---|---|")
    for point in found["points"]:
        recipe, confirmed = point["recipe"], point["confirmed"]
        others = ", ".join(
            f"{name} {_spread(confirmed[name])}" for name in CONFIRMED if name != metric
        )
        print(
            f"| {point['seconds']:.1f} | {point['trial']} | {recipe['loss']['name']}, "
            f"{recipe['sampler']['name']} | {100 * point['validation']:.1f} | "
            f"{_spread(confirmed[metric])} | {others} |"
        )


def _spread(values: Sequence[float]) -> str:
    sd = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * fmean(values):.1f}{sd}"


def print_verdict(found: Sequence[Found], metric: str) -> None:
    """When Tuner reached what each of the other sides found, beside what that took it."""
    own = [each for each in found if each["side"] == "tuner"]
    if not own:
        return
    for side in dict.fromkeys(each["side"] for each in found if each["side"] != "tuner"):
        _print_against([each for each in found if each["side"] == side], own, metric)


def _print_against(others: Sequence[Found], own: Sequence[Found], metric: str) -> None:
    side, seconds = others[0]["side"], fmean(each["seconds"] for each in others)
    target = fmean(fmean(each["points"][-1]["confirmed"][metric]) for each in others)
    print(f"\n{side}: {metric} {100 * target:.1f} on test, mean of the seeds, in {seconds:.1f} s")
    for each in others:
        print(f"  its own choice had that {_times(each, metric, target, None)}")
    for each in own:
        print(f"  Tuner's {_times(each, metric, target, seconds)}")
    ratios = [[seconds / s for s in reached(each, metric, target)] for each in own]
    first, stays = (median(column) for column in zip(*ratios, strict=True))
    goal = f" (goal {GOAL})" if side == "ordinary" else ""
    print(f"  median of {len(own)}: ratio {first:.1f}{goal}, for good {stays:.1f}")


def _times(each: Found, metric: str, target: float, seconds: float | None) -> str:
    first, stays = reached(each, metric, target)
    shown = [f"after {m:.1f} s" if m < math.inf else "never" for m in (first, stays)]
    ratio = "" if seconds is None else f": ratio {seconds / first:.1f}, {seconds / stays:.1f}"
    return f"{shown[0]}, for good {shown[1]}{ratio}"
