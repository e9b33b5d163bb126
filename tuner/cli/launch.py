"""Commands that place workers on many machines: launch ray, launch slurm."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuner.cli import app
from tuner.cli.options import Artifacts, DataFolder, Storage, StudyName, joined, refuse_unfit

if TYPE_CHECKING:
    from tuner.launch import Place
    from tuner.launch._cluster import Crew
    from tuner.rungs.outcome import Outcome
    from tuner.session import Session

launch = typer.Typer(
    help="Place workers on many machines, with Ray or Slurm.", no_args_is_help=True
)
app.add_typer(launch, name="launch", rich_help_panel="Fleet")

Workers = Annotated[int, typer.Option("--workers", "-n", min=1, help="How many.")]
WorkerDevice = Annotated[
    str | None,
    typer.Option("--device", help="cpu or cuda; by default cuda where there is one."),
]

log = logging.getLogger(__name__)


@launch.command()
def ray(
    study: StudyName,
    workers: Workers,
    gpus: Annotated[
        float,
        typer.Option(
            "--gpus-per-worker", min=0.0, max=1.0, help="Share of a GPU, such as 0.5; 0: none."
        ),
    ] = 1.0,
    cpus: Annotated[float, typer.Option("--cpus-per-worker", min=0.0)] = 1.0,
    address: Annotated[
        str,
        typer.Option("--address", help="HOST:PORT, ray://HOST:PORT, auto, or local: start Ray."),
    ] = "auto",
    storage: Storage = None,
    data: DataFolder = None,
    artifacts: Artifacts = None,
    device: WorkerDevice = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--id",
            help="Name of the workers: launched again under it, they get their trials back.",
        ),
    ] = None,
    grace: Annotated[
        float,
        typer.Option(
            "--grace",
            min=0.0,
            envvar="TUNER_GRACE",
            help="Seconds to finish a step and keep the trial when told to stop.",
        ),
    ] = 60.0,
) -> None:
    """Work on a study that was created before, on the machines of a Ray cluster.

    Folders of data and artifacts must be the same on all machines. Ray starts a worker anew
    whose process or machine is lost; the trial it had waits for it, or for another.
    """
    from tuner.launch import Place
    from tuner.launch._cluster import Crew

    refuse_unfit(device)
    session = joined(study, storage, artifacts, writes=True, lasting=True)
    place = Place.here(session.file.name, storage, data, artifacts)
    crew = Crew(name or f"ray-{os.urandom(2).hex()}", workers, gpus, cpus, device)
    _conclude(session, _follow(session, place, crew, address, grace))


def _follow(session: Session, place: Place, crew: Crew, address: str, grace: float) -> str | None:
    """Place a crew with Ray and follow it; why it ended, None if somebody asked to stop."""
    from tuner.cli.machine import Bars
    from tuner.cli.show import describe_cohort
    from tuner.launch._cluster import connected
    from tuner.launch._ray import Placement
    from tuner.worker import StopRequest

    # Ray listens to signals while it starts; it must not be the last to say so.
    with (
        connected(address) as library,
        StopRequest().installed() as stop,
        Bars(session, terminal=sys.stderr.isatty()) as bars,
    ):
        return Placement(
            library,
            session,
            place,
            crew,
            alone=address == "local",
            stop=stop,
            show=bars.show,
            on_trial=_say,
            on_cohort=lambda *ended: log.info("%s", describe_cohort(session, *ended)),
        ).run(grace=grace)


def _conclude(session: Session, reason: str | None) -> None:
    if reason is None:
        log.warning("stopped; every trial goes on where it was, here or elsewhere")
    elif reason == "over":
        log.info("study %s: the budget is spent", session.file.name)
    else:
        log.info("study %s: told to stop (%s)", session.file.name, reason.replace("_", " "))


@launch.command()
def slurm(
    study: StudyName,
    workers: Workers,
    gpus: Annotated[int, typer.Option("--gpus-per-worker", min=0)] = 1,
    cpus: Annotated[int, typer.Option("--cpus-per-worker", min=1)] = 4,
    time: Annotated[
        str, typer.Option("--time", help="Limit of a job; it is queued again when it is up.")
    ] = "4:00:00",
    partition: Annotated[str | None, typer.Option("--partition")] = None,
    further: Annotated[
        list[str] | None,
        typer.Option("--slurm", metavar="KEY=VALUE", help="Another option of sbatch; repeatable."),
    ] = None,
    folder: Annotated[
        Path, typer.Option("--folder", help="For script and logs; all machines must share it.")
    ] = Path("runs/slurm"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the script and submit nothing.")
    ] = False,
    storage: Storage = None,
    data: DataFolder = None,
    artifacts: Artifacts = None,
    device: WorkerDevice = None,
    slots_per_gpu: Annotated[
        str | None, typer.Option("--slots-per-gpu", help="As of tuner worker.")
    ] = None,
    local: Annotated[bool, typer.Option("--local", hidden=True)] = False,
) -> None:
    """Submit an array of Slurm jobs that work on a study, each with all it gets of one machine.

    A job that is preempted, or whose time is up, finishes its step, keeps its trials, and goes
    back into Slurm's queue. The environment goes with the jobs; it is where passwords belong.
    """
    from tuner.launch import Place
    from tuner.launch import _slurm as jobs

    refuse_unfit(device)
    session = joined(study, storage, artifacts, writes=True)
    place = Place.here(session.file.name, storage, data, artifacts)
    array = jobs.Array(workers, gpus, cpus, jobs.minutes(time), partition, _pairs(further or []))
    if dry_run:
        print(jobs.script(array, place.study, folder))
        if not local:
            _warn_of_reach(place, jobs.MACHINES)
        return
    chosen = {"--device": device, "--slots-per-gpu": slots_per_gpu}
    options = [word for key, value in chosen.items() if value for word in (key, value)]
    first, *_ = jobs.submit(array, place, folder, options, local=local)
    number = first.partition("_")[0]
    print(f"submitted as job {number}; logs are in {folder}; to stop: scancel {number}")


def _warn_of_reach(place: Place, machines: Iterable[str]) -> None:
    from tuner.errors import TunerError

    try:
        place.check_reach(machines)
    except TunerError as error:
        log.warning("without --dry-run this is refused: %s", error)


def _pairs(given: list[str]) -> dict[str, str | bool]:
    """Options of sbatch from KEY=VALUE, or KEY alone for those without a value."""
    split = [text.lstrip("-").partition("=") for text in given]
    return {key: value if equals else True for key, equals, value in split}


def _say(outcome: Outcome) -> None:
    from tuner.cli.show import describe

    level = logging.WARNING if outcome.state == "failed" else logging.INFO
    log.log(level, "trial %d · %s", outcome.number, describe(outcome))
