"""What commands say of a study with a ladder: rungs in lists and counts, and what a head is."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_cli import STUDY, Tuner

from tuner.cli import trials
from tuner.cli.machine import SlotLines
from tuner.cli.show import Display, describe_cohort
from tuner.ladder import RUNGS
from tuner.rungs.outcome import Outcome
from tuner.session import Session, join
from tuner.stores import FolderStore

HEADS = 8
LADDER = f"""
[ladder]
rungs = ["head", "full"]
promoted = 0.5
[ladder.head]
trials = {HEADS}
epochs = 2
batch_size = 32
"""
HEAD_ALONE = LADDER.replace(', "full"', "")


def climbed(folder: Path, ladder: str) -> tuple[Tuner, str]:
    """A folder in which the small study has climbed its ladder; what it said meanwhile."""
    made = Tuner(folder)
    (folder / "small.toml").write_text(STUDY + ladder)
    out, err = made("run", "small.toml", "--device", "cpu")
    return made, out + err


@pytest.fixture(autouse=True, scope="module")
def _own_features(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNER_CACHE", str(tmp_path_factory.mktemp("features")))
        yield


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tuner, str]:
    return climbed(tmp_path_factory.mktemp("both"), LADDER)


@pytest.fixture(scope="module")
def tuner(both: tuple[Tuner, str]) -> Tuner:
    return both[0]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Tuner:
    """A study of the head rung alone."""
    return climbed(tmp_path_factory.mktemp("alone"), HEAD_ALONE)[0]


def rows(tuner: Tuner, *more: str) -> Any:
    return tuner.json("trials", "small", *more)


def test_run_has_one_line_per_cohort_and_one_per_trial_of_the_full_rung(
    both: tuple[Tuner, str],
) -> None:
    lines = both[1].splitlines()
    cohorts = [line for line in lines if "head rung" in line and "trials/min" in line]
    assert [line.split(" · ")[1] for line in cohorts] == [f"{HEADS} trials"]
    assert "best so far 0." in cohorts[0]
    assert sum(line.startswith(f"trial {HEADS + 1}/{HEADS + 3}") for line in lines) == 1
    assert not any(line.startswith(f"trial 2/{HEADS + 3}") for line in lines)


@pytest.fixture
def session(tuner: Tuner) -> Session:
    return join("small", f"sqlite:///{tuner.folder}/runs/tuner.db", FolderStore(tuner.folder))


COHORT = [Outcome(n, "pruned", "head", value=0.1 * n) for n in range(1, 6)]
COHORT += [Outcome(6, "pruned", "not_finite"), Outcome(7, "interrupted"), Outcome(8, "lost")]


def test_cohort_is_told_by_its_size_the_best_so_far_and_its_speed(session: Session) -> None:
    head, best, speed = describe_cohort(session, COHORT, seconds=2.0).split(" · ")[1:]
    assert head == "6 trials (1 not finite, 1 interrupted, 1 lost)"
    heads = [t for t in session.trials() if "fidelity" in t.user_attrs]
    first = session.ranked(heads)[0]
    assert best == f"best so far {first.values[0]:.4f} (trial {first.number})"
    assert speed == "180 trials/min"


def test_slot_says_one_line_per_cohort(session: Session, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="tuner"):
        SlotLines(session).cohort(COHORT, 2.0)
    said = [record.message for record in caplog.records if record.name == "tuner.cli.machine"]
    assert said == [describe_cohort(session, COHORT, 2.0)]


def test_terminal_has_a_line_per_cohort_above_bars_over_all_rungs(session: Session) -> None:
    with Display(session, terminal=True) as display:
        display.bars.console.file = io.StringIO()
        before = display.ended
        display.cohort(COHORT, 2.0)
        shown = display.bars.console.file.getvalue()
    assert "head rung · 6 trials" in shown
    assert display.ended == before + 6
    assert display.bars.tasks[0].total == HEADS + 4


def test_trials_show_rung_and_origin_and_can_be_filtered(tuner: Tuner) -> None:
    text, _ = tuner("trials", "small")
    assert all(column in text for column in ("rung", "from"))
    assert "done" in text
    assert {row["fidelity"] for row in rows(tuner)} == {"head", "full"}
    assert len(rows(tuner, "--rung", "head")) == HEADS
    full = rows(tuner, "--rung", "full")
    assert [row["trial"] for row in full] == [0, *range(HEADS + 1, HEADS + 4)]
    assert any(row["promoted_from"] in range(1, HEADS + 1) for row in full)


def test_every_rung_can_be_asked_for() -> None:
    assert tuple(rung.value for rung in trials.RungName) == RUNGS


def test_trials_of_the_head_rung_have_values_though_pruned_for_optuna(tuner: Tuner) -> None:
    for row in rows(tuner, "--rung", "head"):
        assert (row["state"], row["reason"]) == ("pruned", "head")
        assert 0 <= row["value"] <= 1


def test_many_trials_of_the_head_rung_are_counted_but_not_listed(
    tuner: Tuner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "MOST_HEADS", HEADS - 1)
    text, _ = tuner("trials", "small")
    assert f"{HEADS} trials of the head rung are not listed" in text
    assert "tuner trials small --rung head" in text
    assert "done" not in text
    assert "done" in tuner("trials", "small", "--rung", "head")[0]
    assert len(rows(tuner)) == HEADS + 4, "programs get all of them"


def test_status_has_the_ladder_on_lines_of_its_own(tuner: Tuner) -> None:
    first, *ladder = tuner("status", "small")[0].splitlines()
    assert f"{HEADS} trained at lower rungs" in first
    assert f"of {HEADS + 4}" in first
    assert ladder[:2] == [f"  head {HEADS} of {HEADS} trials", "  full 4 of 4 trials"]
    assert all(line.startswith("  ") for line in ladder)
    assert tuner.json("status", "small")["below"] == HEADS


def test_check_tells_what_each_rung_searches_and_holds_fixed(tuner: Tuner) -> None:
    text, _ = tuner("check", "small.toml")
    assert f"  head: {HEADS} trials" in text
    assert "searches 1 of 2 hyperparameters" in text
    assert "optimizer.sgd.lr = 0.1" in text
    head, full = tuner.json("check", "small.toml")["rungs"]
    assert (head["holds"], list(head["searches"])) == ({"optimizer.sgd.lr": "0.1"}, ["loss"])
    assert (full["trials"], full["holds"]) == (4, {})


def test_best_of_the_head_rung_says_that_only_the_classifier_was_trained(alone: Tuner) -> None:
    best = alone.json("best", "small")
    said = "Only the classifier was trained" in alone("best", "small")[0]
    assert said == (best["fidelity"] == "head")


def test_any_trial_of_the_head_rung_is_exported_with_a_card_that_says_what_it_is(
    alone: Tuner, tuner: Tuner
) -> None:
    for made in (alone, tuner):
        made("export", "small", "--trial", "3", "-o", "head", "--device", "cpu")
        card = (made.folder / "head/README.md").read_text()
        assert "Only the classifier was trained with this recipe, on frozen features of" in card
        assert "holds both, the backbone and the classifier" in card
        assert "that is not the same training" in card
        metrics = json.loads((made.folder / "head/metrics.json").read_text())
        low, high = metrics["intervals"]["adjusted"]["accuracy"]
        assert low <= metrics["validation"]["adjusted"]["accuracy"] <= high
        assert (metrics["rung"], len(metrics["recall_per_class"])) == ("head", 10)


def test_training_a_head_recipe_again_does_not_promise_its_metrics(alone: Tuner) -> None:
    alone("export", "small", "--trial", "4", "-o", "again", "--device", "cpu")
    text, _ = alone("train", "again/recipe.toml", "--device", "cpu")
    assert "this was another training" in text


def test_card_counts_the_trials_of_the_rung(tuner: Tuner) -> None:
    tuner("export", "small", "-o", "best", "--device", "cpu")
    card = (tuner.folder / "best/README.md").read_text()
    assert f"The best of 4 trials of the full rung ({HEADS + 4} of all rungs)" in card
    assert "Only the classifier" not in card


def test_report_has_the_ladder(tuner: Tuner) -> None:
    tuner("report", "small", "-o", "page.html")
    assert "<h2>Ladder</h2>" in (tuner.folder / "page.html").read_text()


def test_table_explains_what_stands_in_it_and_nothing_else() -> None:
    said = ["complete", "pruned (chance)", "duplicate of 0, retry of 3", "7 +"]
    notes = list(trials._notes(said, "accuracy as it is"))
    assert [note.partition(":")[0] for note in notes] == ["duplicate of N", "chance", "+ in from"]
    assert list(trials._notes(["done (breaks the floor)"], "accuracy as it is")) == [
        "the floor: accuracy as it is"
    ]
    assert list(trials._notes(["complete", "fail (code error)", "7"], "")) == []


def test_table_of_trials_ends_with_what_it_explains(tuner: Tuner) -> None:
    shown = " ".join(tuner("trials", "small")[0].split())
    floors = sum(row["keeps_floor"] is False for row in rows(tuner))
    assert ("the floor: accuracy at most 2 points" in shown) == (floors > 0)
    assert ("+ in from: everything is open" in shown) == any(row["unseen"] for row in rows(tuner))
