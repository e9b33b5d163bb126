"""Where trials keep their files: a folder, or a bucket of an S3-type service."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tuner.stores._base import NotThere, Store, StoreError
from tuner.stores._bucket import BucketStore
from tuner.stores._folder import FolderStore, write_whole

DEFAULT = "runs/artifacts"

__all__ = [
    "DEFAULT",
    "BucketStore",
    "FolderStore",
    "NotThere",
    "Store",
    "StoreError",
    "open_store",
    "write_whole",
]


def open_store(given: str | Path | None, *, check: bool = True) -> Store:
    """The store of all artifacts: as given, else ``TUNER_ARTIFACTS``, else ``runs/artifacts``.

    A folder, or ``s3://BUCKET/PREFIX``. Who may never look into it, such as a command that
    only reads the storage, says ``check=False``: then nothing is asked of disk or network.

    Raises:
        StoreError: It is neither, or it cannot be used: the bucket does not exist or refuses,
            the folder is a file or read-only.
    """
    place = str(given or os.environ.get("TUNER_ARTIFACTS") or DEFAULT)
    store = _store(place)
    if check:
        store.check()
    return store


def _store(place: str) -> Store:
    if place.startswith("s3://"):
        return BucketStore.from_url(place)
    # One letter and a colon are a drive; "s3:/x" is what pathlib makes of an address.
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", place)
    if scheme:
        raise StoreError(
            f"--artifacts {scheme[0]}…: artifacts go to a folder or to s3://BUCKET/PREFIX"
        )
    return FolderStore(Path(place))
