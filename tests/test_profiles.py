"""Long-tail profiles: published counts, who becomes tail, and profiles that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from tuner.datasets import DATASETS, PROFILES, Dataset
from tuner.datasets._profiles import carved_counts
from tuner.errors import DataError, UnknownNameError
from tuner.imbalance import imbalance_ratio

GOLDEN = json.loads((Path(__file__).parent / "golden" / "longtail.json").read_text())


def carve(name: str, available: list[int], *, seed: int | None = None, **fields: Any) -> list[int]:
    counts: Tensor = carved_counts(
        PROFILES[name](**fields),
        torch.tensor(available),
        [f"class{i}" for i in range(len(available))],
        permutation_seed=seed,
    )
    return [int(count) for count in counts]


def digits(profile: Any) -> Dataset:
    return DATASETS["digits"](profile=profile)


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden["name"])
def test_exponential_counts_are_the_published_ones(golden: dict[str, Any]) -> None:
    ratio = int(golden["name"].split("_if")[1])
    counts = golden["counts"]
    full = [counts[0]] * len(counts)
    assert carve("exponential", full, ratio=ratio) == counts
    assert carve("exponential", [9000] * len(counts), ratio=ratio, n_max=counts[0]) == counts


def test_the_150_by_500_and_50_by_10_to_50_profile_is_one_line_of_a_study_file() -> None:
    line = {
        "name": "step",
        "groups": [{"classes": 150, "count": 500}, {"classes": 50, "low": 10, "high": 50}],
    }
    profile = digits(line).profile
    assert profile is not None
    counts = profile.carve(torch.full((200,), 500)).tolist()
    assert counts[:150] == [500] * 150
    assert counts[150] == 50
    assert counts[-1] == 10
    assert counts == sorted(counts, reverse=True)
    assert sum(counts[150:]) == 50 * 30


def test_nine_to_one_keeps_most_of_one_class_and_a_tenth_of_the_others() -> None:
    counts = carve("keep", [1000] * 10, classes=[0], keep=0.9, others=0.1)
    assert counts == [900] + [100] * 9
    assert imbalance_ratio(torch.tensor(counts)) == 9


def test_explicit_counts_go_to_the_classes_in_their_order() -> None:
    assert carve("counts", [9, 9, 9], counts=[7, 1, 9]) == [7, 1, 9]


def test_order_by_size_gives_the_largest_count_to_the_largest_class() -> None:
    assert carve("counts", [5, 30, 10], counts=[20, 8, 2], order="size") == [2, 20, 8]


def test_permutation_changes_who_is_tail_but_not_how_many() -> None:
    plain = carve("exponential", [100] * 20, ratio=10)
    one, same, other = (carve("exponential", [100] * 20, ratio=10, seed=s) for s in (1, 1, 2))
    assert one == same
    assert len({tuple(plain), tuple(one), tuple(other)}) == 3
    assert sorted(plain) == sorted(one) == sorted(other)


@given(
    n_max=st.integers(20, 200),
    spare=st.lists(st.integers(0, 200), min_size=2, max_size=30),
    ratio=st.floats(1, 20),
)
def test_exponential_by_size_falls_from_n_max_to_n_max_over_ratio(
    n_max: int, spare: list[int], ratio: float
) -> None:
    available = [n_max + more for more in spare]
    counts = carve("exponential", available, ratio=ratio, n_max=n_max, order="size")
    order = sorted(range(len(counts)), key=lambda c: (-available[c], c))
    ranked = [counts[c] for c in order]
    assert ranked == sorted(ranked, reverse=True)
    assert (ranked[0], ranked[-1]) == (n_max, int(n_max * (1 / ratio)))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("counts", {"counts": [1, 2, 3, 4]}, "4 classes, but the data have 3"),
        ("counts", {"counts": [1, 2]}, "2 classes, but the data have 3"),
        ("step", {"groups": [{"classes": 150, "count": 5}]}, "150 classes, but the data have 3"),
        ("counts", {"counts": [10, 11, 3]}, "'class1' should keep 11 images, but 10 are there"),
        ("exponential", {"ratio": 2, "n_max": 50}, "'class0' should keep 50 images"),
        ("exponential", {"ratio": 1000}, "'class1' would keep no image .*like this: 2"),
        ("keep", {"others": 0.01}, "'class1' would keep no image of its 10"),
        ("keep", {"classes": [3]}, "no class 3"),
    ],
)
def test_a_profile_that_does_not_fit_says_where(
    name: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        carve(name, [10, 10, 10], **fields)


def test_permutation_and_order_by_size_exclude_each_other() -> None:
    with pytest.raises(DataError, match="exclude each other"):
        carve("exponential", [10, 10], ratio=2, order="size", seed=0)


@pytest.mark.parametrize(
    ("profile", "where"),
    [
        ({"name": "exponential", "ratio": 0.01}, "profile.ratio"),
        ({"name": "exponential"}, "profile.ratio"),
        ({"name": "exponential", "ratio": 10, "n": 5}, "profile.n"),
        ({"name": "counts", "counts": [3, 0]}, r"profile.counts.1"),
        ({"name": "step", "groups": []}, "profile.groups"),
        ({"name": "step", "groups": [{"classes": 2}]}, "give either count, or low and high"),
        ({"name": "step", "groups": [{"classes": 2, "low": 1}]}, "give either count"),
        (
            {"name": "step", "groups": [{"classes": 2, "count": 5, "low": 1, "high": 3}]},
            "give either count",
        ),
        ({"name": "step", "groups": [{"classes": 2, "low": 9, "high": 3}]}, "low = 9 is above"),
        ({"ratio": 10}, "give the profile a name, one of counts, exponential, keep, step"),
        ("exponential", "profile"),
    ],
)
def test_an_absurd_profile_names_the_key(profile: Any, where: str) -> None:
    with pytest.raises(ValidationError, match=where):
        digits(profile)


def test_an_unknown_profile_suggests_the_known_one() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'exponential'"):
        digits({"name": "exponentail", "ratio": 10})


@pytest.mark.parametrize("name", ["smote", "SMOTE", "borderline_smote"])
def test_smote_of_pixels_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(UnknownNameError, match=r"ghost image.*class_aware sampler"):
        digits({"name": name})
    with pytest.raises(UnknownNameError, match="ghost image"):
        DATASETS[name]
