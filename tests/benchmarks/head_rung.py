"""Trials per minute at the head rung, storage and proposals included, on a long-tailed folder.

A study with ``rungs = ["head", "full"]`` is made of an image folder, its baseline is trained, and
then worker processes, one per core and with one thread each, train all trials of the head rung:
claimed, proposed, trained, judged and written as in any study. ``--data`` is a folder of images
with a sub-folder per class in ``train``; ``--storages`` are sqlite and postgres. Prints wall-clock
trials per minute, and where a worker's processor time goes.
"""

from __future__ import annotations

import argparse
import cProfile
import multiprocessing
import os
import platform
import pstats
import tempfile
import time
import tomllib
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import torch

from tuner import session as sessions
from tuner.datasets import Data
from tuner.ladder import rung_of
from tuner.stores import FolderStore
from tuner.study import parse
from tuner.trained import backbone, features_folder
from tuner.worker import work

TEXT = """
name = "head-rung"
[data]
name = "image_folder"
root = "{root}"
image_size = 32
profile = {{ name = "exponential", ratio = {ratio} }}
tail = {{ bottom = 0.3 }}
[budget]
trials = 1
epochs = {epochs}
[ladder]
rungs = ["head", "full"]
[ladder.head]
trials = {trials}
[search]
algorithm = "{algorithm}"
[model]
name = "small_cnn"
[augment]
name = "standard"
[space.optimizer.sgd]
lr = {{ low = 3e-2, high = 0.3, log = true }}
[space.sampler.natural]
[space.sampler.class_aware]
exponent = {{ low = 0.0, high = 1.0 }}
[space.loss.cross_entropy]
[space.loss.label_smoothing]
eps = {{ low = 0.02, high = 0.3 }}
[space.loss.weighted_cross_entropy]
power = {{ low = 0.0, high = 1.0 }}
[space.loss.class_balanced]
beta = [0.9, 0.99, 0.999, 0.9999]
base = ["softmax", "sigmoid", "focal"]
[space.loss.asymmetric]
gamma_neg = [0.0, 1.0, 2.0, 4.0]
eps = {{ low = 0.0, high = 0.3 }}
[space.loss.balanced_softmax]
[space.loss.vector_scaling]
gamma = {{ low = 0.0, high = 0.3 }}
tau = {{ low = 0.0, high = 2.0 }}
[space.loss.ldam]
max_margin = {{ low = 0.1, high = 0.6 }}
"""
POSTGRES = os.environ.get("TUNER_TEST_POSTGRES", "postgresql+psycopg://postgres@127.0.0.1:5432/")


def study(given: argparse.Namespace, folder: Path, url: str) -> tuple[sessions.Session, Data]:
    """The study, its baseline trained and its features cached."""
    text = TEXT.format(**vars(given), root=given.data)
    file = parse(tomllib.loads(text), text, where="benchmark")
    data = file.data.build(None)
    session = sessions.create(file, url, FolderStore(folder / "artifacts"), data)
    work(session, data, stop=lambda: session.baseline() is not None)
    backbone(session, data, "cpu", features_folder())
    return session, data


def be_a_worker(
    url: str, folder: Path, data: Data, barrier: Any, answers: Any, profiled: bool
) -> None:
    """Train trials of the head rung until none is left; what it took of the processor."""
    session = sessions.join("head-rung", url, FolderStore(folder / "artifacts"))
    torch.set_num_threads(1)
    barrier.wait()
    start, profile = time.process_time(), cProfile.Profile()
    if profiled:
        profile.enable()
    ended = work(session, data, wait=False)
    profile.disable()
    answers.put((ended, time.process_time() - start, _shares(profile) if profiled else {}))


def _shares(profile: cProfile.Profile) -> dict[str, float]:
    """Share of the time below some functions."""
    stats: Any = pstats.Stats(profile)
    names = {
        ("head.py", "_judge"): "judge",
        ("recipes.py", "resolve"): "propose",
        ("_ledger.py", "claim_alike"): "claim",
        ("_ledger.py", "finish_all"): "write",
        ("tickets.py", "next_lease"): "queue",
        ("_shared.py", "train_shared"): "train",
        ("_own.py", "train_own"): "train",
    }
    shares: Counter[str] = Counter()
    for (path, _, function), (_, _, _, below, _) in stats.stats.items():
        name = names.get((Path(path).name, function))
        if name:
            shares[name] += below
    return {name: seconds / stats.total_tt for name, seconds in shares.items()}


def measure(given: argparse.Namespace, storage: str, folder: Path) -> str:
    """One row: wall-clock and processor time of all trials of the rung."""
    url = f"sqlite:///{folder}/tuner.db" if storage == "sqlite" else _database()
    session, data = study(given, folder, url)
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(given.workers + 1), context.Queue()
    arguments = (url, folder, data, barrier, answers, given.profile)
    crew = [context.Process(target=be_a_worker, args=arguments) for _ in range(given.workers)]
    for process in crew:
        process.start()
    barrier.wait()
    start = time.monotonic()
    found = [answers.get() for _ in crew]
    seconds = time.monotonic() - start
    for process in crew:
        process.join()
    trials = sum(rung_of(t) == "head" and t.state.is_finished() for t in session.trials())
    cpu = sum(spent for _, spent, _ in found)
    shares = ", ".join(f"{name} {share:.0%}" for name, share in sorted(found[0][2].items()))
    return (
        f"| {storage} | {given.algorithm} | {given.workers} | {trials} | {len(data.train)} | "
        f"{60 * trials / seconds:.0f} | {1000 * cpu / trials:.0f} | {shares} |"
    )


def _database() -> str:
    import uuid

    import sqlalchemy

    server = sqlalchemy.create_engine(POSTGRES, isolation_level="AUTOCOMMIT")
    name = f"tuner_head_{uuid.uuid4().hex[:8]}"
    with server.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    server.dispose()
    url = sqlalchemy.make_url(POSTGRES).set(database=name)
    return url.render_as_string(hide_password=False)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--ratio", type=float, default=100.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--algorithm", default="tpe")
    parser.add_argument("--storages", nargs="+", default=["sqlite", "postgres"])
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    given.data = given.data.resolve()
    print(f"{date.today()}, {os.cpu_count()} cores, {platform.processor()}, load {os.getloadavg()}")
    print("| storage | algorithm | workers | trials | images | trials/min | CPU ms/trial | of it |")
    print("|---|---|---|---|---|---|---|---|")
    for _ in range(given.rounds):
        for storage in given.storages:
            with tempfile.TemporaryDirectory() as folder:
                os.environ["TUNER_CACHE"] = str(Path(folder) / "cache")
                print(measure(given, storage, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
