"""Where workers on other machines are told that a study is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuner.errors import TunerError
from tuner.launch import Place
from tuner.launch._cluster import check_address


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("TUNER_STORAGE", "OPTUNA_STORAGE", "TUNER_ARTIFACTS", "TUNER_DATA", "PGPASSWORD"):
        monkeypatch.delenv(name, raising=False)


def test_folders_are_told_as_seen_from_everywhere(tmp_path: Path) -> None:
    place = Place.here("tiny", None, Path("images"), None)
    assert place.given == {
        "TUNER_STORAGE": f"sqlite+pysqlite:///{tmp_path}/runs/tuner.db",
        "TUNER_ARTIFACTS": f"{tmp_path}/runs/artifacts",
        "TUNER_DATA": f"{tmp_path}/images",
    }
    place = Place.here("tiny", "grpc://proxy:13000", None, "s3://bucket/prefix")
    assert place.given == {
        "TUNER_STORAGE": "grpc://proxy:13000",
        "TUNER_ARTIFACTS": "s3://bucket/prefix",
    }


def test_credentials_fill_in_what_a_machine_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", "from here")
    monkeypatch.setenv("AWS_REGION", "north")
    monkeypatch.setenv("TUNER_STORAGE", "postgresql://somewhere")
    place = Place.here("tiny", "postgresql://here/tuner", None, None)
    there = {"PGPASSWORD": "its own", "TUNER_STORAGE": "its own"}
    place.enter(there)
    assert there["PGPASSWORD"] == "its own"
    assert there["AWS_REGION"] == "north"
    assert there["TUNER_STORAGE"] == "postgresql://here/tuner"
    assert "from here" not in repr(place)
    assert "postgresql" not in repr(place)


def test_sqlite_is_refused_across_machines() -> None:
    Place.here("tiny", "sqlite:///tuner.db", None, None).check_reach(["a", "a"])
    Place.here("tiny", "postgresql://here/tuner", None, None).check_reach(["a", "b"])
    Place.here("tiny", "grpc://proxy", None, None).check_reach(["a", "b"])
    with pytest.raises(TunerError, match=r"SQLite file.*on several \(a, b\); give PostgreSQL"):
        Place.here("tiny", None, None, None).check_reach(["b", "a"])


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9", "nowhere"])
def test_address_where_no_ray_answers_is_refused_at_once(address: str) -> None:
    with pytest.raises(TunerError, match=f"--address {address}: .*; give HOST:PORT, ray://"):
        check_address(address)
