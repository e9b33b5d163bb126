"""The command line: results on stdout, one message for an error, JSON for programs."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from image_folders import photos

from tuner.cli import main
from tuner.errors import TunerError

STUDY = """
name = "small"
[data]
name = "digits"
profile = { name = "exponential", ratio = 10 }
validation_fraction = 0.4
[budget]
trials = 4
epochs = 3
[model]
name = "linear"
[space.optimizer.sgd]
lr = [0.1, 0.2, 0.3]
[space.loss.cross_entropy]
[space.loss.focal]
"""


class Tuner:
    """Runs ``tuner`` in a folder of its own, inside this process: starting torch takes seconds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "small.toml").write_text(STUDY)

    def __call__(self, *arguments: str, code: int = 0, **environment: str) -> tuple[str, str]:
        out, err = io.StringIO(), io.StringIO()
        found = 0
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.chdir(self.folder)
            patch.setattr(sys, "argv", ["tuner", *arguments])
            for name, value in environment.items():
                patch.setenv(name, value)
            try:
                main()
            except SystemExit as end:
                found = int(end.code or 0)
            except TunerError:
                assert "--debug" in arguments
                traceback.print_exc()
                found = 1
        assert found == code, err.getvalue()
        return out.getvalue(), err.getvalue()

    def json(self, *arguments: str) -> Any:
        return json.loads(self(*arguments, "--json")[0])


@pytest.fixture(scope="module")
def tuner(tmp_path_factory: pytest.TempPathFactory) -> Tuner:
    """A folder in which the small study has run."""
    made = Tuner(tmp_path_factory.mktemp("cli"))
    made("run", "small.toml", "--device", "cpu")
    return made


@pytest.mark.long
def test_run_with_two_slots_shares_the_trials_out_and_shows_what_they_found(
    tmp_path: Path,
) -> None:
    together = Tuner(tmp_path)
    out, err = together("run", "small.toml", "--device", "cpu", "--slots", "2")
    assert "2 slots on cpu, 1 thread each" in err
    assert "tail" in out
    trials = together.json("trials", "small")
    assert {trial["state"] for trial in trials} <= {"complete", "pruned"}
    assert len(trials) == 4
    # Whoever comes when the study is over does not enter.
    slots = together.json("workers", "small", "--all")
    assert {slot["state"] for slot in slots} == {"left"}
    assert {slot["worker"].rpartition("/")[2] for slot in slots} <= {"0", "1"}


def test_help_begins_with_what_is_needed_first(tuner: Tuner) -> None:
    text, _ = tuner("--help")
    commands = [name for name in re.findall(r"^│ (\w+) ", text, flags=re.M) if name != "launch"]
    assert commands[:5] == ["check", "run", "create", "worker", "status"]


def test_status_counts_trials_of_one_study_and_of_all(tuner: Tuner) -> None:
    one = tuner.json("status", "small")
    assert one["complete"] + one["pruned"] == one["budget"] == 4
    assert one["metric"] == "tail_accuracy"
    assert tuner.json("status") == [one]
    assert tuner("status")[0].startswith("small: ")


def test_study_may_be_named_by_its_file(tuner: Tuner) -> None:
    assert tuner.json("status", "small.toml") == tuner.json("status", "small")


def test_trials_tell_state_metrics_and_parameters(tuner: Tuner) -> None:
    rows = tuner.json("trials", "small")
    assert [row["trial"] for row in rows] == [0, 1, 2, 3]
    assert rows[0]["loss"] == "cross_entropy"
    assert rows[1]["loss"] == "focal"
    assert 0 <= rows[0]["metrics"]["raw"]["accuracy"] <= 1
    assert "optimizer.sgd.lr" in rows[0]["params"]
    assert "cross_entropy" in tuner("trials", "small")[0].replace("…", "cross_entropy")


def test_best_prints_a_recipe_that_trains(tuner: Tuner) -> None:
    text, _ = tuner("best", "small")
    (tuner.folder / "by-hand.toml").write_text(text)
    assert "validation accuracy" in tuner("train", "by-hand.toml", "--device", "cpu")[0]
    assert tuner.json("best", "small")["recipe"]["epochs"] == 3


def test_export_writes_the_files_it_names(tuner: Tuner) -> None:
    text, _ = tuner("export", "small", "-o", "out", "--device", "cpu")
    paths = [tuner.folder / line for line in text.split()]
    names = {"recipe.toml", "model.safetensors", "metrics.json", "README.md"}
    assert {p.name for p in paths} == names
    metrics = json.loads((tuner.folder / "out/metrics.json").read_text())
    assert metrics["verdict"]["part"] == "test"
    card = (tuner.folder / "out/README.md").read_text()
    assert card.startswith("---\n")
    assert "imbalance ratio" in card


def test_trial_without_stored_weights_is_exported_by_training_it_again(tuner: Tuner) -> None:
    best = tuner.json("status", "small")["best"]
    complete = [r["trial"] for r in tuner.json("trials", "small") if r["state"] == "complete"]
    other = next(n for n in complete if n not in (0, best))
    _, said = tuner("export", "small", "--trial", str(other), "-o", "other", "--device", "cpu")
    assert "training it again" in said
    text, _ = tuner("train", "other/recipe.toml", "--device", "cpu")
    assert "reproduced: every metric equals" in text


def test_report_is_one_file(tuner: Tuner) -> None:
    tuner("report", "small", "-o", "page.html")
    page = (tuner.folder / "page.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert "plain cross-entropy" in page


def test_check_prints_the_space_and_looks_at_the_data(tuner: Tuner) -> None:
    assert tuner.json("check", "small.toml")["space"] == {
        "loss": "one of cross_entropy, focal",
        "optimizer.sgd.lr": "one of 0.1, 0.2, 0.3",
    }
    looked = tuner("check", "small.toml", "--load")[0]
    assert "imbalance ratio" in looked
    assert re.search(r"\d+ training, \d+ validation and \d+ test images", looked)
    assert re.search(r"per class in training \(\d+ to \d+ with validation, as data.tail", looked)
    assert re.search(r"a trial has \d+ optimizer steps: \d+ in each of its epochs", looked)
    points = "at most 2 points, and 20 % of it,"
    floor = f"accuracy {points} below that of plain cross-entropy, unadjusted"
    assert f"objective: adjusted tail_accuracy; {floor}" in looked


@pytest.mark.parametrize("what", ["losses", "samplers", "models", "datasets"])
def test_list_describes_every_component(tuner: Tuner, what: str) -> None:
    entries = tuner.json("list", what)[what]
    assert len(entries) >= 3
    assert all(entry["summary"].endswith(".") for entry in entries)


def test_storage_comes_from_the_environment_unless_an_option_names_it(tuner: Tuner) -> None:
    other = f"sqlite:///{tuner.folder}/other.db"
    tuner("create", "small.toml", TUNER_STORAGE=other)
    assert "4 waiting" in tuner("status", OPTUNA_STORAGE=other)[0]
    assert "4 waiting" not in tuner("status", TUNER_STORAGE="sqlite:///runs/tuner.db")[0]
    text, _ = tuner("status", "--storage", "sqlite:///runs/tuner.db", TUNER_STORAGE=other)
    assert "4 waiting" not in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("status", "smal"), "did you mean 'small'"),
        (("status", "--storage", "sqlite:///nothing.db"), "nothing.db: no such storage"),
        (("status", "--storage", "what?"), "no database URL"),
        (("export", "small", "--trial", "99", "-o", "x"), "trial 99 is not complete"),
        (("train", "missing.toml"), "missing.toml: no such file"),
        (
            ("run", "small.toml", "--device", "tpu9"),
            "--device tpu9: no device has such a name; give",
        ),
        (("run", "small.toml", "--storage", "nope"), "the storage is no database URL"),
        (("run", "small.toml", "--storage", "sqlite:///small.toml/new/x.db"), "cannot be made"),
        (("list", "lossses"), "did you mean 'losses'"),
        (("run", "small.toml", "--device", "mps"), "float64, which mps lacks; give --device cpu"),
        (("worker", "small", "--device", "mps:0"), "--device mps:0: Tuner sums losses in float64"),
        (("launch", "ray", "small", "-n", "1", "--device", "mps"), "which mps lacks"),
        (("launch", "slurm", "small", "-n", "1", "--device", "mps"), "which mps lacks"),
        (
            ("run", "small.toml", "--device", "cpu", "--lanes", "2"),
            "--lanes is for GPUs, and the device is cpu",
        ),
        (
            ("worker", "small", "--device", "cpu", "--lanes", "2"),
            "--lanes is for GPUs, and the device is cpu",
        ),
    ],
)
def test_error_is_one_message_on_stderr_and_exit_code_1(
    tuner: Tuner, arguments: tuple[str, ...], said: str
) -> None:
    out, err = tuner(*arguments, code=1)
    assert out == ""
    assert said in err
    assert "Traceback" not in err
    assert "Traceback" in tuner("--debug", *arguments, code=1)[1]


@pytest.mark.parametrize(
    ("command", "data", "said"),
    [
        (("check", "--load"), 'root = "gone"', "gone: there is no such folder; correct root under"),
        (("run", "--device", "cpu"), 'root = "gone"', "gone: there is no such folder; correct"),
        (("check", "--load"), 'root = "photos"\ntail = { max_count = 2 }', "data.tail: no class"),
    ],
)
def test_error_of_the_data_names_the_study_file(
    tmp_path: Path, command: tuple[str, ...], data: str, said: str
) -> None:
    tuner = Tuner(tmp_path)
    photos(tmp_path / "photos", {"cat": 9, "dog": 9})
    text = STUDY.replace('"digits"', f'"image_folder"\n{data}')
    (tmp_path / "small.toml").write_text(re.sub("\nprofile.*", "", text))
    name, *options = command
    assert f"tuner: small.toml: {said}" in tuner(name, "small.toml", *options, code=1)[1]


def test_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tuner", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("tuner 0.")


def test_wrong_usage_exits_with_2(tuner: Tuner) -> None:
    tuner("frobnicate", code=2)
    tuner("run", code=2)


def test_password_is_in_no_output(tuner: Tuner) -> None:
    url = "postgresql+psycopg://someone:s3cret{}%25@127.0.0.1:1/nothing"
    for debug in ([], ["--debug"]):
        out, err = tuner(*debug, "status", code=1, TUNER_STORAGE=url)
        assert "someone" in err
        assert "s3cret" not in out + err


def test_large_photos_are_read_without_a_warning_of_somebody_elses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 50)
    photos(tmp_path / "photos", {"cat": 30, "dog": 20})
    data = 'name = "image_folder"\nroot = "photos"\nimage_size = 8\n'
    made = Tuner(tmp_path)
    text = STUDY.replace('name = "digits"\nprofile = { name = "exponential", ratio = 10 }\n', data)
    (tmp_path / "small.toml").write_text(text)
    # In tests a warning is an error, so that the images would be broken.
    assert "data image_folder: 2 classes" in made("check", "small.toml", "--load")[0]
