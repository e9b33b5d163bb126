"""What a rung holds fixed is said by name and value, and why."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import MakeFile

from tuner.held import held_rows, how_held, remarks, searched_rows
from tuner.study import StudyFile

SPACE: dict[str, Any] = {
    "optimizer": {"sgd": {"lr": {"low": 0.05, "high": 0.5, "log": True}}},
    "augment": {"standard": {"mixup": [0.2, 1.0]}, "none": {}},
    "sampler": {"class_aware": {"exponent": {"low": 0.0, "high": 1.0}, "start": [0.0, 0.8]}},
    "loss": {"cross_entropy": {}, "balanced_softmax": {}},
}


@pytest.fixture
def file(make_file: MakeFile) -> StudyFile:
    ladder = {"rungs": ["head", "deferred", "full"], "deferred": {"switch": 0.7}}
    return make_file(space=SPACE, ladder=ladder)


@pytest.mark.parametrize("rung", ["head", "deferred"])
def test_lower_rung_holds_all_but_loss_and_sampler(file: StudyFile, rung: Any) -> None:
    held = dict(held_rows(file, rung))
    assert held["optimizer.sgd.lr"] == "0.1"
    assert held["sampler.class_aware.start"] == "0.0", "everything acts from the beginning"
    assert held["augment"] in SPACE["augment"]
    searched = {name for name, _ in searched_rows(file, rung)}
    assert searched == {"loss", "sampler.class_aware.exponent"}


@pytest.mark.parametrize("rung", ["head", "deferred", "full"])
def test_what_is_searched_is_not_held(file: StudyFile, rung: Any) -> None:
    names = {name for name, _ in held_rows(file, rung)}
    assert not names & {name for name, _ in searched_rows(file, rung)}
    assert not any(name.startswith("augment.none") for name in names)


def test_full_rung_holds_nothing(file: StudyFile) -> None:
    assert (held_rows(file, "full"), how_held(file, "full")) == ([], "nothing")


def test_words_name_the_backbone_or_the_switch(file: StudyFile, make_file: MakeFile) -> None:
    assert "70 %" in how_held(file, "deferred")
    assert "the network of plain cross-entropy" in how_held(file, "head")
    ladder = {"rungs": ["head", "full"], "head": {"backbone": "initial"}}
    own = {"name": "torchvision", "architecture": "resnet18", "weights_file": "mine.pth"}
    assert "weights_file" in how_held(make_file(ladder=ladder, model=own), "head")


def test_what_is_set_to_act_late_acts_from_the_beginning_at_a_lower_rung_and_that_is_said(
    make_file: MakeFile,
) -> None:
    late = SPACE | {"loss": {"balanced_softmax": {"start": 0.8}, "cross_entropy": {}}}
    held = dict(held_rows(make_file(space=late, ladder={"rungs": ["head", "full"]}), "head"))
    assert held["loss.balanced_softmax.start"] == "0.0"


def test_head_rung_says_that_its_network_sees_no_mixed_images(
    file: StudyFile, make_file: MakeFile
) -> None:
    assert "no mixed images" in how_held(file, "head")
    plain = SPACE | {"augment": {"standard": {"mixup": 0.0}}}
    clear = make_file(space=plain, ladder={"rungs": ["head", "full"]})
    assert "no mixed images" not in how_held(clear, "head")


@pytest.mark.parametrize(
    ("trials", "epochs", "expected"),
    [
        (12, 5, []),
        (5, 5, ["head is followed untested: 4 recipes"]),
        (12, 4, ["switch = 0.8 of 4 epochs leaves none"]),
    ],
)
def test_what_a_ladder_cannot_do_is_said_with_the_way_out(
    make_file: MakeFile, trials: int, epochs: int, expected: list[str]
) -> None:
    rungs = ["head", "deferred", "full"] if epochs == 4 else ["head", "full"]
    file = make_file(
        space=SPACE, ladder={"rungs": rungs}, budget={"trials": trials, "epochs": epochs}
    )
    said = list(remarks(file))
    assert len(said) == len(expected), said
    for text, part in zip(said, expected, strict=True):
        assert part in text
        assert "raise budget." in text


@pytest.mark.parametrize(
    ("changes", "is_alone"),
    [
        ({}, False),
        ({"sampler": {"class_aware": {"exponent": 0.5}}}, True),
        ({"sampler": {"class_aware": {"start": 0.0}}}, True),
        ({"sampler": {"class_aware": {"start": 0.8}}}, False),
        ({"sampler": {"natural": {}}, "training": {"single_stage": {}, "deferred": {}}}, False),
    ],
)
def test_a_deferred_rung_whose_recipes_are_trained_nowhere_else_is_pointed_out(
    make_file: MakeFile, changes: dict[str, Any], is_alone: bool
) -> None:
    ladder = {"rungs": ["deferred", "full"]}
    file = make_file(space=SPACE | changes, ladder=ladder, training=None)
    assert ("trains no such recipes" in how_held(file, "deferred")) == is_alone
