"""What ``tuner list`` knows of the components comes from their annotations and docstrings."""

from __future__ import annotations

from dataclasses import fields

import pytest

from tuner.describe import components
from tuner.recipe import PARTS

DESCRIBED = {part: {entry["name"]: entry for entry in components(part)} for part in PARTS}


@pytest.mark.parametrize("part", PARTS)
def test_every_component_is_described_with_all_its_parameters(part: str) -> None:
    assert list(DESCRIBED[part]) == list(PARTS[part])
    for name, entry in DESCRIBED[part].items():
        assert entry["summary"].endswith(".")
        assert list(entry["parameters"]) == [field.name for field in fields(PARTS[part][name])]


@pytest.mark.parametrize(
    ("part", "name", "key", "text"),
    [
        ("loss", "focal", "gamma", "= 2.0 (number >= 0)"),
        ("loss", "class_balanced", "beta", "(number >= 0 < 1)"),
        ("loss", "class_balanced", "base", '= "softmax" (one of "softmax", "sigmoid", "focal")'),
        ("model", "mlp", "width", "= 256 (whole number >= 1)"),
        ("model", "mlp", "weights_file", "(text)"),
        ("schedule", "step", "milestones", "= [0.8, 0.9] (list)"),
        ("schedule", "step", "per_epoch", "= false (true or false)"),
        ("data", "image_folder", "root", "(text, required)"),
        ("data", "image_folder", "channels", "= 3 (one of 1, 3)"),
        (
            "data",
            "digits",
            "tail",
            "= { bottom = 0.3 } (table of many, few, max_count, bottom, classes)",
        ),
        (
            "data",
            "digits",
            "profile",
            "(table with a name, one of exponential, step, keep, counts)",
        ),
    ],
)
def test_parameters_are_described_as_a_study_file_writes_them(
    part: str, name: str, key: str, text: str
) -> None:
    assert DESCRIBED[part][name]["parameters"][key] == text


def test_component_without_parameters_has_none() -> None:
    assert DESCRIBED["loss"]["cross_entropy"]["parameters"] == {}
