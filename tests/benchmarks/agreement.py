"""Do the cheap rungs rank recipes as full training does? 28 recipes, several seeds.

Every recipe is trained in full, its classifier alone on the features of the plain cross-entropy
network of the same seed, and from a shared checkpoint at 80 % of plain training on. All are scored
on the test part, which is large, so that little of what is seen is the noise of the scores; and the
cheap rungs by their validation scores too, which is all that a study has. Printed for every score:
Spearman's correlation per seed, and the regret of a rung's best three, in points: what the best of
them in full training is behind the best of all. The last rows, of full training with one seed
beside another, say how well anything could rank. A recipe that diverges has 0. ``--data`` is a
folder of images with ``train`` and ``test``.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from functools import cache
from itertools import permutations
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from tuner.checkpoint import Snapshot
from tuner.datasets import Data
from tuner.errors import NonFiniteError
from tuner.evaluation import Assessment, adjusted_logits, assess_validation
from tuner.heads import HeadTraining, cached_features, train_heads
from tuner.lane import Lane
from tuner.metrics import evaluate
from tuner.models import Classifier
from tuner.recipe import PARTS, Recipe
from tuner.samplers import SAMPLERS
from tuner.statistics import rank_correlation
from tuner.trainer import epochs

SWITCH = 0.8
SCORES = ("balanced_accuracy", "tail_accuracy")
Scores = dict[str, float]
WORST = {f"{kind} {name}": 0.0 for kind in ("raw", "adjusted") for name in SCORES}


def parts() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Losses with natural sampling, and some with samplers."""
    losses: list[dict[str, Any]] = [
        {"name": "cross_entropy"},
        {"name": "label_smoothing", "eps": 0.1},
        *({"name": "weighted_cross_entropy", "power": p} for p in (0.25, 0.5, 0.75, 1.0)),
        *({"name": "class_balanced", "beta": b} for b in (0.9, 0.99, 0.999, 0.9999)),
        {"name": "class_balanced", "beta": 0.999, "base": "sigmoid"},
        {"name": "class_balanced", "beta": 0.9999, "base": "focal"},
        {"name": "asymmetric", "eps": 0.1, "gamma_neg": 2.0},
        *({"name": "weighted_asymmetric", "eps": 0.1, "power": p} for p in (0.5, 1.0)),
        {"name": "focal", "gamma": 2.0},
        *({"name": "logit_adjusted", "tau": t} for t in (0.5, 1.0, 1.5)),
        {"name": "vector_scaling", "gamma": 0.2, "tau": 0.5},
        {"name": "ldam"},
        {"name": "ldam", "beta": 0.9999},
    ]
    natural = {"name": "natural"}
    aware = [{"name": "class_aware", "exponent": e} for e in (0.25, 0.5, 1.0)]
    mixed = [
        *((losses[0], sampler) for sampler in aware),
        ({"name": "weighted_cross_entropy", "power": 0.5}, aware[1]),
        ({"name": "logit_adjusted", "tau": 0.5}, aware[1]),
        ({"name": "focal", "gamma": 2.0}, aware[1]),
    ]
    return [(loss, natural) for loss in losses] + mixed


def recipes(given: argparse.Namespace, seed: int) -> list[Recipe]:
    """All recipes with one seed; plain cross-entropy is the first."""
    profile = {"name": "exponential", "ratio": given.ratio}
    data = {"name": "image_folder", "root": str(given.data), "image_size": given.size}
    carved = {"profile": profile} if given.ratio > 1 else {}
    shared = {
        "data": {**data, **carved, "tail": {"bottom": 0.3}},
        "model": {"name": given.model},
        "augment": {"name": "standard"},
        "schedule": {"name": "step"},
        "epochs": given.epochs,
        "seed": seed,
    }
    return [
        Recipe.from_dict({**shared, "loss": loss, "sampler": sampler}) for loss, sampler in parts()
    ]


def scores(logits: torch.Tensor, tau: float, data: Data) -> Scores:
    """Scores of test logits as they are, and adjusted with a τ found on validation."""
    assert data.test is not None
    found: Scores = {}
    for kind, of in (
        ("raw", logits),
        ("adjusted", adjusted_logits(logits, data.class_counts, tau)),
    ):
        metrics = evaluate(of, data.test.targets, data.groups)
        found |= {f"{kind} {name}": metrics[name] or 0.0 for name in SCORES}
    return found


@cache
def data_of(table: str) -> Data:
    """The data of a recipe; each process decodes them once."""
    data: Data = Recipe.from_dict(json.loads(table)).data.build(None)
    return data


def load(recipe: Recipe) -> Data:
    """The data of a recipe."""
    return data_of(json.dumps({key: recipe.to_dict()[key] for key in ("data", "model", "epochs")}))


def in_full(task: tuple[Recipe, Path]) -> Scores:
    """Train a recipe; its scores, and the first one's network."""
    recipe, keep = task
    data, lane = load(recipe), last_lane(recipe)
    if lane is None:
        return dict(WORST)
    assert data.test is not None
    assessment = assess_validation(lane.logits(data.validation.images), data, recipe)
    if recipe.loss.__class__.__name__ == "CrossEntropy" and recipe.sampler.is_natural(0.0):
        torch.save(lane.model.state_dict(), keep)
    return scores(lane.logits(data.test.images), assessment.tau, data)


def last_lane(recipe: Recipe, resume: Snapshot | None = None) -> Lane | None:
    """A trained recipe; None when it diverged."""
    torch.set_num_threads(1)
    lane = None
    try:
        for result in epochs(recipe, load(recipe), resume=resume):
            lane = result.lane
    except NonFiniteError:
        return None
    return lane


@cache
def stage_one(seed: int, text: str) -> Snapshot:
    """The state of a deferred training at its switch; each process trains it once per seed."""
    recipe = Recipe.from_dict(json.loads(text))
    for result in epochs(recipe, load(recipe)):
        if result.epoch + 1 == recipe.switch_epoch():
            return result.snapshot()
    raise AssertionError(f"seed {seed}: the switch is before the end")


def branched(recipe: Recipe) -> tuple[Scores, Scores]:
    """Scores of a recipe that acts from the switch on: on test, and on validation."""
    training = PARTS["training"]["deferred"](
        batch_size=recipe.training.batch_size, precision=recipe.training.precision, switch=SWITCH
    )
    recipe = replace(recipe, training=training)
    plain = replace(recipe, loss=PARTS["loss"]["cross_entropy"](), sampler=SAMPLERS["natural"]())
    data, resume = load(recipe), None
    if plain.stage_one_key() == recipe.stage_one_key():
        resume = stage_one(recipe.seed, json.dumps(plain.to_dict()))
    lane = last_lane(recipe, resume)
    if lane is None:
        return dict(WORST), dict(WORST)
    assert data.test is not None
    assessment = assess_validation(lane.logits(data.validation.images), data, recipe)
    test = scores(lane.logits(data.test.images), assessment.tau, data)
    return test, of_validation(assessment)


def of_validation(assessment: Assessment) -> Scores:
    """The scores that a study sees."""
    return {
        f"{kind} {name}": metrics[name] or 0.0
        for kind, metrics in (("raw", assessment.raw), ("adjusted", assessment.adjusted))
        for name in SCORES
    }


def by_heads(found: list[Recipe], weights: Path, folder: Path) -> list[tuple[Scores, Scores]]:
    """Scores of every recipe's classifier on the plain network: on test, and on validation."""
    data = load(found[0])
    lane = Lane(found[0], data, "cpu")
    lane.model.load_state_dict(torch.load(weights, weights_only=True))
    lane.model.eval()
    settings = HeadTraining()
    features = cached_features(
        lane.model,
        data,
        lane.augment,
        copies=settings.copies,
        seed=found[0].seed,
        folder=folder,
    )
    answers: dict[int, tuple[Scores, Scores]] = {}
    for index, result in train_heads(found, features, data, settings):
        assessment = assess_validation(result.logits, data, found[index])
        logits = _test_logits(found[index], lane.model, result, data)
        answers[index] = (scores(logits, assessment.tau, data), of_validation(assessment))
    return [answers[index] for index in range(len(found))]


def _test_logits(recipe: Recipe, network: Classifier, result: Any, data: Data) -> torch.Tensor:
    assert data.test is not None
    lane = Lane(recipe, data, "cpu")
    lane.model.backbone.load_state_dict(network.backbone.state_dict())
    head = {"weight": result.weight, **({} if result.bias is None else {"bias": result.bias})}
    lane.model.head.load_state_dict(head)
    return lane.logits(data.test.images)


def regret(lower: list[float], upper: list[float], top: int = 3) -> float:
    """Points that the best of the lower rung's ``top`` is behind the best of all."""
    chosen = sorted(range(len(lower)), key=lambda i: -lower[i])[:top]
    return 100 * (max(upper) - max(upper[i] for i in chosen))


def correlation(pairs: list[tuple[float, float]]) -> float:
    """Spearman's; NaN where all scores of a side are one, as of a tail that is never right."""
    found = rank_correlation(pairs)
    return math.nan if found is None else found[0]


def rows(
    rung: str, full: list[Scores], cheap: list[tuple[Scores, Scores]]
) -> Iterator[tuple[str, float, float]]:
    """Correlation and regret by score."""
    for name in full[0]:
        upper = [each[name] for each in full]
        for part, place in (("test", 0), ("validation", 1)):
            lower = [pair[place][name] for pair in cheap]
            found = correlation(list(zip(lower, upper, strict=True)))
            yield f"{name}, {rung} rung scored on {part}", found, regret(lower, upper)


def other_seeds(seeds: list[list[Scores]]) -> Iterator[tuple[str, float, float]]:
    """Correlation and regret, by score, of full training with every seed beside every other."""
    for lower, upper in permutations(seeds, 2):
        for name in lower[0]:
            pairs = [(low[name], up[name]) for low, up in zip(lower, upper, strict=True)]
            lost = regret([low for low, _ in pairs], [up for _, up in pairs])
            yield f"{name}, full training with another seed", correlation(pairs), lost


def main() -> None:
    """Train everything, print the table, keep the scores if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--model", default="small_cnn")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--ratio", type=float, default=100.0, help="1 to carve nothing")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--keep", type=Path, help="JSON of all scores; goes on from it")
    given = parser.parse_args()
    given.data = given.data.resolve()
    found: dict[str, list[tuple[float, float]]] = {}
    kept = json.loads(given.keep.read_text()) if given.keep and given.keep.exists() else []
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name, context.Pool(given.processes) as pool:
        folder = Path(name)
        for seed in range(len(kept), given.seeds):
            weights = folder / f"{seed}.pt"
            all_of_them = recipes(given, seed)
            full = pool.map(in_full, [(r, weights) for r in all_of_them], chunksize=1)
            heads = by_heads(all_of_them, weights, folder)
            late = pool.map(branched, all_of_them, chunksize=1)
            kept.append({"full": full, "heads": heads, "deferred": late})
            if given.keep:
                given.keep.write_text(json.dumps(kept))
    for each in kept:
        for rung, cheap in (("head", each["heads"]), ("deferred", each["deferred"])):
            for label, ranks, lost in rows(rung, each["full"], cheap):
                found.setdefault(label, []).append((ranks, lost))
    for label, ranks, lost in other_seeds([each["full"] for each in kept]):
        found.setdefault(label, []).append((ranks, lost))
    print(f"{date.today()}, {given.model}, {given.epochs} epochs, {len(parts())} recipes")
    print("| score | Spearman per seed | mean | regret of the best three, points | mean |")
    print("|---|---|---|---|---|")
    for label, pairs in found.items():
        columns = [[pair[side] for pair in pairs] for side in (0, 1)]
        cells = [f"{', '.join(f'{v:.2f}' for v in c)} | {mean(c):.2f}" for c in columns]
        print(f"| {label} | {cells[0]} | {cells[1]} |")


if __name__ == "__main__":
    main()
