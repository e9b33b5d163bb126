"""The examples of the README run as they stand."""

from __future__ import annotations

import re
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeSession

from tuner.datasets import Data
from tuner.export import export
from tuner.ladder import RUNGS, ConfirmRung, DeferredRung, HeadRung, Ladder
from tuner.space import default_of
from tuner.study import load
from tuner.worker import work

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_three_lines_plug_a_recipe_into_a_foreign_training_loop(
    make_session: MakeSession,
    digits: Data,
    sqlite: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = make_session(budget={"trials": 2, "epochs": 3})
    work(session, digits)
    export(session, digits, tmp_path / "runs/digits/best", number=1)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    scope: dict[str, object] = {}
    exec(blocks("python")[0], scope)
    predictions, targets = scope["predictions"], scope["targets"]
    assert isinstance(predictions, torch.Tensor)
    assert isinstance(targets, torch.Tensor)
    assert predictions.eq(targets).float().mean() > 0.85


def test_other_python_examples_run() -> None:
    for block in blocks("python")[1:]:
        # One that begins with the name of its file is a package: see test_packages.py.
        if not block.startswith("# "):
            exec(block, {})


def test_ladder_of_the_readme_names_every_key_with_its_default() -> None:
    shown = tomllib.loads(next(block for block in blocks("toml") if "[ladder]" in block))["ladder"]
    assert tuple(shown.pop("rungs")) == RUNGS
    assert default_of(Ladder, "rungs") == ["full"]
    assert 'their defaults but for `rungs`, which is `["full"]`' in " ".join(README.split())
    tables: dict[type[Any], Any] = {
        HeadRung: shown.pop("head"),
        DeferredRung: shown.pop("deferred"),
        ConfirmRung: shown.pop("confirm"),
        Ladder: shown,
    }
    for cls, keys in tables.items():
        names = {field.name for field in fields(cls)} - {"rungs", *RUNGS}
        assert keys == {name: default_of(cls, name) for name in names}


def test_study_file_of_the_readme_is_right(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(blocks("toml")[0])
    assert load(path).name == "mine"
