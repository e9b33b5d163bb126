"""Images on a GPU: laid there where they fit, else brought batch by batch."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from image_folders import folder, photos, pixels
from trainer_cases import recipe, trained

from tuner.datasets import (
    Data,
    Dataset,
    Images,
    MappedImages,
    ResidentImages,
    StreamedImages,
    _images,
    _residence,
    fold,
    with_images,
)
from tuner.trainer import epochs

on_gpu = pytest.mark.gpu
KINDS = {"mapped": MappedImages, "streamed": StreamedImages}


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_residence, "PIECE_BYTES", 3 * 3 * 8 * 8)
    return folder(photos(tmp_path / "photos", {"cat": 20, "dog": 10}))


@pytest.fixture(params=KINDS)
def data(request: pytest.FixtureRequest, source: Dataset, monkeypatch: pytest.MonkeyPatch) -> Data:
    """Images that a processor does not hold in memory."""
    if request.param == "mapped":
        monkeypatch.setattr("tuner.datasets._sources.WORTH_KEEPING", 1)
    found = source.build(resident_limit=0)
    assert isinstance(found.train.images, KINDS[request.param])
    return found


def need_of(data: Data) -> int:
    return (len(data.train) + len(data.validation)) * 3 * 8 * 8


def memory(monkeypatch: pytest.MonkeyPatch, free: int, total: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _=None: (free, total))


def on_host(images: Images) -> list[bytes]:
    assert isinstance(images, ResidentImages)
    assert images.tensor.is_cuda
    return [image.numpy().tobytes() for image in images.pixels.cpu()]


def test_a_slot_that_has_its_images_on_a_gpu_needs_four_times_their_memory_there() -> None:
    assert with_images(2**31) == 0, "so few lie there in any case"
    assert with_images(10 * 2**30) == 40 * 2**30


@on_gpu
def test_images_that_fit_lie_on_the_gpu_in_their_order(
    data: Data, source: Dataset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    need = need_of(data)
    memory(monkeypatch, 2 * need, 4 * need)
    caplog.set_level(logging.INFO, "tuner")
    there, expected = data.to("cuda"), source.build()
    assert on_host(there.train.images) == pixels(expected.train)
    assert on_host(there.validation.images) == pixels(expected.validation)
    assert there.resident_bytes == need
    assert "lie on the GPU (one slot has a quarter of its memory" in caplog.text


@on_gpu
@pytest.mark.parametrize(
    ("free", "total", "slots"), [(2, 3.9, 1), (1.9, 4, 1), (8, 7.9, 2)], ids=["total", "free", "of"]
)
def test_images_that_do_not_fit_come_in_batches_and_a_line_says_so(
    free: float,
    total: float,
    slots: int,
    data: Data,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    need = need_of(data)
    memory(monkeypatch, int(free * need), int(total * need))
    monkeypatch.setenv("TUNER_SLOTS_ON_DEVICE", str(slots))
    there = data.to("cuda")
    assert type(there.train.images) is type(data.train.images)
    assert "do not fit on the GPU" in caplog.text
    assert ("2 slots share" if slots == 2 else "one slot has") in caplog.text
    [batch] = there.train.images.batches([torch.arange(5)], pin=True)
    assert batch.is_cuda


@on_gpu
def test_images_train_to_the_same_numbers_wherever_they_lie(
    data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    which = recipe(length=2, training={"batch_size": 8}, augment={"name": "standard"})
    need = need_of(data)
    memory(monkeypatch, 0, 0)
    streamed = trained(which, data.to("cuda"), device="cuda", execution="plain")
    memory(monkeypatch, 2 * need, 4 * need)
    there = data.to("cuda")
    assert isinstance(there.train.images, ResidentImages)
    assert streamed.ends_as(list(epochs(which, there, device="cuda", execution="plain")))


@on_gpu
def test_fold_of_many_images_on_a_gpu_takes_no_more_memory(
    data: Data, source: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory(monkeypatch, 2**40, 2**40)
    there, expected = data.to("cuda"), fold(source.build(), 1)
    monkeypatch.setattr(_images, "COPIED_BYTES", 0)
    other = fold(there, 1)
    assert on_host(other.train.images) == pixels(expected.train)
    assert on_host(other.validation.images) == pixels(expected.validation)
    for part in (other.train, other.validation):
        assert isinstance(part.images, ResidentImages)
        assert isinstance(there.train.images, ResidentImages)
        assert part.images.tensor.data_ptr() == there.train.images.tensor.data_ptr()


@on_gpu
def test_fold_of_many_images_is_trained_in_graphs_as_a_copy_of_them(
    data: Data, source: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory(monkeypatch, 2**40, 2**40)
    which = recipe(length=2, training={"batch_size": 8}, augment={"name": "none"})
    there = data.to("cuda")
    copied = trained(which, fold(there, 1), device="cuda")
    monkeypatch.setattr(_images, "COPIED_BYTES", 0)
    other = fold(there, 1)
    assert isinstance(other.train.images, ResidentImages)
    assert other.train.images.rows is not None
    assert copied.ends_as(list(epochs(which, other, device="cuda")))


@on_gpu
def test_few_images_lie_on_the_gpu_in_any_case(
    source: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory(monkeypatch, 0, 0)
    assert isinstance(source.build().to("cuda").train.images, ResidentImages)


@on_gpu
def test_part_that_was_given_apart_lies_beside_the_other(
    tmp_path: Path, source: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory(monkeypatch, 2**40, 2**40)
    large, small = source.build(resident_limit=0), source.build()
    there = replace(large, validation=small.validation).to("cuda")
    assert on_host(there.train.images) == pixels(small.train)
    assert on_host(there.validation.images) == pixels(small.validation)
