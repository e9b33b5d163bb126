"""Decoded images on disk: made once, shared, made again when files change, and never too many."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from image_folders import folder, photos, save_image
from torch import Tensor

from tuner.datasets import (
    MappedImages,
    ResidentImages,
    StreamedImages,
    _decode,
    _sources,
    _stored,
)
from tuner.datasets._decode import decoded
from tuner.errors import DataError

SIZE = 8


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache that keeps the smallest data set too."""
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_sources, "WORTH_KEEPING", 0)
    return tmp_path / "cache" / "pixels"


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for seed, path in enumerate(paths):
        save_image(path, seed)
    return [str(path) for path in paths]


def ask(files: list[str]) -> Tensor | None:
    return _stored.stored(files, [Path(file).read_bytes() for file in files], SIZE, 3)


def count(calls: list[str]) -> Callable[..., None]:
    original = _decode.decode_all

    def counted(*arguments: object) -> None:
        calls.append("decoded")
        original(*arguments)  # type: ignore[arg-type]

    return counted


def test_pixels_are_those_of_the_files_and_decoded_once(
    cache: Path, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(_stored, "decode_all", count(calls))
    for _ in range(3):
        pixels = ask(files)
        assert pixels is not None
        assert torch.equal(pixels, torch.from_numpy(decoded(files, SIZE, 3)))
    assert len(calls) == 1


@pytest.mark.parametrize("same_content", [False, True])
def test_a_file_that_changed_is_decoded_again(
    cache: Path, files: list[str], same_content: bool
) -> None:
    before = ask(files)
    save_image(Path(files[2]), 2 if same_content else 99)
    os.utime(files[2], (1, 1))
    after = ask(files)
    assert before is not None
    assert after is not None
    assert torch.equal(before[2], after[2]) == same_content
    assert len(list(cache.glob("*.pixels"))) == 2


def test_what_was_cut_short_is_made_again(cache: Path, files: list[str]) -> None:
    first = ask(files)
    assert first is not None
    expected = first.clone()
    (path,) = cache.glob("*.pixels")
    path.with_suffix(".half").write_bytes(b"of a process that was killed")
    path.write_bytes(path.read_bytes()[:-1])
    again = ask(files)
    assert again is not None
    assert torch.equal(again, expected)
    assert not list(cache.glob("*.half"))


def _ask_and_note(files: list[str], note: str) -> None:
    calls: list[str] = []
    counted = count(calls)

    def slow(*arguments: object) -> None:
        counted(*arguments)
        time.sleep(0.5)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_stored, "decode_all", slow)
        ask(files)
    Path(note).write_text(str(len(calls)))


def test_of_two_processes_one_decodes(cache: Path, files: list[str], tmp_path: Path) -> None:
    notes = [tmp_path / name for name in ("first", "second")]
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=_ask_and_note, args=(files, str(note))) for note in notes]
    for process in both:
        process.start()
    for process in both:
        process.join(30)
    assert sorted(note.read_text() for note in notes) == ["0", "1"]


def test_a_full_disk_leaves_nothing_behind_and_images_in_memory(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    data = folder(photos(tmp_path / "photos", {"a": 8, "b": 8})).build()
    assert isinstance(data.train.images, ResidentImages)
    assert not list(cache.glob("*.pixels")) + list(cache.glob("*.half"))


def test_nothing_is_written_after_an_error(
    files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_decode, "_threads", lambda _paths: 2)
    written = list[int]()

    def full(index: int, _pixels: object) -> None:
        time.sleep(0.01)
        if index == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(index)

    with pytest.raises(OSError, match="No space left"):
        _decode.decode_all(files * 40, SIZE, 3, full)
    before = len(written)
    time.sleep(0.1)
    assert len(written) == before, "the file is closed, and another one may have its number"


def test_too_many_for_the_machine_are_streamed(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = photos(tmp_path / "photos", {"a": 8, "b": 8})
    mapped = folder(root).build(resident_limit=0)
    assert isinstance(mapped.train.images, MappedImages)
    monkeypatch.setattr(os, "sysconf", lambda _name: 1)
    shutil.rmtree(cache)
    streamed = folder(root).build(resident_limit=0)
    assert isinstance(streamed.train.images, StreamedImages)
    pairs = [next(iter(d.train.images.batches([torch.arange(5)]))) for d in (mapped, streamed)]
    assert torch.equal(*pairs)
    assert mapped.fingerprint == streamed.fingerprint


def test_what_was_not_used_for_longest_makes_room(
    cache: Path, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for chosen in (files[:2], files[:3], files[:2]):
        ask(chosen)
        time.sleep(0.01)
    sizes = {path.stat().st_size for path in cache.glob("*.pixels")}
    each = SIZE * SIZE * 3
    assert sizes == {2 * each, 3 * each}
    usage = shutil.disk_usage(cache)._replace(free=9 * each)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    ask(files[:4])
    assert {path.stat().st_size for path in cache.glob("*.pixels")} == {2 * each, 4 * each}


def test_broken_images_are_named_and_nothing_is_kept(cache: Path, files: list[str]) -> None:
    Path(files[3]).write_bytes(b"broken")
    with pytest.raises(DataError, match=r"1 of 5 images.*3\.png"):
        ask(files)
    assert not list(cache.glob("*.pixels")) + list(cache.glob("*.half"))


def test_small_data_sets_leave_nothing_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path / "cache"))
    folder(photos(tmp_path / "photos", {"a": 8, "b": 8})).build()
    assert not (tmp_path / "cache").exists()
