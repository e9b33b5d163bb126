"""Precision and layout are taken by what a probe measured, and the recipe says which."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeSession
from fleet import run_next
from trainer_cases import recipe, trained

from tuner import backends
from tuner.backends import PRECISIONS, SMALLEST, Speed, all_speeds, fastest, settled, speeds
from tuner.datasets import Data
from tuner.lane import Lane
from tuner.recipe import Recipe
from tuner.training import SingleStage

MEASURED = [
    Speed("float32", "channels_last", 100.0),
    Speed("float32", "contiguous", 90.0),
    Speed("bfloat16", "channels_last", 180.0),
    Speed("bfloat16", "contiguous", 200.0),
]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path))
    return tmp_path / "speeds.json"


def found(monkeypatch: pytest.MonkeyPatch, measured: list[Speed]) -> None:
    """Let the probe find these speeds."""
    monkeypatch.setattr(backends, "_one_by_one", lambda *_: iter(measured))


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ({}, ("bfloat16", "contiguous")),
        ({"layout": "channels_last"}, ("bfloat16", "channels_last")),
        ({"precision": "float32"}, ("float32", "channels_last")),
        ({"precision": "bfloat16"}, ("bfloat16", "contiguous")),
    ],
)
def test_fastest_that_the_recipe_allows_is_taken(
    training: dict[str, Any], expected: tuple[str, str]
) -> None:
    best = fastest(SingleStage(**training), MEASURED)
    assert (best.precision, best.layout) == expected


def test_where_norms_are_not_fused_that_layout_is_channels_last() -> None:
    best = fastest(SingleStage(layout="fused"), MEASURED)
    assert (best.precision, best.layout) == ("bfloat16", "channels_last")
    fusing = [*MEASURED, Speed("bfloat16", "fused", 150.0)]
    assert fastest(SingleStage(layout="fused"), fusing).layout == "fused"


def test_little_gain_is_no_reason_to_leave_float32() -> None:
    close = [MEASURED[0], Speed("bfloat16", "channels_last", 104.0)]
    assert fastest(SingleStage(), close) == MEASURED[0]


def test_probe_measures_what_exists_here_once(
    digits: Data, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = speeds(recipe(), digits, "cpu")
    assert {speed.precision for speed in measured} <= set(PRECISIONS)
    assert measured[0].precision == "float32"
    assert all(speed.images > 0 for speed in measured)
    (key,) = json.loads(cache.read_text())
    assert key.startswith("mlp ")
    found(monkeypatch, [])
    assert speeds(recipe(), digits, "cpu") == measured


def test_candidate_that_does_not_work_here_is_left_out(
    digits: Data, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(lane: Lane, *_: object, **__: object) -> None:
        if lane.recipe.training.precision == "bfloat16":
            raise RuntimeError("not implemented for 'BFloat16'")

    monkeypatch.setattr(Lane, "step", step)
    assert {speed.precision for speed in speeds(recipe(), digits, "cpu")} == {"float32"}


def test_candidate_that_is_far_behind_with_a_few_images_never_sees_a_batch(
    digits: Data, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, seen = [0.0], []

    def step(lane: Lane, indices: torch.Tensor, *_: object, **__: object) -> None:
        precision = lane.recipe.training.precision
        seen.append((precision, len(indices)))
        now[0] += len(indices) * (10 if precision == "bfloat16" else 1)

    monkeypatch.setattr(Lane, "step", step)
    monkeypatch.setattr(backends, "_clock", lambda _: now[0])
    rates = {(speed.precision, speed.images) for speed in speeds(recipe(), digits, "cpu")}
    assert rates == {("float32", 1.0), ("bfloat16", 0.1)}
    assert {size for precision, size in seen if precision == "bfloat16"} == {SMALLEST}
    assert ("float32", 64) in seen


def test_probe_in_which_nothing_works_is_not_kept_and_leaves_the_plain_choice(
    digits: Data, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Lane, "step", step)
    training = settled(recipe(), digits, "cpu").training
    assert (training.precision, training.layout) == ("float32", "channels_last")
    assert not cache.exists()


def test_damaged_or_unwritable_cache_costs_a_probe_and_nothing_else(
    digits: Data, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found(monkeypatch, MEASURED)
    cache.write_text("[torn")
    assert speeds(recipe(), digits, "cpu") == MEASURED
    monkeypatch.setenv("TUNER_CACHE", str(cache))
    assert speeds(recipe(), digits, "cpu") == MEASURED


@pytest.mark.parametrize("rows", [[{"images": 1.0, "newer": 2}], ["torn"]])
def test_speeds_that_another_version_wrote_are_measured_anew(
    digits: Data, cache: Path, monkeypatch: pytest.MonkeyPatch, rows: list[Any]
) -> None:
    found(monkeypatch, MEASURED)
    assert speeds(recipe(), digits, "cpu") == MEASURED
    entries = json.loads(cache.read_text())
    cache.write_text(json.dumps({key: {**entry, "rows": rows} for key, entry in entries.items()}))
    assert list(all_speeds()) == []
    assert speeds(recipe(), digits, "cpu") == MEASURED
    assert speeds(recipe(), digits, "cpu") == [speed for _, each in all_speeds() for speed in each]


def test_probing_leaves_the_global_generator_and_the_training_alone(
    digits: Data, cache: Path
) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    speeds(recipe(model={"name": "mlp", "dropout": 0.5}), digits, "cpu")
    assert torch.equal(torch.rand(1), expected)


def test_recipe_that_leaves_nothing_open_is_not_probed(digits: Data) -> None:
    plain = recipe(training={"precision": "float32", "layout": "channels_last"})
    assert settled(plain, digits, "nowhere") is plain


def test_what_nobody_chose_is_float32_in_channels_last(digits: Data) -> None:
    chosen = recipe(
        training={"batch_size": 64, "precision": "float32", "layout": "channels_last"},
    )
    assert recipe().digest() == chosen.digest()
    first, second = trained(recipe(), digits), trained(chosen, digits)
    assert all(torch.equal(a, b) for a, b in zip(first.logits, second.logits, strict=True))


def test_layout_is_that_of_the_model(digits: Data) -> None:
    for layout, expected in (("channels_last", True), ("contiguous", False)):
        which = recipe(model={"name": "small_cnn"}, training={"layout": layout})
        weight = Lane(which, digits, "cpu").model.backbone[4].weight  # type: ignore[index]
        assert weight.is_contiguous(memory_format=torch.channels_last) == expected


@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "fused"])
def test_maps_of_grey_images_lie_as_those_of_others(digits: Data, layout: str) -> None:
    which = recipe(model={"name": "small_cnn"}, training={"batch_size": 64, "layout": layout})
    lane = Lane(which, digits, "cpu")
    lane.begin_epoch()
    found: list[bool] = []

    def look(_: object, __: object, maps: torch.Tensor) -> None:
        found.append(maps.is_contiguous(memory_format=torch.channels_last))

    lane.model.backbone[0].register_forward_hook(look)  # type: ignore[index]
    lane.logits(digits.validation.images)
    for indices, images in lane.images(lane.plan()[:1]):
        lane.step(indices, images, share=0.0)
    assert set(found) == {layout != "contiguous"}


def test_trial_is_stored_with_what_it_was_trained_in(
    make_session: MakeSession, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    found(monkeypatch, MEASURED)
    monkeypatch.setenv("TUNER_CACHE", "/dev/null")
    session = make_session()
    run_next(session, digits)
    stored = Recipe.from_dict(session.study.trials[0].user_attrs["recipe"])
    assert (stored.training.precision, stored.training.layout) == ("bfloat16", "contiguous")
    assert session.study.trials[0].user_attrs["digest"] == stored.digest()


def test_interrupted_trial_goes_on_in_the_precision_it_began_in(
    make_session: MakeSession, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNER_CACHE", "/dev/null")
    found(monkeypatch, MEASURED)
    session = make_session()
    run_next(session, digits, stop=lambda: True)
    found(monkeypatch, MEASURED[:1])
    run_next(session, digits)
    training = session.study.trials[0].user_attrs["recipe"]["training"]
    assert (training["precision"], training["layout"]) == ("bfloat16", "contiguous")


def test_choice_changes_the_digest(digits: Data) -> None:
    half = recipe(training={"batch_size": 64, "precision": "bfloat16"})
    assert half.digest() != recipe().digest()
    assert replace(half, seed=8).digest() != half.digest()


@pytest.mark.parametrize(
    ("changes", "probes"),
    [
        ({"model": {"name": "mlp", "dropout": 0.3}}, 1),
        ({"model": {"name": "mlp", "dropout": 0.0}}, 2),
        ({"model": {"name": "mlp", "dropout": 0.1, "width": 32}}, 2),
        ({"training": {"batch_size": 100}}, 1),
        ({"training": {"batch_size": 256}}, 2),
    ],
)
def test_what_a_search_varies_without_another_speed_is_not_measured_anew(
    changes: dict[str, Any],
    probes: int,
    cache: Path,
    digits: Data,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found(monkeypatch, MEASURED)
    model, training = {"name": "mlp", "dropout": 0.1}, {"batch_size": 128}
    first: dict[str, Any] = {"model": model, "training": training}
    for parts in (first, first | changes):
        speeds(recipe(**parts), digits, "cpu")
    assert len(json.loads(cache.read_text())) == probes
