"""Workers as an array of Slurm jobs: what is submitted, and what each job runs."""

from __future__ import annotations

import logging
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from tuner.errors import TunerError
from tuner.launch._place import Place

NOTICE_SECONDS = 120
GRACE_SECONDS = 60
SHORTEST_MINUTES = 5
INTERRUPTED = 130
MACHINES = ("this machine", "Slurm's machines")
RUNNING = ("RUNNING", "SIGNALING")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Array:
    """An array of identical jobs, each one worker on one machine.

    Slurm sends SIGTERM ``NOTICE_SECONDS`` before a job's time is up. ``further`` are options of
    sbatch by their long names; True stands for one without a value.
    """

    workers: int
    gpus: int = 1
    cpus: int = 4
    minutes: int = 240
    partition: str | None = None
    further: Mapping[str, str | bool] = field(default_factory=dict)

    def parameters(self, study: str) -> dict[str, Any]:
        """What submitit's Slurm executor takes."""
        own = {"signal": f"TERM@{NOTICE_SECONDS}", "requeue": True}
        found = {
            "job_name": f"tuner-{study}",
            "time": self.minutes,
            "nodes": 1,
            "ntasks_per_node": 1,
            "cpus_per_task": self.cpus,
            "gpus_per_node": self.gpus or None,
            "partition": self.partition,
            "array_parallelism": self.workers,
            "stderr_to_stdout": True,
            # Since Slurm 22.05 a step does not have its job's cores unless it says so.
            "srun_args": [f"--cpus-per-task={self.cpus}"],
            "additional_parameters": {**own, **self.further},
        }
        # submitit would name a key for accounting that many clusters do not know.
        return {key: value for key, value in found.items() if value is not None} | {"wckey": None}


@dataclass(frozen=True)
class Job:
    """What one job of the array does; it is written to disk, so it holds nothing secret.

    Where the study is comes with the environment, which Slurm gives to every job.
    """

    study: str
    options: tuple[str, ...] = ()

    def __call__(self) -> None:
        """Work under a name of the job's; told to stop early, come back under the same name.

        Raises:
            SystemExit: With the worker's exit code, if it is not 0.
        """
        import submitit

        here = submitit.JobEnvironment()
        name = f"{here.cluster}-{here.job_id.replace('_', '-')}"
        command = [sys.executable, "-m", "tuner", "worker", "--id", name]
        command += ["--grace", str(GRACE_SECONDS), *self.options, "--", self.study]
        code, told = run_and_tell(command)
        if told and code in (0, INTERRUPTED) and _may_return(here):
            _return_to_queue(here)
        if code:
            raise SystemExit(code)


def run_and_tell(command: Sequence[str]) -> tuple[int, bool]:
    """Run a command and pass every SIGTERM on to it; its exit code, and whether one came."""
    told = False
    process = subprocess.Popen(command)

    def tell(number: int, _frame: FrameType | None) -> None:
        nonlocal told
        told = True
        process.send_signal(number)

    before = signal.signal(signal.SIGTERM, tell)
    try:
        code = process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
    return code if code >= 0 else 128 - code, told


def _may_return(here: Any) -> bool:
    """Whether this job may be put back into the queue: not one that the user cancelled."""
    if here.cluster != "slurm":
        return True
    command = ["squeue", "--noheader", "--states=all", f"--jobs={here.job_id}", "--format=%T"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return shown.stdout.strip() in RUNNING


def _return_to_queue(here: Any) -> NoReturn:
    """Put this job back: Slurm does it with preempted jobs, but not when their time is up."""
    try:
        here._requeue(0)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("this job is not put back into the queue: %s", error)
    # Nothing is written any more, for Slurm may end the process at any moment.
    raise SystemExit(0)


def script(array: Array, study: str, folder: Path) -> str:
    """The script that ``submit`` gives to sbatch."""
    slurm = _library().slurm.slurm
    words = [sys.executable, "-u", "-m", "submitit.core._submit", str(folder.absolute())]
    many = {"map_count": array.workers} if array.workers > 1 else {}
    return str(
        slurm._make_sbatch_string(
            shlex.join(words), folder.absolute(), **many, **array.parameters(study)
        )
    )


def submit(
    array: Array, place: Place, folder: Path, options: Sequence[str] = (), *, local: bool = False
) -> list[str]:
    """Submit the array; the ids of its jobs.

    The study's settings go into this process's environment, which sbatch passes on, and not
    into ``folder``, which holds the script, the pickled job and the logs.

    Args:
        array: Which jobs.
        place: Where they find the study.
        folder: A folder that all machines share.
        options: Further options of ``tuner worker``.
        local: Start processes on this machine instead, to try things without Slurm.

    Raises:
        TunerError: submitit or Slurm is not installed, the machines cannot share the storage,
            or Slurm refuses.
    """
    submitit = _library()
    if not local:
        place.check_reach(MACHINES)
    place.enter(os.environ)
    jobs = [Job(place.study, tuple(options)) for _ in range(array.workers)]
    try:
        if local:
            executor = submitit.LocalExecutor(folder)
            executor.update_parameters(timeout_min=array.minutes, stderr_to_stdout=True)
        else:
            executor = submitit.SlurmExecutor(folder)
            executor.update_parameters(**array.parameters(place.study))
        with executor.batch():
            submitted = [executor.submit(job) for job in jobs]
    except (RuntimeError, OSError) as error:
        raise TunerError(f"the jobs could not be submitted: {error}") from None
    return [job.job_id for job in submitted]


def minutes(text: str) -> int:
    """A time limit as Slurm writes it: minutes, hours:minutes:seconds, days-hours, ...

    Raises:
        TunerError: It is none, or shorter than five minutes.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        raise TunerError(f"--time {text}: give minutes, 4:00:00 or 1-12 (days and hours)")
    days, first, second, third = match.groups()
    numbers = [int(first), int(second or 0), int(third or 0)]
    if days is None and third is None:
        hours, least, seconds = 0, *numbers[:2]
    else:
        hours, least, seconds = numbers
    found = int(days or 0) * 1440 + hours * 60 + least + (seconds > 0)
    if found < SHORTEST_MINUTES:
        raise TunerError(f"--time {text}: give at least {SHORTEST_MINUTES} minutes")
    return found


def _library() -> Any:
    try:
        import submitit
        import submitit.slurm.slurm
    except ImportError:
        raise TunerError("submitit is not installed: pip install 'tuner[slurm]'") from None
    return submitit
