"""Compiled training passes: one for all lanes of a kind, and the same training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeSession
from optuna.trial import TrialState
from torch import Tensor
from trainer_cases import VARIED, recipe

from tuner import compiled
from tuner.datasets import Data
from tuner.errors import TunerError
from tuner.lane import Lane
from tuner.stores import FolderStore
from tuner.worker import work

pytestmark = pytest.mark.long

CASES = ("plain", "batch norm and cosine head", "two stages, classifier only")


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[Any, Any]]:
    """Passes are traced but not translated: that takes a C++ compiler, and minutes."""
    made: dict[Any, Any] = {}
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    monkeypatch.setattr(compiled, "_made", made)
    monkeypatch.setattr(compiled, "_passes", set())
    monkeypatch.setattr(compiled, "_kept", {})
    yield made
    torch.compiler.reset()


def stepped(
    parts: dict[str, Any], data: Data, *, compiles: bool, epoch: int = 0
) -> dict[str, Tensor]:
    """State of a model after an epoch."""
    lane = Lane(recipe(**parts), data, "cpu")
    lane.compiles, lane.epoch = compiles, epoch
    lane.begin_epoch()
    for indices, images in lane.images(lane.plan()):
        lane.step(indices, images, share=0.0)
    return dict(lane.model.state_dict())


@pytest.mark.parametrize("case", CASES)
def test_compiled_passes_train_the_same(case: str, digits: Data) -> None:
    plain = stepped(VARIED[case], digits, compiles=False)
    other = stepped(VARIED[case], digits, compiles=True)
    assert plain.keys() == other.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-6)


def test_lanes_of_a_kind_share_what_was_compiled(digits: Data, traced: dict[Any, Any]) -> None:
    for rate in (0.05, 0.1):
        stepped({"optimizer": {"name": "sgd", "lr": rate}}, digits, compiles=True)
    assert len(traced) == 1
    stepped({"model": {"name": "small_cnn"}}, digits, compiles=True)
    assert len(traced) == 2


def test_stage_that_freezes_the_backbone_is_compiled_apart(
    digits: Data, traced: dict[Any, Any]
) -> None:
    parts = VARIED["two stages, classifier only"]
    stepped(parts, digits, compiles=True)
    after = stepped(parts, digits, compiles=True, epoch=2)
    assert len(traced) == 2
    fresh = Lane(recipe(**parts), digits, "cpu").model.state_dict()
    frozen = [name for name in fresh if name.startswith("backbone.")]
    assert all(torch.equal(after[name], fresh[name]) for name in frozen)


def test_what_was_compiled_is_kept_for_others_and_fetched_once(
    digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FolderStore(tmp_path)
    loaded: list[bytes] = []
    monkeypatch.setattr(compiled, "_fetched", set())
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"code", None))
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", loaded.append)
    monkeypatch.setenv("TUNER_COMPILE", "1")
    compiled.keep(store, "GPU")
    assert store.keys() == [], "nothing was compiled"
    compiled.fetch(store, "GPU")
    assert loaded == [], "nobody left anything"
    stepped({}, digits, compiles=True)
    compiled.keep(store, "GPU")
    assert store.read("compiled/GPU") == b"code"
    compiled.fetch(store, "GPU")
    assert loaded == [], "asked for once"
    compiled.fetch(store, "another GPU")
    monkeypatch.setattr(compiled, "_fetched", set())
    compiled.fetch(store, "GPU")
    assert loaded == [b"code"]


def test_what_is_compiled_later_is_kept_too_and_nothing_is_kept_twice(
    digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, saved = FolderStore(tmp_path), list[bytes]()

    def save() -> tuple[bytes, None]:
        saved.append(b"code")
        return b"code", None

    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", save)
    for model, expected in (("linear", 1), ("linear", 1), ("small_cnn", 2)):
        stepped({"model": {"name": model}}, digits, compiles=True)
        compiled.keep(store, "GPU")
        assert len(saved) == expected


def test_nothing_is_fetched_unless_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FolderStore(tmp_path)
    store.write("compiled/GPU", b"somebody's code")
    monkeypatch.setattr(compiled, "_fetched", set())
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", lambda _: pytest.fail("loaded"))
    monkeypatch.delenv("TUNER_COMPILE", raising=False)
    compiled.fetch(store, "GPU")


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        *((yes, True) for yes in ("1", "true", "True", "yes", " on ")),
        *((no, False) for no in ("0", "false", "NO", "off", "")),
    ],
)
def test_the_user_may_answer_as_people_do(
    said: str, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNER_COMPILE", said)
    assert compiled.is_wanted() == wanted


def test_what_is_no_answer_is_refused_before_a_trial_is_taken(
    make_session: MakeSession, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNER_COMPILE", "2")
    session = make_session()
    with pytest.raises(TunerError, match="TUNER_COMPILE=2: give 1 .* or 0"):
        work(session, digits)
    assert {trial.state for trial in session.trials()} == {TrialState.WAITING}
