"""Commands that train: run, create, train."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuner.cli import app
from tuner.cli.options import (
    Artifacts,
    DataFolder,
    Device,
    Lanes,
    Storage,
    StudyPath,
    chosen_device,
)

if TYPE_CHECKING:
    from tuner.datasets import Data
    from tuner.session import Session

log = logging.getLogger(__name__)


@app.command()
def create(
    study: StudyPath,
    storage: Storage = None,
    data: DataFolder = None,
    artifacts: Artifacts = None,
) -> None:
    """Create the study in the storage and fill its queue."""
    from tuner.worker import progress

    session, _ = _created(study, storage, data, artifacts)
    counts = progress(session)
    ended = sum(counts[state] for state in ("complete", "pruned", "fail"))
    left = max(0, counts["budget"] - ended)
    print(f"study {session.file.name}: {left} of {counts['budget']} trials to do")


@app.command()
def run(
    study: StudyPath,
    storage: Storage = None,
    data: DataFolder = None,
    artifacts: Artifacts = None,
    device: Device = None,
    slots: Annotated[
        int,
        typer.Option(
            "--slots",
            min=1,
            help="Processes that share the cores. With one, the same study gives the same trials; "
            "with more, what is proposed depends on who is done first.",
        ),
    ] = 1,
    lanes: Lanes = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the report and the recipe (default: runs)"),
    ] = None,
) -> None:
    """Create the study, work until its budget is spent, and show what it found."""
    from tuner.cli.finish import finish
    from tuner.slots import lanes_on

    where = chosen_device(device)
    most = lanes_on(where, lanes)
    session, loaded = _created(study, storage, data, artifacts)
    if slots > 1:
        stopped = _work_together(session, where, slots, storage, data, artifacts)
    else:
        stopped = _work(session, loaded, where, most)
    if stopped:
        log.warning("stopped; the same command again goes on where this stopped")
        return
    options = {"storage": storage, "data": data, "artifacts": artifacts}
    finish(session, loaded, where, (output or Path("runs")) / session.file.name, options)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(metavar="recipe.toml", help="An exported recipe.")],
    data: DataFolder = None,
    device: Device = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the weights and metrics.")
    ] = None,
) -> None:
    """Train an exported recipe again and compare with the metrics stored beside it."""
    from tuner.cli.failures import naming
    from tuner.cli.finish import retrained
    from tuner.loaded import load_recipe

    with naming(recipe):
        retrained(load_recipe(recipe), recipe, data, chosen_device(device), output)


def _created(
    study: Path, storage: str | None, data: Path | None, artifacts: str | None
) -> tuple[Session, Data]:
    from tuner import session
    from tuner import study as files
    from tuner.cli.failures import naming
    from tuner.cli.show import describe_data
    from tuner.held import remarks
    from tuner.remote import is_remote
    from tuner.storage import storage_url
    from tuner.stores import open_store
    from tuner.urls import parse_url

    file, url = files.load(study), storage_url(storage)
    store = open_store(artifacts)
    # What is no URL is said before minutes are spent on images.
    if not is_remote(url):
        parse_url(url)
    for remark in remarks(file):
        log.warning(remark)
    with naming(study):
        loaded = file.data.build(data)
        for line in describe_data(loaded):
            log.info(line)
        return session.create(file, url, store, loaded), loaded


def _work_together(
    session: Session,
    device: str,
    slots: int,
    storage: str | None,
    data: Path | None,
    artifacts: str | None,
) -> bool:
    """Work on the study with several processes; whether somebody asked to stop."""
    from tuner.cli.work import new_name, slot_environment, supervise
    from tuner.errors import TunerError
    from tuner.slots import plan_slots, usable_cores
    from tuner.worker import StopRequest

    if device.partition(":")[0] == "cuda":
        raise TunerError(
            f"--slots {slots} is for the processor; for more processes on GPUs: tuner create, "
            "then tuner worker --slots-per-gpu"
        )
    plans = plan_slots(device, cores=usable_cores(), slots=slots)
    environment = slot_environment(storage, data, artifacts)
    with StopRequest().installed() as stop:
        supervise(session, plans, new_name(), environment, stop)
        return stop.asked


def _work(session: Session, data: Data, device: str, lanes: int | None) -> bool:
    """Work on the study in this process; whether somebody asked to stop."""
    from tuner.cli.show import Display
    from tuner.slots import usable_cores
    from tuner.worker import StopRequest, work

    cores = usable_cores()
    if device == "cpu" and cores > 1:
        log.info("one of %d cores is at work; --slots %d takes them all", cores, cores)
    on_device = data.to(device) if device != "cpu" else data
    with StopRequest().installed() as stop, Display(session, terminal=sys.stderr.isatty()) as show:
        work(
            session,
            on_device,
            device=device,
            lanes=lanes,
            stop=stop,
            on_epoch=show.epoch,
            on_trial=show.trial,
            on_cohort=show.cohort,
        )
        return stop.asked
