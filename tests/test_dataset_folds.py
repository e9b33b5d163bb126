"""Folds: other validation images of the same pool, each image once as long as there are any."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from image_folders import dataset, folder, photos, pixels

from tuner.datasets import Data, MappedImages, ResidentImages, StreamedImages, fold
from tuner.datasets import Part as DataPart


@pytest.fixture(scope="module")
def pool() -> Data:
    return dataset("digits", profile={"name": "exponential", "ratio": 20}).build()


def of_class(part: DataPart, index: int) -> set[bytes]:
    assert isinstance(part.images, ResidentImages)
    return {image.numpy().tobytes() for image in part.images.tensor[part.targets == index]}


def test_a_fold_divides_the_same_images_with_as_many_of_each_class(pool: Data) -> None:
    other = fold(pool, 0)
    for one, two in ((pool.train, other.train), (pool.validation, other.validation)):
        assert one.targets.bincount().tolist() == two.targets.bincount().tolist()
    whole = [sorted(pixels(d.train) + pixels(d.validation)) for d in (pool, other)]
    assert whole[0] == whole[1]
    assert other.class_counts is pool.class_counts


def test_images_keep_their_classes(pool: Data) -> None:
    other = fold(pool, 2)
    for index in range(pool.num_classes):
        both = [of_class(d.train, index) | of_class(d.validation, index) for d in (pool, other)]
        assert both[0] == both[1]


def test_folds_share_no_image_while_there_are_others(pool: Data) -> None:
    largest = int(pool.class_counts.argmax())
    seen: set[bytes] = set()
    for index in range(3):
        own = of_class(fold(pool, index).validation, largest)
        assert own
        assert not seen & own
        seen |= own


def test_images_that_the_search_chose_by_are_only_trained_on(pool: Data) -> None:
    searched = set(pixels(pool.validation))
    for index in range(12):
        other = fold(pool, index)
        assert not searched & set(pixels(other.validation))
        assert searched <= set(pixels(other.train))


def test_folds_are_the_same_each_time_and_differ_from_each_other(pool: Data) -> None:
    assert pixels(fold(pool, 1).validation) == pixels(fold(pool, 1).validation)
    assert pixels(fold(pool, 1).validation) != pixels(fold(pool, 0).validation)


def test_validation_part_that_was_given_stays(tmp_path: Path) -> None:
    photos(tmp_path / "train", {"cat": 10, "dog": 10})
    photos(tmp_path / "val", {"cat": 3, "dog": 3}, first=100)
    data = folder(tmp_path).build()
    assert fold(data, 1) is data


def test_streamed_images_are_divided_by_their_files(tmp_path: Path) -> None:
    source = folder(photos(tmp_path, {"cat": 10, "dog": 10}))
    data = source.build(resident_limit=0)
    other = fold(data, 0)
    assert isinstance(other.validation.images, StreamedImages)
    assert isinstance(data.validation.images, StreamedImages)
    assert not set(other.validation.images.paths) & set(data.validation.images.paths)
    [images] = other.validation.images.batches([torch.arange(len(other.validation))])
    expected = pixels(fold(source.build(), 0).validation)
    assert [image.numpy().tobytes() for image in images] == expected


def test_mapped_images_are_divided_by_their_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tuner.datasets._sources.WORTH_KEEPING", 1)
    source = folder(photos(tmp_path / "photos", {"cat": 10, "dog": 10}))
    data = source.build(resident_limit=0)
    assert isinstance(data.validation.images, MappedImages)
    other = fold(data, 0)
    [images] = other.validation.images.batches([torch.arange(len(other.validation))])
    expected = pixels(fold(source.build(), 0).validation)
    assert [image.numpy().tobytes() for image in images] == expected
