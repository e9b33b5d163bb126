"""Folders of class folders as they lie on a disk: their names, and the files below them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

from tuner.errors import DataError


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder, but for those that begin with a dot.

    Raises:
        DataError: It cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if e.is_dir() and e.name[0] != ".")
    except OSError as error:
        _refuse_unreadable(error)


def _refuse_unreadable(error: OSError) -> NoReturn:
    raise DataError(
        f"{error.filename}: cannot be read ({error.strerror}); allow it, or take it out of the data"
    ) from error


def refuse_no_text(root: Path, folders: Iterable[str]) -> None:
    """Names of classes are hashed, stored and reported, which bytes alone cannot be.

    Raises:
        DataError: One of the names is not UTF-8.
    """
    for name in folders:
        if name != os.fsencode(name).decode(errors="replace"):
            raise DataError(
                f"{root}: the class folder {os.fsencode(name)!r} has a name that is not UTF-8; "
                "rename it"
            )


def files_below(root: Path, name: str) -> Iterator[str]:
    """Paths of the files of a class, relative to ``root``, at any depth.

    Raises:
        DataError: A folder cannot be read.
    """
    for base, folders, files in os.walk(root / name, onerror=_refuse_unreadable, followlinks=True):
        folders[:] = [f for f in folders if f[0] != "." and not _leads_back(Path(base, f))]
        inside = Path(base).relative_to(root).as_posix()
        yield from (f"{inside}/{file}" for file in files if file[0] != ".")


def is_special(path: str) -> bool:
    """Whether it is a pipe, a socket or a device: who opens one may wait for ever.

    A link that leads nowhere is not, nor what nobody may look at: opened, they say what is wrong.
    """
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def _leads_back(folder: Path) -> bool:
    """Whether it is a link to a folder that it lies in: its images would come again and again."""
    if not folder.is_symlink():
        return False
    above = {parent.resolve() for parent in folder.absolute().parents}
    return folder.resolve() in above | set(folder.parent.resolve().parents)
