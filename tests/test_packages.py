"""Components of other packages, found by their entry points; the example is the README's."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tuner import registry
from tuner.errors import TunerError
from tuner.losses import LOSSES
from tuner.packages import GROUP, Packages
from tuner.registry import Registry

pytestmark = pytest.mark.long

HERE = Path(__file__).parents[1]
STUDY = """
name = "own"
[data]
name = "digits"
profile = { name = "exponential", ratio = 10 }
validation_fraction = 0.4
[budget]
trials = 3
epochs = 3
[ladder]
rungs = ["head", "full"]
[ladder.head]
trials = 3
steps = 20
epochs = 2
[model]
name = "mlp"
[space.loss.cross_entropy]
[space.loss.brier]
sharpness = [1.0, 2.0, 4.0]
"""


def install(folder: Path, name: str, entries: dict[str, str], **modules: str) -> None:
    """Put a package there as an installer would: its modules, and what is known of it."""
    for module, code in modules.items():
        (folder / f"{module}.py").write_text(code)
    known = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    known.mkdir()
    (known / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"[{GROUP}]", *(f"{key} = {value}" for key, value in entries.items())]
    (known / "entry_points.txt").write_text("\n".join(lines) + "\n")


def of_the_readme(language: str, name: str) -> str:
    """The README's block of that file."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)
    (found,) = [block for block in blocks if block.startswith(f"# {name}\n")]
    return str(found)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages with that of the README in it."""
    folder = tmp_path_factory.mktemp("site-packages")
    project = tomllib.loads(of_the_readme("toml", "pyproject.toml"))["project"]
    code = of_the_readme("python", "my_losses.py")
    install(folder, project["name"], project["entry-points"][GROUP], my_losses=code)
    return folder


class Tuner:
    """Runs ``tuner`` as a process, with or without a folder of packages."""

    def __init__(self, folder: Path, packages: Path) -> None:
        self.folder, self.packages = folder, packages
        (folder / "own.toml").write_text(STUDY)

    def __call__(self, *arguments: str, code: int = 0, without: bool = False) -> tuple[str, str]:
        paths = [str(HERE)] if without else [str(HERE), str(self.packages)]
        done = subprocess.run(
            [sys.executable, "-m", "tuner", *arguments],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stderr
        return done.stdout, done.stderr


@pytest.fixture(scope="module")
def tuner(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Tuner:
    """A folder in which a study with the loss of the README has run, with two slots."""
    made = Tuner(tmp_path_factory.mktemp("own"), installed)
    made("run", "own.toml", "--slots", "2")
    return made


def test_loss_of_a_package_is_searched_by_all_slots_and_rungs(tuner: Tuner) -> None:
    trials = json.loads(tuner("trials", "own", "--json")[0])
    own = [trial for trial in trials if trial["loss"] == "brier"]
    assert {"head", "full"} <= {trial["fidelity"] for trial in own}
    assert {trial["state"] for trial in own} <= {"complete", "pruned"}


def test_loss_of_a_package_is_checked_and_listed(tuner: Tuner) -> None:
    assert "loss.brier.sharpness" in tuner("check", "own.toml")[0]
    assert "brier  Squared distance of the probabilities" in tuner("list", "losses")[0]


def test_recipe_with_a_loss_of_a_package_is_exported_and_trained_again(tuner: Tuner) -> None:
    trials = json.loads(tuner("trials", "own", "--rung", "full", "--json")[0])
    complete = [t for t in trials if t["loss"] == "brier" and t["state"] == "complete"]
    tuner("export", "own", "-o", "best", "--trial", str(complete[0]["trial"]))
    recipe = tuner.folder / "best" / "recipe.toml"
    assert tomllib.loads(recipe.read_text())["loss"]["name"] == "brier"
    assert "reproduced" in tuner("train", "best/recipe.toml")[0]
    _, said = tuner("train", "best/recipe.toml", code=1, without=True)
    assert "unknown loss 'brier'; is the package that has it installed here?" in said


def test_worker_without_the_package_refuses_the_study(tuner: Tuner) -> None:
    _, said = tuner("worker", "own", code=1, without=True)
    assert "unknown loss 'brier'; is the package that has it installed here?" in said
    assert "own was created by tuner" in said
    assert "Traceback" not in said


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in which to install packages for this process; none has been looked for yet."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "PACKAGES", Packages())
    monkeypatch.setattr(LOSSES, "_components", dict(LOSSES._components))
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def registering(name: str) -> str:
    return (
        "from tuner.losses import LOSSES, CrossEntropy\n"
        "from tuner.registry import component\n"
        f"@LOSSES.register({name!r})\n"
        "@component\n"
        "class Own(CrossEntropy):\n"
        "    'A loss.'\n"
    )


def test_package_is_imported_at_the_first_look_into_a_registry(site: Path) -> None:
    install(site, "one", {"losses": "one"}, one=registering("first"))
    assert "one" not in sys.modules
    assert "first" in LOSSES
    assert LOSSES["first"].__module__ == "one"


def test_packages_are_imported_in_the_order_of_their_names(site: Path) -> None:
    install(site, "b", {"losses": "last"}, last=registering("last"))
    codes = {name: registering(name) for name in ("first", "second")}
    install(site, "a", {"y": "second", "x": "first"}, **codes)
    assert list(LOSSES)[-3:] == ["first", "second", "last"]


def test_package_may_look_at_what_is_there(site: Path) -> None:
    code = f"{registering('own')}\nassert 'own' in LOSSES and LOSSES['focal']\n"
    install(site, "curious", {"losses": "curious"}, curious=code)
    assert "own" in LOSSES


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import not_there", "ModuleNotFoundError: No module named 'not_there'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        (registering("focal"), "loss 'focal' is registered already, as tuner.losses._focal.Focal"),
    ],
)
def test_package_that_cannot_be_loaded_is_named_whenever_it_is_needed(
    site: Path, code: str, said: str
) -> None:
    install(site, "my-own", {"losses": "broken"}, broken=code)
    looks: list[Any] = [lambda: LOSSES["focal"], lambda: list(LOSSES), lambda: "x" in LOSSES]
    for look in looks:
        with pytest.raises(TunerError) as caught:
            look()
        text = str(caught.value)
        assert "package my-own 1.0 (entry point losses = broken)" in text
        assert said in text


def test_what_is_no_module_is_said_too(site: Path) -> None:
    install(site, "my-own", {"losses": "gone:thing"})
    with pytest.raises(TunerError, match="losses = gone:thing"):
        list(LOSSES)


def test_modules_of_other_groups_are_left_alone(site: Path) -> None:
    install(site, "other", {"losses": "other"}, other="raise RuntimeError")
    found: Registry[Any] = Registry("toy")
    Packages("another.group").load()
    with pytest.raises(TunerError):
        list(found)
