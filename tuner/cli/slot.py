"""What a worker's processes run: a slot that trains, and a probe that measures memory."""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from tuner.cli import _state, app, say
from tuner.cli.options import DataFolder, StudyName, chosen_device, joined
from tuner.errors import NameTakenError, StorageError, TunerError

Grace = Annotated[
    float,
    typer.Option(
        "--grace",
        min=0.0,
        envvar="TUNER_GRACE",
        help="Seconds to finish a step and keep the trial when told to stop.",
    ),
]


@app.command(hidden=True)
def slot(
    study: StudyName,
    name: Annotated[str, typer.Option("--id", help="Name of the worker.")],
    device: Annotated[str, typer.Option("--device")],
    threads: Annotated[int, typer.Option("--threads", min=1)] = 1,
    level: Annotated[int, typer.Option("--level", help="Of the log.")] = logging.INFO,
    grace: Grace = 60.0,
    data: DataFolder = None,
) -> None:
    """Be one slot of a worker: train trials while there are tickets.

    Where the study is comes from the environment. It leaves when its standard input ends.
    """
    from tuner.cli.failures import curable

    logging.getLogger("tuner").setLevel(level)
    try:
        _be_a_slot(study, name, device, threads, grace, data)
    except Exception as error:
        known = curable(error)
        if known is None:
            raise
        if _state["debug"]:
            traceback.print_exc()
        say(f"tuner: {known}")
        raise typer.Exit(_exit_code(known)) from None


def _exit_code(error: TunerError) -> int:
    """What the supervisor is told: start again later, leave the name to another, or give up."""
    from tuner.stores import StoreError
    from tuner.supervisor import TAKEN, TEMPORARY

    if isinstance(error, StorageError | StoreError):
        return TEMPORARY
    return TAKEN if isinstance(error, NameTakenError) else 1


def _be_a_slot(
    study: str,
    name: str,
    device: str,
    threads: int,
    grace: float,
    data: Path | None,
) -> None:
    from tuner.cli.failures import naming
    from tuner.cli.machine import SlotLines
    from tuner.worker import StopRequest, work

    with StopRequest(quiet=True).installed() as stop:
        _leave_with_input(stop, grace)
        chosen_device(device)
        session = joined(study, None, None, writes=True, lasting=True)
        with naming(f"study {session.file.name}"):
            loaded = session.file.data.build(data)
        lines = SlotLines(session)
        work(
            session,
            loaded.to(device) if device != "cpu" else loaded,
            device=device,
            name=name,
            threads=threads,
            wait=False,
            stop=stop,
            on_epoch=lines.epoch,
            on_trial=lines.trial,
            on_cohort=lines.cohort,
        )


def _leave_with_input(asked: Callable[[], bool], grace: float) -> None:
    """Stop when standard input ends: the supervisor is gone, and nobody else would say so."""
    import signal
    import threading
    import time

    def listen() -> None:
        while os.read(0, 64):
            pass
        if not asked():
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace)
        os.killpg(0, signal.SIGKILL)

    if not os.isatty(0):
        threading.Thread(target=listen, name="supervisor", daemon=True).start()


@app.command(hidden=True)
def probe(
    study: StudyName,
    device: Annotated[str, typer.Option("--device")] = "cuda",
    data: DataFolder = None,
) -> None:
    """Print what memory the largest recipes of a study take on a device, as JSON."""
    import json
    from dataclasses import asdict

    from tuner.probe import measure

    session = joined(study, None, None)
    where = chosen_device(device)
    loaded = session.file.data.build(data).to(where)
    print(json.dumps(asdict(measure(session.file.space, loaded, where))))
