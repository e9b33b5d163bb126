"""The long chaos run: many seeds on SQLite and PostgreSQL, and a machine that is cut off.

    python tests/benchmarks/chaos.py --rounds 5 --workers 4 --trouble 60

Each round makes a study, disturbs its workers by a seed of its own, lets it come to its end and
proves from the database that nothing was lost, nothing ran twice and every number is that of an
undisturbed run. Prints a table; exits 1 when a round proves nothing of the kind.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "chaos"))

import sqlalchemy as sa
from crew import LEASE, Crew, Place
from monkey import Monkey, small_disk
from optuna.trial import FrozenTrial
from proof import tally, trials_of, violations
from servers import OwnPostgres, binaries, own_postgres

STORAGES = ("sqlite", "postgresql", "partition")
COLUMNS = ("complete", "attempts", "lost", "preempted", "resumed", "released")
PATIENCE = 600


def undisturbed(place: Place, folder: Path) -> list[FrozenTrial]:
    """The trials of one worker that nobody disturbs."""
    alone = replace(place, url=f"sqlite:///{folder}/tuner.db", artifacts=folder / "artifacts")
    alone.create()
    crew = Crew(alone, ["only"], folder / "log")
    Monkey(crew, 0).calm(PATIENCE)
    crew.dismiss()
    return trials_of(alone.url)


@contextlib.contextmanager
def machine_apart(number: int) -> Iterator[str]:
    """A network namespace with one cable to this machine; its name."""
    name, here, there = f"tuner{number}", f"tun{number}h", f"tun{number}t"
    net = f"10.213.{number}"
    for command in (
        f"ip netns add {name}",
        f"ip link add {here} type veth peer name {there} netns {name}",
        f"ip addr add {net}.1/24 dev {here}",
        f"ip link set {here} up",
        f"ip netns exec {name} ip addr add {net}.2/24 dev {there}",
        f"ip netns exec {name} ip link set {there} up",
        f"ip netns exec {name} ip link set lo up",
    ):
        subprocess.run(command.split(), check=True, capture_output=True)
    try:
        yield name
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=False)


class Machine:
    """A worker process in a namespace, whose cable can be pulled."""

    def __init__(self, place: Place, server: OwnPostgres, number: int, namespace: str) -> None:
        self.namespace, self.cable = namespace, f"tun{number}h"
        url = f"postgresql+psycopg://postgres@10.213.{number}.1:{server.port}/postgres"
        code = (
            "import sys; sys.path.insert(0, sys.argv[1]); import crew; from pathlib import Path;"
            "crew.work_on(crew.Place(sys.argv[2], Path(sys.argv[3])), sys.argv[4],"
            " Path(sys.argv[5]), 0.0)"
        )
        folder = str(Path(__file__).parents[1] / "chaos")
        inside = ["ip", "netns", "exec", namespace, sys.executable, "-c", code]
        log = str(place.artifacts.parent / "log")
        self.process = subprocess.Popen(
            [*inside, folder, url, str(place.artifacts), f"machine {number}", log]
        )

    def cable_is(self, state: str) -> None:
        subprocess.run(["ip", "link", "set", self.cable, state], check=True)


def cut_off(place: Place, server: OwnPostgres) -> None:
    """Two machines work; one is cut off for longer than its lease, and comes back."""
    with machine_apart(1) as first, machine_apart(2) as second:
        place.create()
        machines = [Machine(place, server, i + 1, n) for i, n in enumerate((first, second))]
        watch = Monkey(Crew(place, [], place.artifacts.parent / "log"), 0)
        try:
            victim = machines[0]
            while len(watch.query("SELECT token FROM tuner_attempts WHERE holds > 0")) < 2:
                time.sleep(0.1)
            victim.cable_is("down")
            time.sleep(LEASE * 2.5)
            victim.cable_is("up")
            until = time.monotonic() + PATIENCE
            while not watch.is_over() and time.monotonic() < until:
                time.sleep(0.2)
            for machine in machines:
                machine.process.wait(60)
        finally:
            for machine in machines:
                machine.process.kill()


def round_of(
    storage: str, seed: int, options: argparse.Namespace, expected: list[FrozenTrial]
) -> tuple[Place, Counts, list[str]]:
    """One disturbed study: where it is, what was done to it, and what does not hold."""
    folder = Path(tempfile.mkdtemp(prefix=f"chaos-{storage}-{seed}-"))
    with contextlib.ExitStack() as stack:
        disk = stack.enter_context(small_disk(folder / "artifacts"))
        server = None
        url = f"sqlite:///{folder}/tuner.db"
        if storage != "sqlite":
            found = binaries()
            assert found is not None, "PostgreSQL's server is not installed"
            server = stack.enter_context(own_postgres(found, "*"))
            url = server.url
        place = Place(url, folder / "artifacts", options.trials, options.epochs)
        if storage == "partition":
            assert server is not None
            cut_off(place, server)
            done = {"cut off": 1}
        else:
            names = [f"worker {i}" for i in range(options.workers)]
            skew = {names[0]: 3600.0, names[-1]: -3600.0}
            crew = Crew(place, names, folder / "log", skew)
            monkey = Monkey(crew, seed, server, disk)
            place.create()
            try:
                monkey.trouble(options.trouble)
                monkey.calm(PATIENCE)
            finally:
                crew.dismiss()
            done = dict(monkey.done)
        wrong = list(violations(place, expected))
        counts = dict(tally(url))
        if wrong:
            print((folder / "log").read_text()[-4000:], file=sys.stderr)
    if not wrong:
        shutil.rmtree(folder, ignore_errors=True)
    return place, {**counts, **{f"did {k}": v for k, v in done.items()}}, wrong


Counts = dict[str, int]


def main() -> int:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--trouble", type=float, default=60.0, help="seconds of it per round")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 10_000)
    parser.add_argument("--storages", nargs="+", default=list(STORAGES), choices=STORAGES)
    options = parser.parse_args()
    print(f"{options}\n{os.cpu_count()} cores, SQLAlchemy {sa.__version__}")
    folder = Path(tempfile.mkdtemp(prefix="chaos-undisturbed-"))
    place = Place("", folder, options.trials, options.epochs)
    started = time.monotonic()
    expected = undisturbed(place, folder)
    print(f"undisturbed, one worker: {time.monotonic() - started:.0f} s")
    print(f"{'storage':11}{'seed':>6}{'s':>5}", *(f"{name:>10}" for name in COLUMNS), " done")
    bad = 0
    for storage in options.storages:
        for number in range(1 if storage == "partition" else options.rounds):
            started = time.monotonic()
            _, counts, wrong = round_of(storage, options.seed + number, options, expected)
            seconds = time.monotonic() - started
            done = {k[4:]: v for k, v in counts.items() if k.startswith("did ")}
            cells = (f"{counts.get(name, 0):>10}" for name in COLUMNS)
            print(f"{storage:11}{options.seed + number:>6}{seconds:>5.0f}", *cells, "", done)
            for line in wrong:
                print(f"    WRONG: {line}")
            bad += bool(wrong)
    print("every round holds" if not bad else f"{bad} rounds do not hold")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
