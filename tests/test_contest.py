"""How a GPU's ways to train are compared, with made-up speeds; real ones need one (test_steps)."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from trainer_cases import recipe

from tuner import contest
from tuner.backends import LAYOUTS, PRECISIONS, Speed, fastest
from tuner.contest import candidates
from tuner.datasets import Data
from tuner.recipe import Recipe

FORMATS = list(product(PRECISIONS, LAYOUTS))


def measured(
    monkeypatch: pytest.MonkeyPatch, data: Data, speeds: dict[tuple[str, int], float | None]
) -> list[Speed]:
    """What is found when bfloat16 is twice as fast, and the rest goes at these speeds."""

    def rate(
        own: Recipe, _: Data, device: str, execution: str, lanes: int, **options: Any
    ) -> float | None:
        found = speeds.get((execution, lanes))
        half = own.training.precision == "bfloat16"
        return found and found * (2 if half else 1)

    monkeypatch.setattr(contest, "rate", rate)
    return [Speed(*found) for found in candidates(recipe(), data, "cuda", FORMATS)]


SATURATING: dict[tuple[str, int], float | None] = {
    ("plain", 1): 10_000.0,
    ("graph", 1): 100_000.0,
    ("graph", 2): 180_000.0,
    ("graph", 4): 300_000.0,
    ("graph", 8): 400_000.0,
    ("graph", 16): 410_000.0,
    ("graph", 32): 900_000.0,
}


def test_lanes_are_doubled_until_that_gives_nothing(
    monkeypatch: pytest.MonkeyPatch, digits: Data
) -> None:
    found = measured(monkeypatch, digits, SATURATING)
    assert [s.lanes for s in found[:4]] == [contest.COMPARED] * 4
    best = [(s.execution, s.lanes) for s in found[4:]]
    assert best == [("graph", 2), ("graph", 1), ("plain", 1), ("graph", 8), ("graph", 16)]
    assert {s.precision for s in found[4:]} == {"bfloat16"}


def test_fewest_lanes_that_are_nearly_as_fast_are_taken(
    monkeypatch: pytest.MonkeyPatch, digits: Data
) -> None:
    way = fastest(recipe().training, measured(monkeypatch, digits, SATURATING))
    assert (way.execution, way.lanes, way.precision) == ("graph", 8, "bfloat16")


def test_model_that_fills_the_device_is_trained_plainly_and_alone(
    monkeypatch: pytest.MonkeyPatch, digits: Data
) -> None:
    found = measured(monkeypatch, digits, {("plain", 1): 200.0})
    assert [(s.execution, s.lanes) for s in found] == [("plain", 1)] * 4
    way = fastest(recipe().training, found)
    assert (way.execution, way.lanes, way.precision) == ("plain", 1, "bfloat16")


def test_lanes_for_which_there_is_no_memory_end_the_search(
    monkeypatch: pytest.MonkeyPatch, digits: Data
) -> None:
    found = measured(monkeypatch, digits, {**SATURATING, ("graph", 8): None})
    assert max(s.lanes for s in found) == contest.COMPARED
    assert fastest(recipe().training, found).lanes == contest.COMPARED


def test_compiled_passes_are_tried_only_where_asked_for(
    monkeypatch: pytest.MonkeyPatch, digits: Data
) -> None:
    speeds = {**SATURATING, ("compiled", 4): 500_000.0, ("compiled", 8): 510_000.0}
    monkeypatch.delenv("TUNER_COMPILE", raising=False)
    found = measured(monkeypatch, digits, speeds)
    assert {s.execution for s in found} == {"plain", "graph"}
    monkeypatch.setenv("TUNER_COMPILE", "1")
    found = measured(monkeypatch, digits, speeds)
    way = fastest(recipe().training, found)
    assert (way.execution, way.lanes) == ("compiled", 4)


def test_groups_are_tried_and_taken_where_they_are_worth_it(
    monkeypatch: pytest.MonkeyPatch, digits: Data
) -> None:
    in_groups = {("grouped", 8): 350_000.0, ("grouped", 16): 560_000.0, ("grouped", 32): 570_000.0}
    found = measured(monkeypatch, digits, {**SATURATING, **in_groups})
    tried = [(s.layout, s.lanes) for s in found if s.execution == "grouped"]
    assert tried == list(product(LAYOUTS, (8, 16, 32)))
    way = fastest(recipe().training, found)
    assert (way.execution, way.lanes) == ("grouped", 16)
    assert str(way) == "bfloat16 channels_last grouped, 16 side by side"


def test_group_that_is_hardly_faster_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, digits: Data
) -> None:
    found = measured(monkeypatch, digits, {**SATURATING, ("grouped", 8): 420_000.0})
    way = fastest(recipe().training, found)
    assert (way.execution, way.lanes) == ("graph", 8)


def test_group_has_no_more_seats_than_there_may_be_trials(
    monkeypatch: pytest.MonkeyPatch, digits: Data
) -> None:
    found = measured(monkeypatch, digits, {**SATURATING, ("grouped", 8): 800_000.0})
    assert fastest(recipe().training, found, most=8).execution == "grouped"
    assert fastest(recipe().training, found, most=7).execution == "graph"


def test_precision_that_the_study_fixes_is_kept(
    monkeypatch: pytest.MonkeyPatch, digits: Data
) -> None:
    found = measured(monkeypatch, digits, SATURATING)
    fixed = recipe(training={"batch_size": 64, "precision": "float32"}).training
    way = fastest(fixed, found)
    assert (way.precision, way.lanes) == ("float32", contest.COMPARED)


def test_way_is_told_in_words() -> None:
    assert str(Speed("float32", "contiguous", 1.0)) == "float32 contiguous"
    way = Speed("bfloat16", "channels_last", 1.0, "graph", 8)
    assert str(way) == "bfloat16 channels_last graph, 8 side by side"
