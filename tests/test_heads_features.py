from __future__ import annotations

import contextlib
import os
import resource
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from head_cases import pixel_features, pixels, unlike
from image_folders import dataset, photos
from torch import Tensor

from tuner.alone import Stopped
from tuner.augment import AUGMENTS, Augmenter
from tuner.datasets import Data
from tuner.errors import TunerError
from tuner.heads import Features, cached_features
from tuner.heads import _features as module
from tuner.models import Classifier


def augmenter(data: Data, **values: Any) -> Augmenter:
    return AUGMENTS.parse("standard", values, where="test").build(
        data.image_shape,
        mean=data.mean,
        std=data.std,
        class_counts=data.class_counts,
        groups=data.groups,
    )


def never(*_: object) -> None:
    raise AssertionError("computed again")


def same(a: Features, b: Features) -> bool:
    tensors = ("train", "train_targets", "validation")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in tensors)


@pytest.fixture
def model(digits: Data) -> Classifier:
    return pixels(digits)[0]


def test_features_are_those_of_the_backbone(digits: Data, tmp_path: Path) -> None:
    model, plain = pixels(digits)
    features = pixel_features(digits, tmp_path)
    assert features.train.dtype == torch.float16
    assert features.train.shape == (2, len(digits.train), 64)
    assert torch.equal(features.train_targets, digits.train.targets)
    for part, found in (
        (digits.train, features.train[0]),
        (digits.validation, features.validation),
    ):
        images = torch.cat(list(part.images.batches([torch.arange(len(part))])))
        expected = model.features(plain.normalize(images))
        assert unlike(found.float() * features.scale, expected) < 1e-3


def test_second_process_reads_what_the_first_made(
    digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = pixel_features(digits, tmp_path)
    monkeypatch.setattr(module, "_compute", never)
    assert same(made, pixel_features(digits, tmp_path))


def test_file_is_mapped_into_memory_and_nothing_else_is_left(digits: Data, tmp_path: Path) -> None:
    features = pixel_features(digits, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"{features.key}.safetensors", f"{features.key}.safetensors.lock"}
    assert str(tmp_path) in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[:-100],
        lambda whole: whole[:5],
        lambda whole: b"",
        lambda whole: b"x" * 99,
    ],
    ids=["cut", "cut in the header", "empty", "something else"],
)
def test_damaged_file_is_made_again(damage: Any, digits: Data, tmp_path: Path) -> None:
    made = pixel_features(digits, tmp_path)
    copy = replace(made, train=made.train.clone(), validation=made.validation.clone())
    path = tmp_path / f"{made.key}.safetensors"
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(damage(whole))
    assert same(pixel_features(digits, tmp_path), copy)


def test_only_one_of_many_computes_and_the_others_wait(
    digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, calls = module._compute, []

    def counted(*given: Any) -> Any:
        calls.append(1)
        return compute(*given)

    monkeypatch.setattr(module, "_compute", counted)
    found: list[Features] = []
    threads = [
        threading.Thread(target=lambda: found.append(pixel_features(digits, tmp_path)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert all(same(found[0], other) for other in found[1:])


def test_key_depends_on_all_that_acts(model: Classifier, digits: Data, tmp_path: Path) -> None:
    crop, flip = augmenter(digits, crop_padding=1), augmenter(digits, crop_padding=1, flip=False)
    other = pixels(digits)[0]
    other.backbone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 64))
    moved = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 64))
    again = pixels(digits)[0]
    again.backbone = moved

    def key(model: Classifier, augment: Augmenter, *, copies: int = 2, seed: int = 0) -> str:
        given = {"copies": copies, "seed": seed, "folder": tmp_path}
        return cached_features(model, digits, augment, **given).key  # type: ignore[arg-type]

    keys = [
        key(model, crop),
        key(model, flip),
        key(model, crop, copies=1),
        key(model, crop, seed=1),
        key(other, crop),
        key(again, crop),
        cached_features(
            model, replace(digits, fingerprint="other"), crop, copies=2, seed=0, folder=tmp_path
        ).key,
    ]
    assert len(set(keys)) == len(keys)
    assert key(model, crop) == keys[0]


def test_first_copy_is_plain_the_others_augmented_and_the_model_left_as_it_was(
    model: Classifier, digits: Data, tmp_path: Path
) -> None:
    model.train()
    features = cached_features(
        model, digits, augmenter(digits, crop_padding=1), copies=3, seed=0, folder=tmp_path
    )
    assert model.training
    plain = pixel_features(digits, tmp_path)
    assert torch.equal(features.train[0], plain.train[0])
    assert not torch.equal(features.train[1], plain.train[0])
    assert not torch.equal(features.train[1], features.train[2])


def test_mixing_is_left_out(model: Classifier, digits: Data, tmp_path: Path) -> None:
    mixing = augmenter(digits, crop_padding=0, flip=False, mixup=1.0)
    features = cached_features(model, digits, mixing, copies=2, seed=0, folder=tmp_path)
    assert torch.equal(features.train[0], features.train[1])


def test_augmenter_that_cannot_do_without_mixing_is_refused(
    model: Classifier, digits: Data, tmp_path: Path
) -> None:
    class AlwaysMixes(Augmenter):
        def forward(
            self, images: Tensor, targets: Tensor, generator: torch.Generator, progress: float
        ) -> tuple[Tensor, Tensor]:
            soft = torch.nn.functional.one_hot(targets, 10).float()
            return self.normalize(images), soft

    mixing = AlwaysMixes(digits.mean, digits.std)
    with pytest.raises(TunerError, match="AlwaysMixes mixes images"):
        cached_features(model, digits, mixing, copies=2, seed=0, folder=tmp_path)


def test_features_that_are_not_finite_are_refused(
    model: Classifier, digits: Data, tmp_path: Path
) -> None:
    broken = torch.nn.Linear(64, 64)
    torch.nn.init.constant_(broken.bias, float("nan"))
    model.backbone = torch.nn.Sequential(torch.nn.Flatten(), broken)
    with pytest.raises(TunerError, match="not finite"):
        cached_features(model, digits, pixels(digits)[1], copies=1, seed=0, folder=tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_backbone_that_sees_few_images_at_a_time_gives_the_same_features(
    digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pixel_features(digits, tmp_path / "whole")
    monkeypatch.setattr(module, "cached_batch", lambda *_: 7)
    few = pixel_features(digits, tmp_path / "few")
    assert few.key == whole.key
    assert unlike(few.train.float(), whole.train.float()) < 1e-3


def test_few_large_images_are_loaded_at_a_time() -> None:
    sizes = [module.batch_size((3, side, side)) for side in (8, 64, 224, 2048)]
    assert sizes == [512, 512, 41, 1]


def test_streamed_images_give_the_features_of_resident_ones(tmp_path: Path) -> None:
    photos(tmp_path / "images", {"a": 12, "b": 9})
    root = str(tmp_path / "images")
    chosen = dataset("image_folder", root=root, image_size=8, tail={"bottom": 0.5})
    both: list[Features] = []
    for limit in (1 << 30, 0):
        data = chosen.build(resident_limit=limit)
        model, augment = pixels(data)
        folder = tmp_path / f"cache{len(both)}"
        both.append(cached_features(model, data, augment, copies=1, seed=0, folder=folder))
    assert same(*both)


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """What a full disk does: to write more than so many bytes is an error of the system."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_disk_that_is_full_is_an_error_of_the_system_and_nothing_is_left_on_it(
    digits: Data, tmp_path: Path
) -> None:
    with files_of_at_most(2**14), pytest.raises(OSError, match="File too large"):
        pixel_features(digits, tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
    assert pixel_features(digits, tmp_path).train.isfinite().all()


def test_request_to_stop_is_heard_between_batches_and_nothing_is_left(
    model: Classifier, digits: Data, tmp_path: Path
) -> None:
    augment, asked = pixels(digits)[1], iter([False, False, True])
    given: dict[str, Any] = {"copies": 2, "seed": 0, "folder": tmp_path}
    model.train()
    with pytest.raises(Stopped):
        cached_features(model, digits, augment, **given, stop=lambda: next(asked))
    assert model.training
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
    assert same(cached_features(model, digits, augment, **given), pixel_features(digits, tmp_path))


def test_features_that_were_not_used_for_longest_make_room(
    model: Classifier, digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def path(seed: int) -> Path:
        made = cached_features(
            model, digits, pixels(digits)[1], copies=2, seed=seed, folder=tmp_path
        )
        return tmp_path / f"{made.key}.safetensors"

    first, second = path(1), path(2)
    for seconds, made in enumerate((first, second), 1):
        os.utime(made, (seconds, seconds))
    assert path(1) == first
    usage = shutil.disk_usage(tmp_path)._replace(free=2 * first.stat().st_size + 2**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    third = path(3)
    assert {*tmp_path.glob("*.safetensors")} == {first, third}


def test_features_are_kept_though_they_take_more_than_half_of_the_disk(
    digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    assert (tmp_path / f"{pixel_features(digits, tmp_path).key}.safetensors").exists()
