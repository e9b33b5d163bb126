"""The head rung on a user's own weights: what Tuner exported, given to the next study."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from climbers import CLIMBING
from conftest import MakeSession
from optuna.trial import FrozenTrial

from tuner import checkpoint
from tuner.datasets import Data
from tuner.errors import TunerError
from tuner.export import WEIGHTS, export
from tuner.heads import cached_features, train_heads
from tuner.ladder import rung_of
from tuner.lane import Lane
from tuner.metrics import evaluate
from tuner.session import Session
from tuner.trained import Backbone, backbone, stored_recipe
from tuner.worker import work

MODEL = {"name": "mlp", "width": 12}
HEAD = {"trials": 24, "epochs": 4, "steps": 0, "backbone": "initial"}


@pytest.fixture
def exported(make_session: MakeSession, digits: Data, tmp_path: Path) -> Path:
    """Weights as users have them: of a model that another study trained."""
    session = make_session(name="earlier", budget={"trials": 1, "epochs": 40}, model=MODEL)
    work(session, digits)
    export(session, digits, tmp_path / "best")
    return tmp_path / "best" / WEIGHTS


def climbing(make: MakeSession, weights: Path) -> Session:
    return make(
        **CLIMBING
        | {
            "budget": {"trials": 4, "epochs": 2},
            "ladder": {"rungs": ["head", "full"], "head": HEAD},
            "model": MODEL | {"weights_file": str(weights)},
        }
    )


def trials(session: Session) -> dict[str, list[FrozenTrial]]:
    rungs = Counter(map(rung_of, session.trials()))
    return {rung: [t for t in session.trials() if rung_of(t) == rung] for rung in rungs}


def test_head_and_full_rung_start_from_the_weights_a_study_exported(
    exported: Path, make_session: MakeSession, digits: Data, tmp_path: Path
) -> None:
    session = climbing(make_session, exported)
    work(session, digits)
    found = trials(session)
    assert {rung: len(those) for rung, those in found.items()} == {"head": 24, "full": 4}
    weights, _ = checkpoint.load(exported)
    used = backbone(session, digits, "cpu", tmp_path / "features")
    for lane in (used.lane, Lane(stored_recipe(found["full"][-1]), digits, "cpu")):
        for name, tensor in lane.model.backbone.state_dict().items():
            assert torch.equal(tensor, weights[f"backbone.{name}"])
    typical = median(t.user_attrs["metrics"]["raw"]["accuracy"] for t in found["head"])
    assert typical > accuracy_on(drawn(used, digits, tmp_path), session, digits) + 0.1


def drawn(used: Backbone, data: Data, folder: Path) -> Backbone:
    """The same network with the weights it is initialised with, and its features."""
    recipe = used.lane.recipe
    lane = Lane(replace(recipe, model=replace(recipe.model, weights_file=None)), data, "cpu")
    options: dict[str, Any] = {"copies": 2, "seed": recipe.seed, "folder": folder}
    return Backbone(lane, cached_features(lane.model, data, lane.augment, **options))


def accuracy_on(used: Backbone, session: Session, data: Data) -> float:
    """Validation accuracy of a plain classifier on the features of a network."""
    settings = session.file.ladder.head
    ((_, result),) = train_heads([used.lane.recipe], used.features, data, settings)
    accuracy = evaluate(result.logits, data.validation.targets, data.groups)["accuracy"]
    assert accuracy is not None
    return accuracy


def test_file_that_is_missing_or_of_another_model_is_refused_before_anything_is_trained(
    exported: Path, make_session: MakeSession, tmp_path: Path
) -> None:
    with pytest.raises(TunerError, match=r"model: weights_file: .*gone\.pth: no such file"):
        climbing(make_session, tmp_path / "gone.pth")
    wider = {"name": "mlp", "width": 13, "weights_file": str(exported)}
    with pytest.raises(
        TunerError, match=r"model\.safetensors: other sizes .* of another \[model\]"
    ):
        make_session(**CLIMBING | {"model": wider})
