"""One worker in a process of Ray's: what runs there."""

from __future__ import annotations

import logging
import os
import random
import time
import traceback
from pathlib import Path

from tuner.errors import StorageError, TunerError
from tuner.launch._place import Place
from tuner.slots import share_of
from tuner.storage import failure, storage_url
from tuner.stores import StoreError
from tuner.worker import StopRequest

FIRST_PAUSE, LONGEST_PAUSE, TRIES = 1.0, 30.0, 5
TICK = 0.2
EARLY_SECONDS = 60.0

log = logging.getLogger(__name__)


class Worker:
    """A worker under a name that it keeps when Ray starts its process again.

    Ray calls ``run`` and, from another thread, ``stop``. Of a process that dies Ray starts
    a new one, and calls ``run`` once more; the ledger gives the name its trial back. No trial
    is ever Ray's to repeat.
    """

    def __init__(self, name: str) -> None:
        self.name, self.told = name, False
        self.signalled = StopRequest()
        # Ray makes the object in the main thread, the only one that can listen to signals.
        self._listening = self.signalled.installed()
        self._listening.__enter__()

    def __repr__(self) -> str:
        """What Ray puts before every line of this worker's."""
        return self.name

    def run(self, place: Place, device: str | None, cores: int, slots: int = 1) -> str | None:
        """Work until the study has nothing left; a message when something else is why it ended.

        ``place`` travels as an argument, which Ray writes into no log and shows to nobody; it
        does so with the environment of its processes. ``cores`` are this worker's, and its device
        has so many ``slots``.
        """
        place.enter(os.environ)
        os.environ.update(share_of(cores, slots))
        start = time.monotonic()
        try:
            self._work_patiently(place, device, cores)
        except TunerError as error:
            return str(error)
        except Exception:
            if time.monotonic() < start + EARLY_SECONDS:
                # Another process would come no further.
                return traceback.format_exc()
            log.exception("this worker's process ends; Ray starts another")
            os._exit(os.EX_SOFTWARE)
        if self.signalled() and not self.told:
            # Somebody wants this process gone, not the worker: Ray starts it where it can.
            os._exit(os.EX_OK)
        return None

    def stop(self) -> None:
        """Finish the step, keep the trial, and return from ``run``."""
        self.told = True

    def _stops(self) -> bool:
        return self.told or self.signalled()

    def _work_patiently(self, place: Place, device: str | None, cores: int) -> None:
        """Work; wait for a storage that is away as long as it takes, for others a few tries."""
        refused, pause = 0, FIRST_PAUSE
        while not self._stops():
            try:
                return self._work(place, device, cores)
            except Exception as error:
                known = _trouble(error)
                if known is None:
                    raise
            refused += not (isinstance(known, StorageError) and known.passes)
            if refused == TRIES:
                raise known
            log.warning("trying again in %.0f s: %s", pause, known)
            self._rest(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, LONGEST_PAUSE)

    def _rest(self, seconds: float) -> None:
        """Wait; less when told to stop."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._stops():
            time.sleep(TICK)

    def _work(self, place: Place, device: str | None, cores: int) -> None:
        from tuner.session import join
        from tuner.stores import open_store
        from tuner.worker import work

        session = join(place.study, storage_url(None), open_store(None))
        folder = os.environ.get("TUNER_DATA")
        data = session.file.data.build(Path(folder) if folder else None)
        where = device or _found_device()
        work(
            session,
            data.to(where) if where != "cpu" else data,
            device=where,
            name=self.name,
            # The processor only feeds a GPU; threads that wait for each other would slow it down.
            threads=1 if where.startswith("cuda") else cores,
            stop=self._stops,
        )


def _trouble(error: Exception) -> TunerError | None:
    """What the storage or the store of artifacts said; None when it was another."""
    return error if isinstance(error, StoreError) else failure(error, storage_url(None))


def _found_device() -> str:
    """The GPU that Ray gave this process; without one the processor, loudly if it gave one."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given:
        log.warning("Ray gave GPU %s, but torch finds none here: on the processor", given)
    return "cpu"
