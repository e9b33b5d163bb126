"""The answer of a study: on unseen images, stored once, with honest differences."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeSession

from tuner import artifacts, trained, verdict
from tuner.datasets import Data
from tuner.worker import work


@pytest.fixture
def decided(make_session: MakeSession, digits: Data, sqlite: str) -> dict[str, Any]:
    session = make_session(budget={"trials": 3, "epochs": 4})
    work(session, digits)
    found = verdict.decide(session, digits)
    assert found is not None
    return found


def test_answer_is_about_the_test_part(decided: dict[str, Any], digits: Data) -> None:
    assert decided["part"] == "test"
    assert digits.test is not None
    assert sum(decided["counts"]) == len(digits.test)
    assert decided["test_value"] == decided["rows"][1]["metrics"]["tail_accuracy"]


def test_differences_are_those_of_the_rows_and_carry_intervals(decided: dict[str, Any]) -> None:
    plain, best, adjusted = decided["rows"]
    for reference, key in ((plain, "differences"), (adjusted, "beyond_adjustment")):
        for metric, found in decided[key].items():
            gap = best["metrics"][metric] - reference["metrics"][metric]
            assert found["estimate"] == pytest.approx(gap)
            assert found["low"] <= found["estimate"] <= found["high"]
            assert 0 <= found["p_value"] <= 1


def test_answer_is_stored_and_the_test_part_not_looked_at_again(
    make_session: MakeSession, digits: Data, sqlite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = make_session(budget={"trials": 2, "epochs": 3})
    assert verdict.decide(session, digits) is None, "nothing is trained yet"
    work(session, digits)
    first = verdict.decide(session, digits)
    monkeypatch.setattr(verdict, "trained_lane", lambda *_: pytest.fail("looked again"))
    assert verdict.decide(session, digits) == first


def test_lost_weights_are_trained_again_to_the_same_answer(
    make_session: MakeSession, digits: Data, sqlite: str
) -> None:
    session = make_session(budget={"trials": 2, "epochs": 3})
    work(session, digits)
    baseline = session.baseline()
    assert baseline is not None
    kept = trained.trained_lane(session, baseline, digits, "cpu")
    store, images = session.trial_store(0), digits.validation.images
    weights = store.read(artifacts.WEIGHTS)
    for damage in (store.remove, lambda key: store.write(key, weights[:1000])):
        damage(artifacts.WEIGHTS)
        again = trained.trained_lane(session, baseline, digits, "cpu")
        assert again.logits(images).equal(kept.logits(images))
        assert len(store.read(artifacts.WEIGHTS)) == len(weights), "trained again and kept"


def test_store_out_of_reach_costs_training_again_and_no_answer(
    make_session: MakeSession, digits: Data
) -> None:
    session = make_session(budget={"trials": 2, "epochs": 3})
    work(session, digits)
    expected = session.best()
    shutil.rmtree(str(session.store))
    Path(str(session.store)).write_text("a file where the folder was")
    found = verdict.decide(session, digits)
    assert found is not None
    assert expected is not None
    assert found["best"] == expected.number
