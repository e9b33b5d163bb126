"""Steps in chunks, for a device without memory for a whole batch: less memory, same step."""

from __future__ import annotations

import copy
import weakref
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_cases import build, noise
from test_trainer_interruption import stopped
from torch import Tensor, nn
from trainer_cases import VARIED, recipe, trained

from tuner import chunks
from tuner.chunks import cached_batch, logits_in_chunks, number_of_chunks
from tuner.datasets import Data
from tuner.lane import Lane
from tuner.losses import LOSSES
from tuner.recipe import Recipe
from tuner.samplers.curriculum import CurriculumSampler
from tuner.seeding import seeded
from tuner.trainer import epochs

MIXED = {"name": "standard", "flip": False, "crop_padding": 1, "mixup": 0.4}
LOSS_CASES: list[dict[str, Any]] = [{"name": name} for name in LOSSES]
LOSS_CASES += [{"name": "fnr_adaptive", "mode": "reference"}, {"name": "equalization"}]
LOSS_CASES[-1] |= {"threshold": 0.05}


def label(case: dict[str, Any]) -> str:
    return " ".join(str(value) for value in case.values())


def step(which: Recipe, data: Data, micro_batch: int | None) -> tuple[Lane, Tensor]:
    """A lane after its second step, with the gradients of that; and the loss of that."""
    lane = Lane(which, data, "cpu", micro_batch=micro_batch)
    lane.begin_epoch()
    loss = torch.empty(0)
    for number, (indices, images) in enumerate(lane.images(lane.plan()[:2])):
        loss = lane.step(indices, images, share=number / 2)
    return lane, loss


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("loss", LOSS_CASES, ids=label)
@pytest.mark.parametrize("micro_batch", [2, 13, 40])
@pytest.mark.parametrize("augment", [{"name": "none"}, MIXED], ids=["hard", "mixed"])
def test_gradient_in_chunks_is_that_of_the_whole_batch(
    loss: dict[str, Any], micro_batch: int, augment: dict[str, Any], digits: Data
) -> None:
    which = recipe(loss=loss, augment=augment)
    lane, value = step(which, digits, None)
    other, other_value = step(which, digits, micro_batch)
    torch.testing.assert_close(other_value, value, rtol=1e-5, atol=1e-6)
    expected = gradients(lane.model)
    assert expected
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-3
    torch.testing.assert_close(gradients(other.model), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(other.loss.state_dict(), lane.loss.state_dict())


@pytest.mark.parametrize(
    "parts",
    [VARIED[name] for name in VARIED if name != "dropout" and "norm" not in name],
)
def test_whole_training_in_chunks_gives_nearly_the_same_numbers(
    parts: dict[str, Any], digits: Data
) -> None:
    whole = trained(recipe(**parts), digits)
    chunked = trained(recipe(**parts), digits, micro_batch=20)
    assert chunked.losses == pytest.approx(whole.losses, rel=1e-4)
    torch.testing.assert_close(chunked.logits, whole.logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["small_cnn", "resnet20", "torchvision", "timm"])
def test_batch_norm_counts_every_chunk_once(name: str) -> None:
    shape = (3, 32, 32)
    model = build(name, shape).train()
    plain = copy.deepcopy(model)
    inputs = noise(10, *shape)
    with seeded("droppath"):
        expected = torch.cat([plain(chunk) for chunk in inputs.tensor_split(3)])
    with seeded("droppath"):
        logits = logits_in_chunks(model, inputs, 3, model)
        assert torch.equal(logits, expected)
        for each in (logits, expected):
            each.square().sum().backward()  # type: ignore[no-untyped-call]
    state = plain.state_dict()
    assert any("running_mean" in key for key in state)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    torch.testing.assert_close(gradients(model), gradients(plain), rtol=1e-3, atol=1e-4)
    assert str(model) == str(plain), "the norms are as they were"


def test_dropout_drops_the_same_in_both_passes() -> None:
    model = build("mlp", (1, 8, 8), dropout=0.5).train()
    plain = copy.deepcopy(model)
    inputs = noise(10, 1, 8, 8)
    with seeded("dropout"):
        logits_in_chunks(model, inputs, 3, model).sum().backward()  # type: ignore[no-untyped-call]
        after = torch.get_rng_state()
    with seeded("dropout"):
        torch.cat([plain(chunk) for chunk in inputs.tensor_split(3)]).sum().backward()  # type: ignore[no-untyped-call]
        assert torch.equal(torch.get_rng_state(), after)
    torch.testing.assert_close(gradients(model), gradients(plain))


def test_activations_of_one_chunk_at_a_time_are_in_memory() -> None:
    model = build("mlp", (1, 8, 8)).train()
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def remember(_module: nn.Module, _inputs: object, features: Tensor) -> None:
        made.append(weakref.ref(features))
        alive.append(sum(features() is not None for features in made))

    model.backbone.register_forward_hook(remember)
    logits = logits_in_chunks(model, noise(40, 1, 8, 8), 10, model)
    logits.sum().backward()  # type: ignore[no-untyped-call]
    assert len(made) == 20, "forward, and once more for the gradient"
    assert max(alive) <= 2


@given(size=st.integers(1, 300), micro_batch=st.integers(2, 300))
def test_chunks_are_small_enough_and_none_is_a_single_image(size: int, micro_batch: int) -> None:
    chunks = number_of_chunks(size, micro_batch)
    sizes = [len(chunk) for chunk in torch.arange(size).tensor_split(chunks)]
    assert sum(sizes) == size
    assert max(sizes) <= (3 if micro_batch == 2 else micro_batch)
    assert min(sizes) >= min(2, size)
    assert max(sizes) - min(sizes) <= 1
    assert all(a >= b for a, b in pairwise(sizes))


def test_model_never_sees_more_than_a_micro_batch_in_training_and_twice_that_in_evaluation(
    digits: Data,
) -> None:
    lane, _ = step(recipe(), digits, 20)
    seen: dict[bool, set[int]] = {True: set(), False: set()}
    lane.model.backbone.register_forward_pre_hook(
        lambda m, inputs: seen[m.training].add(len(inputs[0]))
    )
    for indices, images in lane.images(lane.plan()):
        lane.step(indices, images, share=0.5)
    lane.logits(digits.validation.images)
    assert max(seen[True]) <= 20
    assert min(seen[True]) > 1
    assert max(seen[False]) == 40


def test_micro_batch_as_large_as_the_batch_changes_nothing(digits: Data) -> None:
    which = recipe()
    results = list(epochs(which, digits, micro_batch=1000))
    assert trained(which, digits).ends_as(results)


def test_micro_batch_of_one_image_is_refused(digits: Data) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        next(epochs(recipe(), digits, micro_batch=1))


def test_sampler_is_told_the_loss_of_every_image(digits: Data) -> None:
    which = recipe(sampler={"name": "curriculum"})
    known = []
    for micro_batch in (None, 20):
        result = next(epochs(which, digits, micro_batch=micro_batch))
        sampler = result.lane.samplers[0]
        assert isinstance(sampler, CurriculumSampler)
        known.append(sampler.state_dict()["losses"])
    assert known[0].isfinite().any()
    torch.testing.assert_close(known[1], known[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parts", VARIED.values(), ids=VARIED.keys())
def test_training_in_chunks_goes_on_from_the_step_it_was_stopped_at(
    parts: dict[str, Any], digits: Data
) -> None:
    which = recipe(length=2, **parts)
    _, interruption = stopped(which, digits, 2, micro_batch=20)
    rest = list(epochs(which, digits, resume=interruption.snapshot, micro_batch=20))
    assert trained(which, digits, micro_batch=20).ends_as(rest)


@pytest.mark.parametrize(("before", "afterwards"), [(None, 20), (20, None), (30, 15)])
def test_training_goes_on_with_another_micro_batch(
    before: int | None, afterwards: int | None, digits: Data
) -> None:
    which = recipe()
    _, interruption = stopped(which, digits, 7, micro_batch=before)
    rest = list(epochs(which, digits, resume=interruption.snapshot, micro_batch=afterwards))
    between = next(epochs(which, digits, micro_batch=before)).snapshot()
    rest_of_epochs = list(epochs(which, digits, resume=between, micro_batch=afterwards))
    whole = trained(which, digits)
    for results in (rest, rest_of_epochs):
        first = results[0].epoch
        logits = [result.logits for result in results]
        torch.testing.assert_close(logits, whole.logits[first:], rtol=1e-3, atol=1e-3)


def test_bfloat16_in_chunks_trains_as_well(digits: Data) -> None:
    half = recipe(length=15, training={"batch_size": 64, "precision": "bfloat16"})
    logits = trained(half, digits, micro_batch=16).logits[-1]
    assert (logits.argmax(1) == digits.validation.targets).float().mean() > 0.8


@pytest.mark.gpu
@pytest.mark.real
def test_micro_batches_need_less_memory_on_the_gpu(digits: Data) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    which = recipe(length=1, model={"name": "resnet20"}, training={"batch_size": 256})
    data, peaks = digits.to("cuda"), []
    for micro_batch in (None, 64):
        torch.cuda.reset_peak_memory_stats()
        list(epochs(which, data, device="cuda", micro_batch=micro_batch, execution="plain"))
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < peaks[0]


def test_the_larger_the_images_the_fewer_are_evaluated_at_a_time() -> None:
    assert [cached_batch(side, side) for side in (32, 64, 224)] == [256, 64, 8]


def test_logits_are_the_same_whatever_is_evaluated_at_a_time(
    digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    lane = Lane(recipe(model={"name": "mlp"}), digits, "cpu")
    whole = lane.logits(digits.validation.images)
    monkeypatch.setattr(chunks, "cached_batch", lambda *_: 7)
    torch.testing.assert_close(lane.logits(digits.validation.images), whole)
