"""What the doctor finds, what it says to do, and that it leaves everything as it was."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import torch
from conftest import POSTGRES, MakeFile, MakeSession
from ledgers import claimed, enter, expire
from optuna.trial import TrialState
from sqlalchemy.engine import make_url
from test_cli import Tuner
from trainer_cases import recipe

from tuner import session as sessions
from tuner.backends import speeds
from tuner.datasets import Data
from tuner.doctor import Finding, Patient, _machine, _server, _storage, examine
from tuner.doctor._file import file_system
from tuner.engines import make_engine
from tuner.ledger import Changes, read_now
from tuner.stores import FolderStore


def findings(url: str, **options: Any) -> list[Finding]:
    return list(examine(Patient(url, **options)))


def found(check: str, among: list[Finding]) -> list[Finding]:
    return [finding for finding in among if finding.check == check]


def trouble(among: list[Finding]) -> dict[str, tuple[str, str]]:
    """Level and text of all findings that are not well."""
    return {f.check: (f.level, f"{f.found} → {f.cure}") for f in among if f.level != "ok"}


@pytest.fixture
def here(tmp_path: Path) -> str:
    """A place for artifacts that can be written."""
    return str(tmp_path / "artifacts")


@pytest.fixture(autouse=True)
def _roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of this machine's own state in the results."""
    monkeypatch.setattr(_machine, "LITTLE_MEMORY", 0)
    monkeypatch.setattr(_machine, "LITTLE_DISK", 0)
    monkeypatch.setattr(_storage, "SLOW_ANSWER", 60.0)
    monkeypatch.setattr(_storage, "SLOW_COMMIT", 60.0)
    monkeypatch.setattr(_server, "FEW", 0)
    monkeypatch.setattr(_machine, "usable_cores", lambda: 1)
    monkeypatch.setattr("os.cpu_count", lambda: 1)


@pytest.fixture
def study(database: str, make_file: MakeFile, digits: Data, here: str) -> str:
    """URL of a storage, of every kind in turn, with the study "tiny"."""
    sessions.create(make_file(), database, FolderStore(Path(here)), digits)
    return database


def everything(url: str) -> dict[str, list[Any]]:
    """All rows of all tables."""
    engine = make_engine(url)
    tables = sa.MetaData()
    tables.reflect(engine)
    with engine.connect() as connection:
        rows = {name: connection.execute(sa.select(t)).all() for name, t in tables.tables.items()}
    engine.dispose()
    return {name: sorted(map(str, found)) for name, found in rows.items()}


# A healthy patient


def test_healthy_study_has_nothing_to_do_and_stays_as_it_was(study: str, here: str) -> None:
    before = everything(study)
    all_ = findings(study, artifacts=here, study="tiny", data=Path())
    assert trouble(all_) == {}
    checks = {finding.check for finding in all_}
    assert checks >= {"program", "storage", "tables", "latency", "commits", "gpu", "artifacts"}
    assert checks >= {"study", "order", "workers", "leases", "data", "speed"}
    speed = found("speed", all_)[0].found
    assert re.match(r"linear, batches of 64 \(1x8x8\), .*: .*float32 channels_last \d+", speed)
    assert "images/s; trials take " in speed
    assert everything(study) == before


def test_servers_are_asked_for_clock_connections_and_rights(postgres: str, here: str) -> None:
    all_ = findings(postgres, artifacts=here)
    assert "agree" in found("clock", all_)[0].found
    assert re.fullmatch(r"\d+ of \d+ in use, room for .*", found("connections", all_)[0].found)
    assert "PostgreSQL" in found("storage", all_)[0].found
    assert trouble(all_).keys() == {"tables"}, "it is empty"


def test_empty_database_is_left_empty(database: str, here: str) -> None:
    all_ = findings(database, artifacts=here, study="tiny")
    assert "tuner create" in str(found("study", all_)[0].cure)
    if not database.startswith("sqlite"):
        assert everything(database) == {}
    else:
        assert not Path(str(make_url(database).database)).exists()
        assert "is not there yet" in found("storage", all_)[0].found


# Trouble with the storage


def test_server_that_is_not_there_is_named_without_its_password(here: str) -> None:
    url = "postgresql://someone:s3cret@127.0.0.1:1/nothing"
    all_ = findings(url, artifacts=here, given=True)
    level, text = trouble(all_)["storage"]
    assert level == "fail"
    assert "check that the server runs" in text
    assert "TUNER_STORAGE" in trouble(all_)["password"][1]
    assert not any("s3cret" in f"{f.found}{f.cure}" for f in all_)


def test_password_that_comes_from_the_environment_is_in_order(here: str) -> None:
    url = "postgresql://someone:s3cret@127.0.0.1:1/nothing"
    assert "password" not in trouble(findings(url, artifacts=here))


@pytest.mark.database
def test_role_that_may_only_read_is_found_out(
    postgres: str, make_file: MakeFile, digits: Data, here: str
) -> None:
    sessions.create(make_file(), postgres, FolderStore(Path(here)), digits)
    admin = sa.create_engine(postgres, isolation_level="AUTOCOMMIT")
    role = f"reader_{make_url(postgres).database}"
    with admin.connect() as connection:
        connection.exec_driver_sql(f"CREATE ROLE {role} LOGIN")
        connection.exec_driver_sql(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}")
    try:
        url = make_url(postgres).set(username=role).render_as_string(hide_password=False)
        said = trouble(findings(url, artifacts=here))
    finally:
        with admin.connect() as connection:
            connection.exec_driver_sql(f"DROP OWNED BY {role}")
            connection.exec_driver_sql(f"DROP ROLE {role}")
        admin.dispose()
    assert said["commits"][0] == "fail"
    assert "GRANT this role" in said["commits"][1]
    assert said["rights"][0] == "warn"


@pytest.mark.database
def test_server_with_few_connections_left_is_worth_a_proxy(
    postgres: str, here: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_server, "FEW", 20)
    for used, level in ((85, "warn"), (96, "fail")):
        monkeypatch.setattr(_server, "_counts", lambda _, used=used: (97, used))
        assert trouble(findings(postgres, artifacts=here))["connections"][0] == level
    assert "tuner proxy" in trouble(findings(postgres, artifacts=here))["connections"][1]


@pytest.mark.database
@pytest.mark.parametrize(("seconds", "word"), [(10.0, "ahead"), (-10.0, "behind")])
def test_clock_that_is_off_is_said_to_be_harmless_to_leases(
    postgres: str, here: str, monkeypatch: pytest.MonkeyPatch, seconds: float, word: str
) -> None:
    monkeypatch.setattr("tuner.doctor._storage.read_now", lambda c: read_now(c) + seconds)
    level, text = trouble(findings(postgres, artifacts=here))["clock"]
    assert level == "warn"
    assert f"10.0 s {word}" in text
    assert "leases are safe" in text


def test_slow_storage_is_said_to_be_slow(
    study: str, here: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_storage, "SLOW_COMMIT", 0.0)
    assert "nearer" in trouble(findings(study, artifacts=here))["commits"][1]


@pytest.mark.parametrize(
    ("theirs", "level", "cure"),
    [("0000", "warn", "brings them up to date"), ("9999", "fail", "newer Tuner")],
)
def test_tables_of_another_version_are_found(
    study: str, here: str, theirs: str, level: str, cure: str
) -> None:
    with make_engine(study).begin() as connection:
        connection.exec_driver_sql(f"UPDATE tuner_version SET version_num = '{theirs}'")
    (mine,) = (f for f in found("tables", findings(study, artifacts=here)) if f.level != "ok")
    assert (mine.level, cure in str(mine.cure)) == (level, True)


def test_tables_of_another_optuna_are_found(study: str, here: str) -> None:
    with make_engine(study).begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = 'v2.6.0.a'")
    level, text = trouble(findings(study, artifacts=here))["tables"]
    assert level == "fail"
    assert "optuna storage upgrade" in text


MOUNTS = r"""
/dev/sda1 / ext4 rw 0 0
server:/home /home nfs4 rw 0 0
/dev/sdb1 /home/local ext4 rw 0 0
//nas/share /mnt/my\040share cifs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/var/tuner.db", "ext4"),
        ("/home/me/tuner.db", "nfs4"),
        ("/home/local/tuner.db", "ext4"),
        ("/homely/tuner.db", "ext4"),
        ("/mnt/my share/tuner.db", "cifs"),
    ],
)
def test_file_system_is_that_of_the_nearest_mount(tmp_path: Path, path: str, kind: str) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(MOUNTS.strip())
    assert file_system(Path(path), mounts) == kind


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "fuse.sshfs"])
def test_sqlite_on_a_network_is_refused(
    sqlite: str, here: str, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("tuner.doctor._file.file_system", lambda path: kind)
    level, text = trouble(findings(sqlite, artifacts=here))["file system"]
    assert level == "fail"
    assert "use PostgreSQL" in text


# Trouble with the machine


def test_place_for_artifacts_that_is_a_file_fails(sqlite: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = trouble(findings(sqlite, artifacts=str(tmp_path / "file")))
    assert said["artifacts"][0] == "fail"
    assert "--artifacts" in said["artifacts"][1]


@pytest.mark.parametrize(("least", "level"), [(100 * 2**20, "warn"), (2**60, "fail")])
def test_disk_that_is_nearly_full_is_found(
    sqlite: str, here: str, monkeypatch: pytest.MonkeyPatch, least: int, level: str
) -> None:
    monkeypatch.setattr(_machine, "LITTLE_DISK", 2**60)
    monkeypatch.setattr(_machine, "NO_DISK", least)
    assert trouble(findings(sqlite, artifacts=here))["artifacts"][0] == level


@pytest.mark.parametrize(
    ("built", "driver", "mask", "level", "word"),
    [
        (None, [], None, "ok", "none"),
        ("13.0", [], None, "ok", "none"),
        (None, ["NVIDIA H200, 580.1, 143771 MiB"], None, "warn", "processors only"),
        ("13.0", ["NVIDIA H200, 450.1, 143771 MiB"], None, "fail", "cannot use it"),
        ("13.0", ["NVIDIA H200, 580.1, 143771 MiB"], "", "ok", "hidden"),
    ],
)
def test_gpu_that_torch_cannot_use_is_found(
    monkeypatch: pytest.MonkeyPatch, built: str | None, driver: list[str], mask: str | None,
    level: str, word: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(_machine, "_driver", lambda: driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if mask is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    (one,) = _machine.gpu()
    assert (one.level, word in one.found) == (level, True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_gpu_is_named_with_its_memory() -> None:
    all_ = list(_machine.gpu())
    assert sum("GiB free" in f.found for f in all_) == torch.cuda.device_count()


def test_fewer_cores_than_the_machine_has_are_said(
    sqlite: str, here: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert "1 of 8 cores" in trouble(findings(sqlite, artifacts=here))["processor"][1]


@pytest.mark.parametrize("version", ["4.9.0", "6.0.0"])
def test_optuna_of_another_generation_fails(
    sqlite: str, here: str, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(_machine, "version", lambda name: version)
    assert trouble(findings(sqlite, artifacts=here))["optuna"][0] == "fail"


# Trouble with the study


@pytest.fixture
def sick(make_session: MakeSession, sqlite: str, here: str) -> Iterator[Callable[[], Any]]:
    session = make_session()
    yield lambda: trouble(findings(sqlite, artifacts=here, study="tiny"))
    session.ledger.engine.dispose()


def test_study_that_is_not_there_says_which_are(sick: Any, sqlite: str, here: str) -> None:
    level, text = trouble(findings(sqlite, artifacts=here, study="tinny"))["study"]
    assert level == "fail"
    assert "did you mean 'tiny'" in text


def test_stopped_study_says_so_and_how_to_go_on(sick: Any, make_session: MakeSession) -> None:
    make_session().ledger.give_order("stop", "new driver", "told by me")
    level, text = sick()["order"]
    assert level == "warn"
    assert "new driver; told by me" in text
    assert "tuner resume tiny" in text


def test_trial_of_a_dead_worker_is_for_the_reaper(sick: Any, make_session: MakeSession) -> None:
    ledger = make_session().ledger
    lease = claimed(ledger, enter(ledger))
    assert "leases" not in sick()
    expire(ledger)
    assert f"dead workers: {lease.number} → tuner reap tiny" in sick()["leases"][1]


def test_trial_that_runs_in_nobodys_hands_is_found(sick: Any, make_session: MakeSession) -> None:
    with make_session().ledger.engine.begin() as connection:
        connection.execute(sa.text("UPDATE trials SET state = 'RUNNING' WHERE number = 2"))
    text = sick()["leases"][1]
    assert "no worker ever took them: 2" in text
    assert "optuna tell" in text


def test_failed_trials_are_counted_by_reason(sick: Any, make_session: MakeSession) -> None:
    ledger = make_session().ledger
    worker = enter(ledger)
    for reason in ("out_of_memory", "code_error", "out_of_memory"):
        lease, facts = claimed(ledger, worker), Changes(user={"reason": reason})
        ledger.finish(lease, facts, state=TrialState.FAIL, end="failed", reason=reason)
    text = sick()["trials"][1]
    assert "3 failed: 2 by out_of_memory, 1 by code_error" in text
    assert "tuner retry tiny --failed" in text


def test_other_data_than_the_studys_are_refused(
    sick: Any, sqlite: str, here: str, make_session: MakeSession
) -> None:
    make_session().study.set_user_attr("fingerprint", "f" * 64)
    said = trouble(findings(sqlite, artifacts=here, study="tiny", data=Path()))
    assert said["data"][0] == "fail"
    assert "fingerprint" in said["data"][1]


def test_data_that_come_with_tuner_are_looked_at_without_a_folder(
    sqlite: str, here: str, make_session: MakeSession
) -> None:
    make_session()
    all_ = findings(sqlite, artifacts=here, study="tiny")
    assert "is what the study was created with" in found("data", all_)[0].found
    assert found("speed", all_)[0].found.startswith("linear, ")


# Speeds


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "speeds.json"


def test_without_a_study_all_speeds_that_were_measured_here_are_shown(
    sqlite: str, here: str, digits: Data, cache: Path
) -> None:
    (nothing,) = found("speed", findings(sqlite, artifacts=here))
    assert "nothing was measured here yet" in nothing.found
    speeds(recipe(), digits, "cpu")
    speeds(recipe(model={"name": "mlp", "width": 7}), digits, "cpu")
    first, second = (f.found for f in found("speed", findings(sqlite, artifacts=here)))
    ways = r"(\w+ \w+ \d+, )*\w+ \w+ \d+ images/s; trials take \w+"
    assert re.match(rf"mlp, batches of 64 \(1x8x8\), cpu.*: {ways}", first)
    assert second.startswith("mlp width=7, batches of 64")


def test_speeds_that_nobody_can_read_are_passed_over(sqlite: str, here: str, cache: Path) -> None:
    cache.parent.mkdir()
    for text in ("[torn", "[]", '{"a": [], "b": {"rows": 3}, "c": {"rows": [{"x": 1}]}}'):
        cache.write_text(text)
        (nothing,) = found("speed", findings(sqlite, artifacts=here))
        assert "nothing was measured" in nothing.found


def test_study_whose_data_are_not_here_comes_with_the_speeds_that_are_known(
    sqlite: str,
    here: str,
    digits: Data,
    cache: Path,
    make_session: MakeSession,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_session()
    speeds(recipe(), digits, "cpu")
    monkeypatch.setattr(type(make_session().file.data), "root", "photos", raising=False)
    all_ = findings(sqlite, artifacts=here, study="tiny")
    assert "--data FOLDER" in found("data", all_)[0].found
    assert found("speed", all_)[0].found.startswith("mlp, ")


# The command


@pytest.fixture
def tuner(tmp_path: Path) -> Tuner:
    made = Tuner(tmp_path)
    made("create", "small.toml")
    return made


def test_command_prints_a_line_for_each_check_and_what_to_do(tuner: Tuner) -> None:
    tuner("stop", "small")
    text, _ = tuner("doctor", "small.toml")
    assert "ok    study        small is there" in text
    assert "warn  order " in text
    assert "→ tuner resume small" in text


def test_command_exits_with_1_when_something_fails(tuner: Tuner) -> None:
    assert "fail  study" in tuner("doctor", "other", code=1)[0]
    document = tuner.json("doctor", "small")
    assert document["ok"] is True
    assert {"check", "level", "found", "cure"} == set(document["checks"][0])


def test_command_sees_that_the_study_was_made_from_another_file(tuner: Tuner) -> None:
    changed = tuner.folder / "small.toml"
    changed.write_text(changed.read_text().replace("epochs = 3", "epochs = 4"))
    assert "another study file" in tuner("doctor", "small.toml", code=1)[0]
    changed.write_text("name = ")
    assert "fail  study file" in tuner("doctor", "small.toml", code=1)[0]


@pytest.mark.database
def test_password_in_the_command_line_is_warned_of(tuner: Tuner) -> None:
    url = make_url(POSTGRES).set(password="s3cret", port=1)
    text, _ = tuner("doctor", "--storage", url.render_as_string(hide_password=False), code=1)
    assert "warn  password" in text
    assert "s3cret" not in text
