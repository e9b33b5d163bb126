"""Warnings about what lies in a folder of images and is passed over."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.errors import counted

if TYPE_CHECKING:
    from tuner.datasets._folders import Folder


def passed_over(folders: Sequence[Folder]) -> tuple[str, ...]:
    """What is passed over in the folders of all parts, and why."""
    return (*_unread(folders), *_special(folders), *_loose(folders))


def _unread(folders: Iterable[Folder]) -> Iterator[str]:
    """A warning about images in formats that are not read, if there are some."""
    files = [folder.root / path for folder in folders for path in folder.unread]
    if files:
        yield f"{_number_and_one(files)}: {files[0].suffix.lower()} is not read"


def _special(folders: Iterable[Folder]) -> Iterator[str]:
    """A warning about what has the name of an image but is no file, if there is something."""
    found = [folder.root / path for folder in folders for path in folder.special]
    if found:
        yield f"{_number_and_one(found)}: it is a pipe, a socket or a device"


def _number_and_one(files: Sequence[Path]) -> str:
    passed = "1 file was" if len(files) == 1 else f"{len(files)} files were"
    return f"{passed} passed over, for example {files[0]}"


def _loose(folders: Iterable[Folder]) -> Iterator[str]:
    """A warning per part about images that are in no class folder."""
    for folder in folders:
        if folder.loose:
            one = len(folder.loose) == 1
            lie, were = ("lies", "it was") if one else ("lie", "they were")
            yield (
                f"{folder.root}: {counted(len(folder.loose), 'image')} {lie} beside the class "
                f"folders, for example {folder.loose[0]}: without a class, {were} passed over"
            )
