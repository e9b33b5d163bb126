"""What a machine makes once: one process at a time, whole or not at all, and within bounds."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

import pytest

from tuner.alone import (
    ABANDONED_SECONDS,
    Stopped,
    alone,
    cache_folder,
    half_written,
    make_room,
    note_use,
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with files of 10, 20 and 30 bytes, used in this order, on a disk with 60 left."""
    usage = shutil.disk_usage(tmp_path)._replace(free=60)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    for seconds, size in enumerate((10, 20, 30), 1):
        file = tmp_path / f"{size}.pixels"
        file.write_bytes(b"x" * size)
        os.utime(file, (seconds, seconds))
    return tmp_path


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_user_without_a_home_has_a_cache_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("TUNER_CACHE", "/somewhere")
    assert cache_folder() == Path("/somewhere")
    monkeypatch.delenv("TUNER_CACHE")
    assert cache_folder().parent == Path(tempfile.gettempdir())


def test_who_waits_hears_a_request_to_stop(tmp_path: Path) -> None:
    asked = iter([False, False, True])
    with alone(tmp_path / "made"), pytest.raises(Stopped):  # noqa: SIM117
        with alone(tmp_path / "made", stop=lambda: next(asked)):
            raise AssertionError("two at once")


def test_who_waits_has_its_turn_when_the_other_is_done(tmp_path: Path) -> None:
    turns: list[str] = []

    def second() -> None:
        with alone(tmp_path / "made"):
            turns.append("second")

    other = threading.Thread(target=second)
    with alone(tmp_path / "made"):
        other.start()
        time.sleep(0.3)
        turns.append("first")
    other.join(10)
    assert turns == ["first", "second"]


def test_file_is_put_in_place_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "made.pixels"
    with pytest.raises(KeyboardInterrupt), half_written(path) as half:  # noqa: PT012
        half.write_bytes(b"one h")
        raise KeyboardInterrupt
    assert left(tmp_path) == []
    with half_written(path) as half:
        half.write_bytes(b"all of it")
        assert left(tmp_path) == ["made.half"]
    assert path.read_bytes() == b"all of it"
    assert left(tmp_path) == ["made.pixels"]


def test_least_recently_used_make_room_for_half_of_what_is_left(folder: Path) -> None:
    note_use(folder / "10.pixels")
    assert make_room(folder / "new.pixels", 15)
    assert left(folder) == ["10.pixels", "30.pixels"]


def test_nothing_is_removed_where_that_would_not_do(folder: Path) -> None:
    assert not make_room(folder / "new.pixels", 61)
    assert len(left(folder)) == 3


def test_what_must_be_kept_has_the_room_of_all_others(folder: Path) -> None:
    (folder / "other.kind").write_bytes(b"x")
    assert not make_room(folder / "new.pixels", 61, at_any_cost=True)
    assert left(folder) == ["other.kind"]


def test_what_nobody_is_still_writing_to_is_removed(folder: Path) -> None:
    long_ago = time.time() - ABANDONED_SECONDS - 1
    for name in ("at work.half", "killed.half", ".killed.safetensors.half"):
        (folder / name).write_bytes(b"x")
        if "killed" in name:
            os.utime(folder / name, (long_ago, long_ago))
    assert make_room(folder / "new.pixels", 0)
    assert [name for name in left(folder) if name.endswith("half")] == ["at work.half"]
