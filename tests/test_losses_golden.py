from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tuner import losses
from tuner.imbalance import (
    WeightNormalization,
    effective_number,
    effective_number_weights,
    normalize_weights,
    power_weights,
)
from tuner.losses import Loss, Reduction

GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parent / "golden" / "losses.json").read_text(encoding="utf-8")
)
VECTORS = {vector["name"]: vector for vector in GOLDEN["losses"]}
SCHEMES: dict[str, tuple[float, WeightNormalization]] = {
    "inv_sumC": (1.0, "classes"),
    "sqrtinv_sumC": (0.5, "classes"),
    "sqrtinv_raw": (0.5, "none"),
    "balanced": (1.0, "samples"),
}


def double(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def assert_exact(actual: Tensor, expected: Any, message: str = "") -> None:
    torch.testing.assert_close(
        actual.detach(), double(expected), atol=1e-12, rtol=1e-10, msg=message or None
    )


def reduction_of(vector: dict[str, Any]) -> Reduction:
    text = vector["args"].get("reduction", "")
    return "weighted" if "sum(w)" in text or text == "torch" else "batch"


def weighted(vector: dict[str, Any], counts: Tensor, **options: Any) -> Loss:
    args, scheme = vector["args"], vector["args"]["weights"]
    kind = losses.WeightedCrossEntropyLoss
    if "gamma_pos" in args:
        kind = losses.WeightedAsymmetricLoss  # type: ignore[assignment]
        options |= {name: args[name] for name in ("gamma_pos", "gamma_neg", "eps")}
    if match := re.fullmatch(r"cb([\d.]+)", scheme):
        options["class_weights"] = losses.class_balanced_weights(counts, float(match[1]), "classes")
    else:
        options["power"], options["normalization"] = SCHEMES[scheme]
    return kind(counts, reduction=reduction_of(vector), **options)


def build(vector: dict[str, Any], counts: Tensor) -> Loss:
    args, method = vector["args"], vector["method"]
    smoothing = args.get("label_smoothing", 0.0)
    if method.startswith("cross_entropy"):
        return losses.CrossEntropyLoss(counts, label_smoothing=smoothing)
    if method.startswith(("weighted_ce", "weighted_asl")):
        return weighted(vector, counts, label_smoothing=smoothing)
    if method.startswith("class_balanced"):
        base = method.removeprefix("class_balanced_")
        gamma = args["gamma"] or 0.0
        return losses.ClassBalancedLoss(
            counts, beta=args["beta"], base=base, gamma=gamma, normalization="classes"
        )
    if method == "ldam":
        beta = 0.0 if args["weight"] == "none" else float(args["weight"].removeprefix("cb"))
        return losses.LdamLoss(
            counts,
            max_margin=args["max_m"],
            scale=args["s"],
            beta=beta,
            normalization="classes",
            reduction="weighted",
        )
    plain: dict[str, tuple[type[Any], tuple[str, ...]]] = {
        "sigmoid focal": (losses.SigmoidFocalLoss, ("gamma",)),
        "softmax focal": (losses.FocalLoss, ("gamma",)),
        "asl_single_label": (losses.AsymmetricLoss, ("gamma_pos", "gamma_neg", "eps")),
        "logit_adjusted": (losses.LogitAdjustedLoss, ("tau", "floor")),
        "balanced_softmax": (losses.BalancedSoftmaxLoss, ()),
        "vector_scaling": (losses.VectorScalingLoss, ("gamma", "tau")),
        "label_aware_smoothing": (
            losses.LabelAwareSmoothingLoss,
            ("smooth_head", "smooth_tail", "shape"),
        ),
    }
    kind, names = plain[method]
    loss: Loss = kind(counts, **{name: args[name] for name in names})
    return loss


def evaluate(vector: dict[str, Any], loss: Loss, logits: Tensor, targets: Tensor) -> Tensor:
    """Loss of a vector: plain, with one-hot targets, or mixed with the reversed batch."""
    args = vector["args"]
    if args.get("targets") == "one-hot probabilities":
        return loss(logits, loss.as_soft(targets, logits))  # type: ignore[no-any-return]
    if "lam" not in args:
        return loss(logits, targets)  # type: ignore[no-any-return]
    share, other = args["lam"], targets.flip(0)
    if reduction_of(vector) == "weighted":
        return share * loss(logits, targets) + (1 - share) * loss(logits, other)  # type: ignore[no-any-return]
    mixed = share * loss.as_soft(targets, logits) + (1 - share) * loss.as_soft(other, logits)
    return loss(logits, mixed)  # type: ignore[no-any-return]


def run(vector: dict[str, Any], dtype: torch.dtype) -> tuple[Loss, Tensor, Tensor]:
    given = GOLDEN["inputs"][vector["input"]]
    logits = double(given["logits"]).to(dtype).requires_grad_()
    targets = torch.tensor(given["targets"])
    loss = build(vector, torch.tensor(given["class_counts"]))
    value = evaluate(vector, loss, logits, targets)
    (gradient,) = torch.autograd.grad(value, logits)
    return loss, value, gradient


@pytest.mark.parametrize("name", VECTORS)
def test_loss_and_gradient_match_the_golden_vector(name: str) -> None:
    vector = VECTORS[name]
    loss, value, gradient = run(vector, torch.float64)
    assert_exact(value, vector["loss"])
    assert_exact(gradient, vector["grad"])
    if "class_weights" in vector:
        assert loss.class_weights is not None
        assert_exact(loss.class_weights, vector["class_weights"])
    if "margins" in vector:
        assert isinstance(loss, losses.LdamLoss)
        assert_exact(loss.margins, vector["margins"])
    if "smoothing" in vector:
        assert loss.smoothing is not None
        assert_exact(loss.smoothing, vector["smoothing"])
    if "prior" in vector:
        assert_exact(loss.class_counts / loss.class_counts.sum(), vector["prior"])


@pytest.mark.parametrize("name", [name for name in VECTORS if "per_sample" in VECTORS[name]])
def test_per_sample_losses_match_the_golden_vector(name: str) -> None:
    vector = VECTORS[name]
    given = GOLDEN["inputs"][vector["input"]]
    loss = build(vector, torch.tensor(given["class_counts"]))
    per_sample = loss.per_sample(double(given["logits"]), torch.tensor(given["targets"]))
    assert_exact(per_sample, vector["per_sample"])


@pytest.mark.parametrize("name", VECTORS)
def test_float32_loss_is_close_and_its_gradient_finite(name: str) -> None:
    vector = VECTORS[name]
    _, value, gradient = run(vector, torch.float32)
    assert value.dtype == gradient.dtype == torch.float32
    torch.testing.assert_close(value.double(), double(vector["loss"]), atol=1e-6, rtol=2e-6)
    torch.testing.assert_close(gradient.double(), double(vector["grad"]), atol=1e-6, rtol=2e-5)


@pytest.mark.parametrize(
    "name", [name for name in VECTORS if "loss_without_floor" in VECTORS[name]]
)
def test_logit_adjustment_without_a_floor_matches_too(name: str) -> None:
    vector = VECTORS[name]
    _, value, _ = run({**vector, "args": {**vector["args"], "floor": 0.0}}, torch.float64)
    assert_exact(value, vector["loss_without_floor"])


@pytest.mark.parametrize("sequence", GOLDEN["fnr_sequences"], ids=lambda s: s["name"])
def test_fnr_reference_mode_follows_the_golden_sequence(sequence: dict[str, Any]) -> None:
    loss = losses.FnrAdaptiveLoss(
        torch.full((5,), 10), mode="reference", alpha=sequence["args"]["alpha"]
    )
    for batch, after in zip(sequence["batches"], sequence["after_each_batch"], strict=True):
        logits = double(batch["logits"]).requires_grad_()
        value = loss(logits, torch.tensor(batch["targets"]))
        assert_exact(value, after["loss"])
        assert_exact(torch.autograd.grad(value, logits)[0], after["grad"])
        assert_exact(loss.importance, after["importance_after"])


def scheme_weights(scheme: str, counts: Tensor) -> Tensor:
    if match := re.fullmatch(r"effective_number_([\d.]+)_sumC", scheme):
        weights = effective_number_weights(counts, float(match[1]))
        return normalize_weights(weights, counts, "classes")
    if scheme.startswith("csce"):
        weights = power_weights(counts, 0.5 if scheme == "csce_sqrt" else 1.0)
        return weights / weights.max()
    power = 0.5 if "sqrt" in scheme or scheme.endswith("p0.5") else 1.0
    normalization: WeightNormalization = "classes"
    if scheme == "sklearn_balanced":
        normalization = "samples"
    if scheme.endswith("_raw"):
        normalization = "none"
    return normalize_weights(power_weights(counts, power), counts, normalization)


def counts_of(name: str) -> Tensor:
    if name in GOLDEN["inputs"]:
        return torch.tensor(GOLDEN["inputs"][name]["class_counts"])
    if name == "lt10_if50":
        return torch.tensor(GOLDEN["inputs"]["lt10"]["class_counts"])
    if name.startswith("seed000"):
        return torch.tensor([500] * 150 + [30] * 50)
    profiles = {profile["name"]: profile["counts"] for profile in GOLDEN["longtail_counts"]}
    return torch.tensor(profiles[name])


@pytest.mark.parametrize(
    "entry", GOLDEN["class_weights"], ids=lambda entry: f"{entry['set']}/{entry['scheme']}"
)
def test_class_weights_match_the_golden_ones(entry: dict[str, Any]) -> None:
    counts = counts_of(entry["set"])
    weights = scheme_weights(entry["scheme"], counts)
    rtol = 1e-6 if entry["scheme"].startswith("timm") else 1e-10
    torch.testing.assert_close(weights, double(entry["weights"]), atol=0, rtol=rtol)
    mean = (weights * counts).sum() / counts.sum()
    torch.testing.assert_close(mean, double(entry["sample_mean"]), atol=0, rtol=rtol)


@pytest.mark.parametrize("beta", sorted({n["beta"] for n in GOLDEN["effective_number_numerics"]}))
def test_effective_number_keeps_its_precision_for_beta_near_one(beta: str) -> None:
    entries = [n for n in GOLDEN["effective_number_numerics"] if n["beta"] == beta]
    numbers = effective_number(torch.tensor([n["n"] for n in entries]), float(beta))
    expected = double([float(n["effective_number"]) for n in entries])
    # A decimal beta near 1 rounds to a float64 that is up to 1e-8 off in 1 - beta.
    torch.testing.assert_close(numbers, expected, atol=0, rtol=1e-10)


def test_sigmoid_head_bias_is_the_golden_one() -> None:
    (entry,) = [s for s in GOLDEN["schedules"] if s["name"] == "sigmoid_bias_init"]
    component = losses.ClassBalanced(base="sigmoid")
    for num_classes, bias in entry["value"].items():
        assert component.head_bias(int(num_classes)) == pytest.approx(bias, rel=1e-12)
