"""The files for containers keep what they promise; no engine is needed to see that."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from sqlalchemy.engine import make_url
from test_readme import blocks
from typer.main import get_command

from tuner.cli import app, make, run, work  # noqa: F401  (they register their commands)

ROOT = Path(__file__).parents[1]
COMPOSE = ROOT / "docker-compose.yml"
SERVICES: dict[str, Any] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]
WORKERS = {name: SERVICES[name] for name in SERVICES if name.startswith("worker")}
OURS = {name: service for name, service in SERVICES.items() if "build" in service}
INSTRUCTIONS = [
    line.split(maxsplit=1)
    for line in (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    if re.match("[A-Z]+ ", line)
]
JOB: dict[str, Any] = yaml.safe_load(blocks("yaml")[0])
POD: dict[str, Any] = JOB["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
COMMANDS = {name: service["command"] for name, service in OURS.items()} | {"job": CONTAINER["args"]}


def refusal(path: Path) -> str:
    """What the Compose Specification's schema has against a file; empty when nothing."""
    from check_jsonschema import main
    from click.testing import CliRunner

    done = CliRunner().invoke(main, ["--builtin-schema", "vendor.compose-spec", str(path)])
    return "" if done.exit_code == 0 else done.output


def parsed(arguments: list[str]) -> dict[str, Any]:
    """The parameters that a command line of ``tuner`` stands for."""
    command = get_command(app).commands[arguments[0]]  # type: ignore[attr-defined]
    return dict(command.make_context(arguments[0], arguments[1:]).params)


def seconds(duration: str) -> int:
    amount, unit = re.fullmatch(r"(\d+)([sm])", duration).groups()  # type: ignore[union-attr]
    return int(amount) * {"s": 1, "m": 60}[unit]


def mounted(service: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Folders and files of this machine that a container sees, by where it sees them."""
    return {v["target"]: v for v in service["volumes"] if isinstance(v, dict)}


class TestCompose:
    def test_it_fits_the_compose_specification(self) -> None:
        assert refusal(COMPOSE) == ""

    def test_a_misspelled_key_would_not_fit(self, tmp_path: Path) -> None:
        path = tmp_path / "docker-compose.yml"
        path.write_text(COMPOSE.read_text(encoding="utf-8").replace("healthcheck:", "healthchek:"))
        assert "healthchek" in refusal(path)

    def test_there_is_one_password_and_no_default_for_it(self) -> None:
        passwords = [
            value
            for service in SERVICES.values()
            for key, value in service["environment"].items()
            if "PASS" in key
        ]
        assert len(passwords) == len(SERVICES)
        assert len(set(passwords)) == 1
        assert re.fullmatch(r"\$\{POSTGRES_PASSWORD:\?[^}]+\}", passwords[0])
        assert COMPOSE.read_text(encoding="utf-8").count("${POSTGRES_PASSWORD") == 1

    @pytest.mark.parametrize("name", OURS)
    def test_storage_url_has_no_password_and_names_the_database(self, name: str) -> None:
        url = make_url(OURS[name]["environment"]["TUNER_STORAGE"])
        database = SERVICES["postgres"]["environment"]
        assert url.password is None
        assert (url.username, url.database) == (database["POSTGRES_USER"], database["POSTGRES_DB"])
        assert url.host == "postgres"

    def test_database_is_asked_over_tcp_whether_it_is_there(self) -> None:
        how, program, *options = SERVICES["postgres"]["healthcheck"]["test"]
        assert (how, program) == ("CMD", "pg_isready")
        assert "--host=127.0.0.1" in options

    def test_only_this_machine_reaches_the_dashboard_and_nobody_the_rest(self) -> None:
        ports = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
        assert ports == {"dashboard": ["127.0.0.1:8080:8080"]}
        assert not any("network_mode" in service for service in SERVICES.values())

    def test_dashboard_answers_where_its_port_and_its_health_check_look(self) -> None:
        dashboard = SERVICES["dashboard"]
        options = parsed(dashboard["command"])
        assert options["host"] == "0.0.0.0"
        assert options["in_container"], "names of other hosts are refused"
        assert dashboard["ports"][0].endswith(f":{options['port']}")
        assert f"http://127.0.0.1:{options['port']}/healthz" in dashboard["healthcheck"]["test"][-1]

    def test_study_is_created_once_and_workers_wait_for_it(self) -> None:
        create = SERVICES["create"]
        assert create["restart"] == "no"
        assert create["depends_on"] == {"postgres": {"condition": "service_healthy"}}
        for worker in WORKERS.values():
            waits = worker["depends_on"]["create"]["condition"]
            assert waits == "service_completed_successfully"

    def test_workers_find_the_study_that_was_created(self) -> None:
        study = parsed(SERVICES["create"]["command"])["study"]
        assert str(study) in mounted(SERVICES["create"])
        assert {parsed(worker["command"])["study"] for worker in WORKERS.values()} == {str(study)}

    def test_workers_run_only_when_asked_for(self) -> None:
        profiles = {name: service.get("profiles") for name, service in SERVICES.items()}
        asked = {name: profile for name, profile in profiles.items() if profile}
        assert asked == {"worker-cpu": ["cpu"], "worker-gpu": ["gpu"]}

    def test_one_worker_gets_all_gpus_and_the_other_none(self) -> None:
        reserved = SERVICES["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
        assert "deploy" not in SERVICES["worker-cpu"]
        assert reserved == [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]
        assert parsed(COMMANDS["worker-gpu"])["gpus"] == "all"
        assert parsed(COMMANDS["worker-cpu"])["device"] == "cpu"

    @pytest.mark.parametrize("name", WORKERS)
    def test_a_stopped_worker_has_time_to_keep_its_trial(self, name: str) -> None:
        assert seconds(WORKERS[name]["stop_grace_period"]) > parsed(COMMANDS[name])["grace"]
        assert WORKERS[name]["init"], "else SIGTERM may reach nobody"

    @pytest.mark.parametrize("name", OURS)
    def test_containers_have_no_rights(self, name: str) -> None:
        assert OURS[name]["read_only"]
        assert OURS[name]["cap_drop"] == ["ALL"]
        assert OURS[name]["security_opt"] == ["no-new-privileges:true"]

    @pytest.mark.parametrize("name", OURS)
    def test_what_belongs_to_this_machine_is_there_or_missed_but_never_changed(
        self, name: str
    ) -> None:
        for volume in mounted(OURS[name]).values():
            assert volume["read_only"]
            assert volume["bind"] == {"create_host_path": False}

    def test_default_study_is_there(self) -> None:
        source = mounted(SERVICES["create"])["/study.toml"]["source"]
        assert (ROOT / source.removeprefix("${STUDY:-").removesuffix("}")).is_file()

    def test_password_file_stays_out_of_git(self) -> None:
        assert ".env" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()

    @pytest.mark.parametrize("path", [COMPOSE, ROOT / "README.md"], ids=lambda path: path.name)
    def test_commands_and_settings_that_texts_name_are_there(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        profiles = re.findall(r"docker compose --profile (\S+)", text)
        services = re.findall(r"docker compose run --rm (\S+)|--scale (\S+)=", text)
        settings = re.findall(r"^(?:echo \"|#   )?([A-Z_]+)=", text, flags=re.MULTILINE)
        assert set(profiles) == {"cpu", "gpu"}
        assert {a or b for a, b in services} <= set(SERVICES)
        assert {"POSTGRES_PASSWORD", "TUNER_DATA", "STUDY"} <= set(settings)
        assert set(settings) <= set(re.findall(r"\$\{([A-Z_]+)", COMPOSE.read_text("utf-8")))


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_are_such_that_tuner_understands(name: str) -> None:
    assert all(isinstance(word, str) for word in COMMANDS[name])
    assert parsed(COMMANDS[name])


class TestImage:
    def values(self, name: str) -> list[str]:
        return [value for key, value in INSTRUCTIONS if key == name]

    def test_everything_it_copies_is_there(self) -> None:
        assert all((ROOT / source).exists() for source in self.sources())

    def sources(self) -> list[str]:
        return [source for value in self.values("COPY") for source in value.split()[:-1]]

    def test_nothing_else_reaches_the_builder(self) -> None:
        """Neither .venv nor runs nor the password in .env."""
        lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        first, *patterns = [line for line in lines if not line.startswith("#")]
        assert first == "*"
        back = [pattern.removeprefix("!") for pattern in patterns if pattern.startswith("!")]
        assert sorted(back) == sorted(self.sources())

    def test_signals_reach_tuner_itself(self) -> None:
        assert [json.loads(value) for value in self.values("ENTRYPOINT")] == [["tuner"]]

    def test_it_runs_as_a_numbered_user_that_owns_the_artifacts(self) -> None:
        user = self.values("USER")[-1]
        assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", user)
        text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
        assert f"--uid {user.split(':')[0]} " in text
        assert "--owner=tuner --group=tuner /artifacts" in text
        assert "TUNER_ARTIFACTS=/artifacts" in text
        assert str(POD["securityContext"]["fsGroup"]) == user.split(":")[1]

    def test_versions_are_those_that_were_tested_together(self) -> None:
        installs = re.findall(r"pip install (.*)", (ROOT / "Dockerfile").read_text("utf-8"))
        assert installs
        assert all("--constraint constraints.txt" in install for install in installs)

    def test_installing_the_package_leaves_no_file_out(self) -> None:
        """Only packages and what pyproject.toml names beside them are installed."""
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        named = project["tool"]["setuptools"]["package-data"]["tuner"]
        found = (path for path in (ROOT / "tuner").rglob("*") if path.is_file())
        files = [path for path in found if path.parent.name != "__pycache__"]
        sources = [path for path in files if path.suffix == ".py"]
        assert all((path.parent / "__init__.py").exists() for path in sources)
        others = {path for path in files if path.suffix != ".py"}
        assert others == {path for name in named for path in (ROOT / "tuner").glob(name)}


class TestKubernetesJob:
    def test_every_index_is_a_worker_of_its_own(self) -> None:
        spec = JOB["spec"]
        assert (JOB["apiVersion"], JOB["kind"]) == ("batch/v1", "Job")
        assert spec["completionMode"] == "Indexed"
        assert spec["completions"] >= spec["parallelism"]
        assert parsed(CONTAINER["args"])["name"] == "$(JOB_COMPLETION_INDEX)"

    def test_two_workers_never_share_an_index(self) -> None:
        assert JOB["spec"]["podReplacementPolicy"] == "Failed"

    def test_failures_are_counted_per_index(self) -> None:
        assert JOB["spec"]["backoffLimitPerIndex"] > 0
        assert POD["restartPolicy"] == "Never", "Kubernetes asks for that"

    def test_a_stopped_worker_has_time_to_keep_its_trial(self) -> None:
        assert POD["terminationGracePeriodSeconds"] > parsed(CONTAINER["args"])["grace"]

    def test_password_comes_from_a_secret(self) -> None:
        variables = {variable["name"]: variable for variable in CONTAINER["env"]}
        assert "value" not in variables["PGPASSWORD"]
        assert variables["PGPASSWORD"]["valueFrom"]["secretKeyRef"].keys() == {"name", "key"}
        assert make_url(variables["TUNER_STORAGE"]["value"]).password is None

    def test_it_does_not_run_as_root(self) -> None:
        assert POD["securityContext"]["runAsNonRoot"]

    def test_every_mount_has_its_volume(self) -> None:
        mounts = {mount["name"]: mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
        assert sorted(mounts) == sorted(volume["name"] for volume in POD["volumes"])
        assert {"/data", "/artifacts", "/dev/shm"} == set(mounts.values())
