"""The best trial as files: recipe, weights, metrics and a model card; and training it again."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
import torch
from optuna.trial import FrozenTrial, TrialState

from tuner import __version__, checkpoint
from tuner.card import model_card
from tuner.datasets import Data
from tuner.errors import DataError, StorageError
from tuner.evaluation import Assessment, assess_validation, extras, intervals, recalls
from tuner.imbalance import log_priors
from tuner.ladder import is_judged, rung_of
from tuner.lane import Lane
from tuner.loaded import LoadedRecipe
from tuner.models import head_state
from tuner.posthoc import class_thresholds
from tuner.session import Session
from tuner.trained import stored_recipe, trained_lane
from tuner.trainer import epochs
from tuner.verdict import decide

RECIPE = "recipe.toml"
METRICS = "metrics.json"
WEIGHTS = "model.safetensors"
CARD = "README.md"


def export(
    session: Session, data: Data, folder: Path, *, number: int | None = None, device: str = "cpu"
) -> list[Path]:
    """Write a trial, by default the best one, into ``folder``; the files written.

    Raises:
        StorageError: There is no complete trial, or no trial of that number was trained to the
            end of its rung.
    """
    trial = find_trial(session, number)
    lane = trained_lane(session, trial, data, device)
    facts = measured(trial, lane, data)
    best = session.best()
    verdict = decide(session, data, device=device) if best and best.number == trial.number else None
    metrics = collect_metrics(session, trial, facts, data, verdict)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECIPE).write_text(recipe_text(session, trial, data), encoding="utf-8")
    save_weights(folder / WEIGHTS, lane, data)
    (folder / METRICS).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    card = model_card(session, trial, data, metrics)
    (folder / CARD).write_text(card, encoding="utf-8")
    return [folder / name for name in (RECIPE, WEIGHTS, METRICS, CARD)]


def find_trial(session: Session, number: int | None) -> FrozenTrial:
    """The trial of that number, trained to the end of its rung, or the best one for None.

    Raises:
        StorageError: There is none, or it is one of the confirm rung; the text says what there is.
    """
    if number is None:
        best = session.best()
        if best is None:
            raise StorageError(f"study {session.file.name!r} has no complete trial yet")
        return best
    judged = {t.number: t for t in session.trials() if is_judged(t)}
    again = judged[number].user_attrs.get("confirms") if number in judged else None
    if again is not None:
        raise StorageError(
            f"trial {number} trains the recipe of trial {again} again, on other images; "
            f"export that one: --trial {again}"
        )
    if number not in judged:
        complete = [n for n, t in judged.items() if t.state == TrialState.COMPLETE]
        known = ", ".join(map(str, sorted(complete)[:20])) or "none yet"
        raise StorageError(f"trial {number} is not complete; complete trials: {known}")
    return judged[number]


def measured(trial: FrozenTrial, lane: Lane, data: Data) -> dict[str, Any]:
    """What is stored of a trial; what the head rung does not store, from the model's logits."""
    attrs = dict(trial.user_attrs)
    missing = {"intervals", "recall_per_class", "extras", "sampling"} - attrs.keys()
    if not missing:
        return attrs
    logits, targets = lane.logits(data.validation.images), data.validation.targets.cpu()
    assessment = assess_validation(logits, data, lane.recipe)
    found = {
        "intervals": intervals(logits, assessment, data),
        "recall_per_class": recalls(assessment, data),
        "extras": extras(logits, *head_state(lane.model.head), targets, data.groups),
        "sampling": lane.samplers[-1].describe(),
    }
    return attrs | {key: found[key] for key in missing}


def recipe_text(session: Session, trial: FrozenTrial, data: Data) -> str:
    """The trial's recipe file, with its adjustment and where it comes from."""
    tables = {
        **stored_recipe(trial).to_dict(),
        "result": {
            "tau": deployed_tau(session, trial),
            "class_counts": data.class_counts.tolist(),
            "class_names": list(data.class_names),
            "mean": list(data.mean),
            "std": list(data.std),
        },
        "provenance": {
            "study": session.file.name,
            "trial": trial.number,
            "rung": rung_of(trial),
            "fingerprint": data.fingerprint,
            "tuner": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    return tomli_w.dumps(tables)


def deployed_tau(session: Session, trial: FrozenTrial) -> float:
    """The adjustment a trial is used with: the fitted τ, or none if the study asks for none."""
    return float(trial.user_attrs["tau"]) if session.file.objective.adjusted else 0.0


def collect_metrics(
    session: Session,
    trial: FrozenTrial,
    attrs: Mapping[str, Any],
    data: Data,
    verdict: dict[str, Any] | None,
) -> dict[str, Any]:
    """Everything measured of a trial: validation raw and adjusted, and the test part if judged.

    ``attrs`` are what ``measured`` found.
    """
    tau = deployed_tau(session, trial)
    return {
        "study": session.file.name,
        "trial": trial.number,
        "rung": rung_of(trial),
        "sampling": attrs["sampling"],
        "objective": {"metric": session.file.objective.metric, "value": trial.values[0]},
        "validation": attrs["metrics"],
        "intervals": attrs["intervals"],
        "recall_per_class": attrs["recall_per_class"],
        "tau": tau,
        "class_thresholds": class_thresholds(log_priors(data.class_counts), tau).tolist(),
        "posthoc": {"fitted_tau": attrs["tau"], **attrs["extras"]},
        "verdict": verdict,
    }


def save_weights(path: Path, lane: Lane, data: Data) -> None:
    """Write a trained model's weights, with class names and normalisation as metadata."""
    meta = {
        "class_names": list(data.class_names),
        "mean": list(data.mean),
        "std": list(data.std),
        "image_shape": list(data.image_shape),
        "digest": lane.recipe.digest(),
    }
    tensors = {name: tensor.contiguous() for name, tensor in lane.model.state_dict().items()}
    checkpoint.save(path, tensors, meta)


@dataclass(frozen=True)
class Retrained:
    """A recipe trained again: its validation metrics, and how far they are from the stored ones.

    ``largest_difference`` is None where no stored metrics were given.
    """

    lane: Lane
    assessment: Assessment
    largest_difference: float | None


def retrain(
    loaded: LoadedRecipe,
    data: Data,
    *,
    device: str = "cpu",
    stored: dict[str, Any] | None = None,
    on_epoch: Any = lambda _: None,
) -> Retrained:
    """Train a recipe from start to end and compare with the metrics stored beside it.

    Raises:
        DataError: The data are not those the recipe was found with.
    """
    known = loaded.provenance.get("fingerprint")
    if known and known != data.fingerprint:
        raise DataError(
            f"the data are not those the recipe was found with (fingerprint "
            f"{data.fingerprint[:12]}, the recipe has {known[:12]}); use the same files "
            "and the same version of Tuner, or "
            "remove fingerprint from [provenance] to train on these"
        )
    torch.set_num_threads(1)
    result = None
    for result in epochs(loaded.recipe, data, device=device):
        on_epoch(result)
    assert result is not None, "a recipe has at least one epoch"
    assessment = assess_validation(result.logits, data, loaded.recipe)
    return Retrained(result.lane, assessment, _difference(assessment, stored))


def _difference(assessment: Assessment, stored: dict[str, Any] | None) -> float | None:
    if stored is None:
        return None
    pairs = [
        (stored["validation"][kind][name], value)
        for kind, metrics in (("raw", assessment.raw), ("adjusted", assessment.adjusted))
        for name, value in metrics.items()
    ]
    return max(abs(a - b) if None not in (a, b) else float(a != b) for a, b in pairs)
