"""A disturbed study ends as an undisturbed one: everything once, with the same numbers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from crew import Crew, Place
from monkey import Monkey, small_disk
from optuna.trial import FrozenTrial
from proof import tally, trials_of, violations
from servers import binaries, own_postgres

WORKERS = 3
TROUBLE_SECONDS = 12
PATIENCE = 180
REQUIRED = os.environ.get("TUNER_REQUIRE_SERVICES") == "1"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[FrozenTrial]:
    folder = tmp_path_factory.mktemp("undisturbed")
    place = Place(f"sqlite:///{folder}/tuner.db", folder / "artifacts")
    place.create()
    crew = Crew(place, ["only"], folder / "log")
    Monkey(crew, 0).calm(PATIENCE)
    crew.dismiss()
    return trials_of(place.url)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path | None]:
    with small_disk(tmp_path / "artifacts") as folder:
        yield folder


def disturb(monkey: Monkey, expected: list[FrozenTrial]) -> None:
    crew = monkey.crew
    crew.place.create()
    try:
        monkey.trouble(TROUBLE_SECONDS)
        monkey.calm(PATIENCE)
    finally:
        crew.dismiss()
    said = crew.log.read_text()[-4000:]
    assert list(violations(crew.place, expected)) == [], f"{monkey.done}\n{said}"
    counts = tally(crew.place.url)
    assert counts["complete"] == crew.place.trials
    assert counts["attempts"] > crew.place.trials, "nothing was disturbed"


@pytest.mark.long
@pytest.mark.timeout(500)
def test_study_on_sqlite_survives_everything(
    undisturbed: list[FrozenTrial], tmp_path: Path, disk: Path | None
) -> None:
    place = Place(f"sqlite:///{tmp_path}/tuner.db", tmp_path / "artifacts")
    names = [f"worker {i}" for i in range(WORKERS)]
    crew = Crew(place, names, tmp_path / "log", skew={names[0]: 3600.0})
    disturb(Monkey(crew, seed=1, disk=disk), undisturbed)


@pytest.mark.long
@pytest.mark.database
@pytest.mark.timeout(500)
def test_study_on_postgresql_survives_everything(
    undisturbed: list[FrozenTrial], tmp_path: Path, disk: Path | None
) -> None:
    found = binaries()
    if found is None or (os.getuid() == 0 and shutil.which("runuser") is None):
        if REQUIRED:
            pytest.fail("PostgreSQL's server is not installed")
        pytest.skip("PostgreSQL's server is not installed")
    with own_postgres(found) as server:
        place = Place(server.url, tmp_path / "artifacts")
        names = [f"worker {i}" for i in range(WORKERS)]
        crew = Crew(place, names, tmp_path / "log", skew={names[1]: -3600.0})
        disturb(Monkey(crew, seed=2, server=server, disk=disk), undisturbed)
