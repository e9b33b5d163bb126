"""The command worker: all slots of a machine at work on a study that was created before."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuner.cli import _state, app
from tuner.cli.failures import curable
from tuner.cli.options import Artifacts, DataFolder, Device, Lanes, Storage, StudyName, joined
from tuner.cli.slot import Grace
from tuner.errors import StorageError

if TYPE_CHECKING:
    from tuner.session import Session
    from tuner.slots import SlotPlan
    from tuner.worker import StopRequest

log = logging.getLogger(__name__)

Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", min=1, help="Threads of each slot (default: the cores shared out; 1 on GPUs)"
    ),
]


@app.command()
def worker(
    study: StudyName,
    storage: Storage = None,
    data: DataFolder = None,
    artifacts: Artifacts = None,
    device: Device = None,
    gpus: Annotated[
        str | None, typer.Option("--gpus", help="all, or some of the visible ones, such as 0,1")
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option("--slots", min=1, help="Processes on the processor (default: one per core)"),
    ] = None,
    slots_per_gpu: Annotated[
        str | None,
        typer.Option(
            "--slots-per-gpu",
            help="Processes on each GPU, or auto: as its memory allows (default: 1)",
        ),
    ] = None,
    threads: Threads = None,
    lanes: Lanes = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--id",
            envvar="TUNER_WORKER_ID",
            help="Name of this worker: started again under it, it gets its trials back "
            "(default: one of its own)",
        ),
    ] = None,
    wait: Annotated[
        bool,
        typer.Option(help="Stay while others train the last trials, should they get lost."),
    ] = True,
    grace: Grace = 60.0,
) -> None:
    """Work on a study that was created before, with all slots of this machine, until it is done."""
    from tuner.slots import lanes_on
    from tuner.worker import StopRequest

    with StopRequest().installed() as stop:
        session = joined_when_there(
            lambda: joined(study, storage, artifacts, writes=True, lasting=True), stop
        )
        if session is None:
            log.warning("stopped before the storage was there")
            return
        environment = slot_environment(storage, data, artifacts, grace, lanes)
        plans = _plans(session, device, gpus, slots, slots_per_gpu, threads, environment)
        lanes_on(plans[0].device, lanes)
        name = name or new_name()
        reason = supervise(session, plans, name, environment, stop, wait=wait, grace=grace)
    _conclude(session, reason)


def joined_when_there(
    join: Callable[[], Session], stop: Callable[[], bool], patience: float | None = None
) -> Session | None:
    """The session that ``join`` gives once the storage answers; None when ``stop`` says so.

    A storage that may be about to start is waited for as long as a running worker waits for one.

    Raises:
        StorageError: It was not there in time, or waiting for it cannot help.
    """
    from tuner.engines import PATIENCE, pauses

    seconds, said = PATIENCE if patience is None else patience, False
    waiting = pauses(seconds)
    while not stop():
        try:
            return join()
        except Exception as error:
            known = curable(error)
            pause = next(waiting, None)
            if not isinstance(known, StorageError) or not known.passes or pause is None:
                raise
        if not said:
            said = True
            log.warning("%s; waiting for it, up to %.0f minutes", known, seconds / 60)
        time.sleep(pause)
    return None


def supervise(
    session: Session,
    plans: Sequence[SlotPlan],
    name: str,
    environment: dict[str, str],
    stop: StopRequest,
    *,
    wait: bool = True,
    grace: float = 60.0,
) -> str | None:
    """Work with a process for each slot; why it ended, None if ``stop`` said so."""
    from tuner.cli.machine import Bars
    from tuner.supervisor import Supervisor

    terminal = sys.stderr.isatty()
    _introduce(name, plans)
    with Bars(session, terminal=terminal) as bars:
        return Supervisor(
            session,
            plans,
            name,
            lambda plan, own: _slot_command(session, plan, own, terminal),
            environment=environment,
            wait=wait,
            grace=grace,
            stop=stop,
            say=bars.say,
            show=bars.show,
        ).run()


def _slot_command(session: Session, plan: SlotPlan, name: str, terminal: bool) -> list[str]:
    """What a slot's process is started with; nothing secret, for everybody sees it."""
    level = logging.getLogger("tuner").level
    if terminal:
        level = logging.INFO if level < logging.INFO else max(level, logging.WARNING)
    options = ["--id", name, "--device", plan.device, "--threads", str(plan.threads)]
    return [
        *_tuner(),
        *(["--debug"] if _state["debug"] else []),
        "slot",
        *options,
        "--level",
        str(level),
        "--",
        session.file.name,
    ]


def _tuner() -> list[str]:
    """The command ``tuner`` for this interpreter; files that lie here are modules only if ours."""
    here = sys.path[0] in ("", os.getcwd())
    return [sys.executable, *([] if here else ["-P"]), "-m", "tuner"]


def slot_environment(
    storage: str | None,
    data: Path | None,
    artifacts: str | None,
    grace: float = 60.0,
    lanes: int | None = None,
) -> dict[str, str]:
    """The environment of a slot's process: this one, with what was said on the command line."""
    from tuner.storage import storage_url

    said = {
        "TUNER_STORAGE": storage_url(storage),
        "TUNER_DATA": None if data is None else str(data),
        "TUNER_ARTIFACTS": artifacts,
        "TUNER_GRACE": str(grace),
        "TUNER_LANES": None if lanes is None else str(lanes),
    }
    return {**os.environ, **{key: value for key, value in said.items() if value is not None}}


def _plans(
    session: Session,
    device: str | None,
    gpus: str | None,
    slots: int | None,
    slots_per_gpu: str | None,
    threads: int | None,
    environment: dict[str, str],
) -> list[SlotPlan]:
    import torch

    from tuner.cli.options import chosen_device
    from tuner.slots import plan_slots, usable_cores, visible_gpus

    if device is not None and device.partition(":")[0] != "cuda":
        chosen_device(device)
    return plan_slots(
        device,
        cores=usable_cores(),
        visible=visible_gpus(torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")),
        gpus=gpus,
        slots=slots,
        slots_per_gpu=_shares(session, slots_per_gpu, environment),
        threads=threads,
    )


def _shares(
    session: Session, slots_per_gpu: str | None, environment: dict[str, str]
) -> Callable[[Sequence[str]], list[int]] | None:
    """How many slots each of some GPUs gets, as ``--slots-per-gpu`` says."""
    from tuner.errors import TunerError

    if slots_per_gpu is None:
        return None
    if slots_per_gpu == "auto":
        return lambda gpus: _measured(session, gpus, environment)
    if not slots_per_gpu.isdecimal() or int(slots_per_gpu) < 1:
        raise TunerError(f"--slots-per-gpu {slots_per_gpu}: give a number from 1 up, or auto")
    count = int(slots_per_gpu)
    return lambda gpus: [count] * len(gpus)


def _measured(session: Session, gpus: Sequence[str], environment: dict[str, str]) -> list[int]:
    """How many slots fit each GPU: a process on each trains the study's largest recipes."""
    import json
    import subprocess
    from concurrent.futures import ThreadPoolExecutor

    from tuner.errors import TunerError
    from tuner.slots import slots_that_fit, usable_cores

    log.info("measuring the memory that the largest recipes take")
    command = [*_tuner(), "probe", "--", session.file.name]

    def measured(gpu: str) -> int:
        seen = {**environment, "CUDA_VISIBLE_DEVICES": gpu}
        done = subprocess.run(command, env=seen, capture_output=True, text=True)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["it was killed"])[-1]
            raise TunerError(f"GPU {gpu} could not be measured ({last}); give a --slots-per-gpu")
        need = json.loads(done.stdout)
        share = slots_that_fit(need["per_slot"], need["total"], usable_cores() // len(gpus))
        gib = need["per_slot"] / 2**30, need["total"] / 2**30
        log.info("GPU %s: %.1f of %.1f GiB per slot, so %d slots", gpu, *gib, share)
        return share

    with ThreadPoolExecutor(len(gpus)) as pool:
        return list(pool.map(measured, gpus))


def new_name() -> str:
    """A name for this worker that nobody else has."""
    import socket

    return f"{socket.gethostname()}-{os.urandom(2).hex()}"


def _introduce(name: str, plans: Sequence[SlotPlan]) -> None:
    first, count = plans[0], len(plans)
    gpus = dict.fromkeys(p.environment.get("CUDA_VISIBLE_DEVICES") for p in plans)
    where = first.device if None in gpus else f"GPU {', '.join(map(str, gpus))}"
    slots = "1 slot" if count == 1 else f"{count} slots"
    threads = "1 thread" if first.threads == 1 else f"{first.threads} threads"
    log.info("worker %s: %s on %s, %s each", name, slots, where, threads)


def _conclude(session: Session, reason: str | None) -> None:
    if reason is None:
        log.warning("stopped; every trial goes on where it was, here or elsewhere")
    elif reason == "over":
        log.info("study %s: the budget is spent", session.file.name)
    else:
        log.info("study %s: told to %s", session.file.name, reason.replace("_", " "))
