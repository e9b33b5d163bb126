"""Worker processes behind a proxy; all come from one that has the large libraries already."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

from commands import forks


def _work(url: str, name: str, lease: str, folder: Path) -> None:
    os.environ["TUNER_LEASE"] = lease
    from tuner.session import join
    from tuner.stores import FolderStore
    from tuner.worker import work

    session = join("tiny", url, FolderStore(folder / "artifacts"))
    work(session, session.file.data.build(), name=name)


@contextmanager
def workers(
    url: str, names: Sequence[str], folder: Path, *, lease: str = "60"
) -> Iterator[list[BaseProcess]]:
    """Workers on the study "tiny", one process for each name; none outlives the block."""
    processes = [forks.Process(target=_work, args=(url, name, lease, folder)) for name in names]
    for process in processes:
        process.start()
    try:
        yield list(processes)
    finally:
        for process in processes:
            process.kill()
            process.join()
