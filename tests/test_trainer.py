"""The training loop: deterministic, resumable bit for bit, and honest about divergence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trainer_cases import VARIED, recipe, trained

from tuner import artifacts
from tuner.datasets import Data, ResidentImages, StreamedImages
from tuner.errors import NonFiniteError
from tuner.lane import Lane
from tuner.losses import EqualizationLoss
from tuner.models import head_state
from tuner.stores import FolderStore
from tuner.trainer import epochs


@pytest.mark.parametrize("parts", VARIED.values(), ids=VARIED.keys())
@pytest.mark.parametrize("stop_after", [1, 3])
def test_resumed_training_continues_bit_for_bit(
    parts: dict[str, Any], stop_after: int, digits: Data, tmp_path: Path
) -> None:
    which = recipe(**parts)
    interrupted = epochs(which, digits)
    for _ in range(stop_after):
        result = next(interrupted)
    artifacts.save_checkpoint(FolderStore(tmp_path), result.snapshot(), {})
    next(interrupted, None)  # what ran on after the checkpoint must not matter
    snapshot, _ = artifacts.load_checkpoint(FolderStore(tmp_path), {})
    rest = list(epochs(which, digits, resume=snapshot))

    assert [r.epoch for r in rest] == list(range(stop_after, 4))
    assert trained(which, digits).ends_as(rest)


def test_same_recipe_gives_same_numbers_and_another_seed_others(digits: Data) -> None:
    first = trained(recipe(), digits).logits
    again = trained(recipe(), digits).logits
    other = trained(replace(recipe(), seed=8), digits).logits
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_loss_that_draws_follows_the_seed_of_its_recipe(digits: Data) -> None:
    chosen = recipe(loss={"name": "equalization"})
    found = [Lane(replace(chosen, seed=seed), digits, "cpu").losses[0] for seed in (1, 2)]
    known = [EqualizationLoss(digits.class_counts, seed=seed).seed for seed in (1, 2)]
    assert [loss.seed for loss in found] == known


def test_training_leaves_the_global_generator_alone(digits: Data) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    trained(recipe(length=1), digits)
    assert torch.equal(torch.rand(1), expected)


def test_training_learns_the_digits(digits: Data) -> None:
    logits = trained(recipe(length=20), digits).logits
    accuracy = (logits[-1].argmax(1) == digits.validation.targets).float().mean()
    assert accuracy > 0.85


def test_deferred_weights_change_nothing_before_their_start(digits: Data) -> None:
    plain = trained(recipe(), digits).logits
    weighted = {"name": "weighted_cross_entropy", "power": 1.0, "start": 0.5}
    deferred = trained(recipe(loss=weighted), digits).logits
    assert torch.equal(plain[1], deferred[1])
    assert not torch.equal(plain[2], deferred[2])


def test_classifier_only_stage_freezes_the_backbone(digits: Data) -> None:
    which = recipe(
        training={"name": "two_stage", "switch": 0.5, "classifier_only": True, "batch_size": 64},
        model={"name": "small_cnn"},
    )
    snapshots = [result.snapshot().tensors for result in epochs(which, digits)]
    backbone = [name for name in snapshots[0] if name.startswith("model/backbone")]
    assert backbone
    assert all(torch.equal(snapshots[1][name], snapshots[3][name]) for name in backbone)
    assert not torch.equal(snapshots[1]["model/head.weight"], snapshots[3]["model/head.weight"])
    assert any(not torch.equal(snapshots[0][name], snapshots[1][name]) for name in backbone)


def test_balanced_first_draws_balanced_and_then_natural(digits: Data) -> None:
    which = recipe(training={"name": "two_stage", "switch": 0.5, "order": "balanced_first"})
    lane = Lane(which, digits, "cpu")
    lane.begin_epoch()
    first = torch.cat(lane.plan())
    lane.epoch = 2
    lane.begin_epoch()
    second = torch.cat(lane.plan())
    natural = torch.arange(len(digits.train))
    assert not torch.equal(first.sort().values, natural)
    assert torch.equal(second.sort().values, natural)


def test_sigmoid_losses_start_at_the_prior_and_spare_the_bias_from_decay(digits: Data) -> None:
    lane = Lane(recipe(loss={"name": "class_balanced", "base": "sigmoid"}), digits, "cpu")
    bias = lane.model.head.bias
    assert isinstance(bias, Tensor)
    assert torch.allclose(bias, torch.full_like(bias, -torch.log(torch.tensor(9.0)).item()))
    spared = [g for g in lane.optimizer.param_groups if g["weight_decay"] == 0]
    assert any(bias is parameter for group in spared for parameter in group["params"])


def test_cosine_head_gives_logits_on_the_scale_of_its_loss(digits: Data) -> None:
    lane = Lane(recipe(loss={"name": "ldam", "scale": 20.0}), digits, "cpu")
    logits = lane.logits(digits.validation.images)
    assert 1 < logits.abs().max() <= 20
    norms, bias = head_state(lane.model.head)
    assert norms.eq(1).all()
    assert bias.eq(0).all()


def test_diverging_training_says_so(digits: Data) -> None:
    wild = recipe(optimizer={"name": "sgd", "lr": 1e30})
    with pytest.raises(NonFiniteError, match="epoch"):
        list(epochs(wild, digits))


def test_bfloat16_trains_as_well_as_float32(digits: Data) -> None:
    half = recipe(length=15, training={"batch_size": 64, "precision": "bfloat16"})
    logits = trained(half, digits).logits
    assert logits[-1].dtype == torch.float32
    accuracy = (logits[-1].argmax(1) == digits.validation.targets).float().mean()
    assert accuracy > 0.8


@pytest.mark.parametrize("layout", ["channels_last", "fused"])
def test_classes_do_not_tie_because_a_model_computes_in_bfloat16(digits: Data, layout: str) -> None:
    halved = recipe(
        length=1,
        model={"name": "small_cnn"},
        training={"batch_size": 64, "precision": "bfloat16", "layout": layout},
    )
    lane = Lane(halved, digits, "cpu")
    logits = lane.logits(digits.validation.images)
    images = digits.validation.images.batches([torch.arange(len(logits))])
    inputs = lane.augment.normalize(next(iter(images)))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        features = lane.model.eval().features(inputs)
    rough = logits.bfloat16().float()
    assert (logits != rough).float().mean() > 0.9
    torch.testing.assert_close(logits, lane.model.head(features.float()), rtol=0.02, atol=0.02)


def test_last_batch_of_one_image_joins_the_one_before(digits: Data) -> None:
    size = len(digits.train) - 1
    lane = Lane(recipe(training={"batch_size": size}, model={"name": "small_cnn"}), digits, "cpu")
    assert [len(batch) for batch in lane.plan()] == [size + 1]


def test_snapshot_of_another_recipe_is_refused(digits: Data) -> None:
    snapshot = next(epochs(recipe(), digits)).snapshot()
    with pytest.raises(ValueError, match="another recipe"):
        list(epochs(recipe(loss={"name": "focal"}), digits, resume=snapshot))


def test_broken_checkpoint_starts_the_trial_again(tmp_path: Path, digits: Data) -> None:
    artifacts.save_checkpoint(FolderStore(tmp_path), next(epochs(recipe(), digits)).snapshot(), {})
    path = tmp_path / artifacts.CHECKPOINT
    path.write_bytes(path.read_bytes()[:100])
    snapshot, reason = artifacts.load_checkpoint(FolderStore(tmp_path), {})
    assert snapshot is None
    assert str(path) in str(reason)


def test_streamed_images_train_to_the_same_numbers_as_resident_ones(tmp_path: Path) -> None:
    from image_folders import dataset, photos

    photos(tmp_path / "photos", {"common": 24, "some": 12, "rare": 8})
    source = dataset("image_folder", root="photos", image_size=32)
    resident, streamed = source.build(tmp_path), source.build(tmp_path, resident_limit=0)
    assert isinstance(resident.train.images, ResidentImages)
    assert isinstance(streamed.train.images, StreamedImages)
    which = recipe(
        length=2,
        data={"name": "image_folder", "root": "photos", "image_size": 32},
        model={"name": "torchvision", "architecture": "resnet18"},
        training={"batch_size": 16},
        augment={"name": "standard"},
    )
    ours = trained(which, resident).logits
    theirs = trained(which, replace(streamed, mean=resident.mean, std=resident.std)).logits
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_checkpoint_of_another_study_or_other_data_is_not_used(
    tmp_path: Path, digits: Data
) -> None:
    snapshot = next(epochs(recipe(), digits)).snapshot()
    mine = {"study": "a", "fingerprint": digits.fingerprint}
    store = FolderStore(tmp_path)
    assert artifacts.load_checkpoint(store, mine) == (None, None), "there is none"
    artifacts.save_checkpoint(store, snapshot, mine)
    found, reason = artifacts.load_checkpoint(store, {**mine, "recipe": recipe().digest()})
    assert found is not None
    assert reason is None
    for key in ("study", "fingerprint", "recipe"):
        found, reason = artifacts.load_checkpoint(store, {**mine, key: "other"})
        assert found is None
        assert f"of another {key}" in str(reason)


@pytest.mark.gpu
def test_training_runs_on_the_gpu(digits: Data) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    results = list(epochs(recipe(length=10), digits.to("cuda"), device="cuda"))
    accuracy = (results[-1].logits.argmax(1) == digits.validation.targets).float().mean()
    assert accuracy > 0.7


@pytest.mark.parametrize("augment", [{}, {"mixup": 0.4, "cutout": 3, "tail_strength": 2.0}])
def test_crops_from_a_view_of_all_images_train_as_crops_of_each_batch(
    augment: dict[str, Any], digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    which = recipe(augment={"name": "standard", "crop_padding": 1, **augment})
    assert Lane(which, digits, "cpu").crops is not None
    viewed = trained(which, digits)
    monkeypatch.setattr("tuner.datasets._images.PADDED_BYTES", 0)
    assert Lane(which, digits, "cpu").crops is None
    assert viewed.ends_as(list(epochs(which, digits)))
