"""From ranges to recipes: what is asked of a trial, and what comes back."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import FixedTrial

from tuner.entries import Choice, Fixed, Range, parse_entry
from tuner.optim import SGD
from tuner.recipe import PARTS, Recipe
from tuner.schedules import Step
from tuner.space import Space, default_of, parse_space
from tuner.study import distinct_grid, load

ROOT = Path(__file__).parents[1]
DIGITS = load(ROOT / "studies/digits.toml").space
FIXED: dict[str, Any] = {"data": {"name": "digits"}, "model": {"name": "mlp"}}


def space_of(text: str, **fixed: Any) -> Space:
    tables = tomllib.loads(text)
    parts = {part: table for part, table in (FIXED | fixed).items() if part not in tables}
    return parse_space(tables, parts, epochs=5, seed=0, where="test")


@dataclass
class Recorder:
    """A trial that answers like a die and notes what it was asked."""

    die: st.DataObject
    asked: dict[str, Any] = field(default_factory=dict)

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        self.asked[name] = self.die.draw(st.sampled_from(list(choices)))
        return self.asked[name]

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        self.asked[name] = self.die.draw(st.floats(low, high))
        return float(self.asked[name])

    def suggest_int(
        self, name: str, low: int, high: int, *, step: int = 1, log: bool = False
    ) -> int:
        self.asked[name] = self.die.draw(st.integers(low, high))
        return int(self.asked[name])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_recipe_of_a_space_comes_back_from_values_and_from_toml(die: st.DataObject) -> None:
    recipe = DIGITS.suggest(Recorder(die))
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.from_dict(tomllib.loads(tomli_w.dumps(recipe.to_dict()))) == recipe
    assert Recipe.from_dict(tomllib.loads(recipe.to_toml())).digest() == recipe.digest()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_same_parameters_give_the_same_recipe(die: st.DataObject) -> None:
    trial = Recorder(die)
    recipe = DIGITS.suggest(trial)
    assert DIGITS.suggest(FixedTrial(trial.asked)) == recipe


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_only_parameters_of_the_chosen_branch_are_asked_for(die: st.DataObject) -> None:
    trial = Recorder(die)
    DIGITS.suggest(trial)
    chosen = {part: trial.asked.get(part, next(iter(DIGITS.parts[part]))) for part in PARTS}
    for name in trial.asked:
        steps = name.split(".")
        assert steps[0] in PARTS
        assert len(steps) == 1 or (len(steps) == 3 and steps[1] == chosen[steps[0]])


def test_optuna_studies_draw_valid_recipes_with_dotted_names() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    recipes = {DIGITS.suggest(study.ask()).digest() for _ in range(40)}
    assert len(recipes) > 30
    names = {name for trial in study.get_trials() for name in trial.params}
    assert {"loss", "sampler", "optimizer.sgd.lr", "loss.class_balanced.beta"} <= names


def test_digest_is_the_same_in_every_process() -> None:
    code = (
        "import sys, optuna; from pathlib import Path; from tuner.study import load\n"
        "space = load(Path(sys.argv[1])).space\n"
        "for loss in ('ldam', 'class_balanced'):\n"
        "    params = space.defaults(loss=loss, sampler='class_aware')\n"
        "    print(space.suggest(optuna.trial.FixedTrial(params)).digest())"
    )
    arguments = [sys.executable, "-c", code, str(ROOT / "studies/digits.toml")]
    env = os.environ | {"PYTHONHASHSEED": "4711", "PYTHONPATH": str(ROOT)}
    out = subprocess.run(arguments, env=env, capture_output=True, text=True, check=True).stdout
    params = (
        DIGITS.defaults(loss=loss, sampler="class_aware") for loss in ("ldam", "class_balanced")
    )
    assert out.split() == [DIGITS.suggest(FixedTrial(p)).digest() for p in params]


@pytest.mark.parametrize("loss", DIGITS.parts["loss"])
def test_defaults_are_the_published_ones_where_the_range_has_them(loss: str) -> None:
    params = DIGITS.defaults(loss=loss)
    assert params["sampler"] == "natural"
    assert params["optimizer.sgd.lr"] == 0.1
    recipe = DIGITS.suggest(FixedTrial(params))
    for key, entry in DIGITS.parts["loss"][loss].items():
        default = default_of(PARTS["loss"][loss], key)
        if default is not None and not isinstance(entry, Fixed):
            assert getattr(recipe.loss, key) == default


@settings(max_examples=100, deadline=None)
@given(
    st.floats(1e-6, 1e3),
    st.floats(1e-6, 1e3),
    st.booleans(),
    st.one_of(st.none(), st.integers(1, 50)),
    st.one_of(st.none(), st.floats(-10, 2000)),
)
def test_default_of_a_range_lies_on_it(
    a: float, b: float, log: bool, steps: int | None, preferred: float | None
) -> None:
    low, high = round(min(a, b), 6), round(max(a, b), 6)
    if low < high and steps is not None and not log:
        step = 0.25
        entry = Range(low, low + steps * step, False, step, False)
        assert any(entry.default(preferred) == pytest.approx(v) for v in entry.grid())
    elif low < high:
        value = Range(low, high, log, None, False).default(preferred)
        assert low <= value <= high
        if preferred is not None and low <= preferred <= high:
            assert value == preferred


def test_defaults_move_into_the_range_when_it_leaves_them_out() -> None:
    space = space_of(
        "[optimizer.sgd]\nlr = {low = 0.3, high = 0.5}\n"
        "momentum = {low = 0.0, high = 0.8, step = 0.2}\n"
        "[schedule.step]\nmilestones = [[0.5], [0.8, 0.9]]\n[loss.cross_entropy]\n"
        "[loss.weighted_cross_entropy]\nmax_weight = {low = 10, high = 1000, log = true}"
    )
    params = space.defaults(loss="weighted_cross_entropy")
    assert params["optimizer.sgd.lr"] == 0.3
    assert params["optimizer.sgd.momentum"] == 0.8
    assert params["schedule.step.milestones"] == "[0.8, 0.9]"
    assert params["loss.weighted_cross_entropy.max_weight"] == pytest.approx(100)
    assert space.suggest(FixedTrial(params)).schedule == Step(milestones=(0.8, 0.9))


def test_kind_of_a_range_follows_the_component_not_the_literal() -> None:
    space = space_of(
        "[model.mlp]\nwidth = {low = 8.0, high = 64.0}\ndropout = {low = 0, high = 0.5}\n"
        "[training.single_stage]\nbatch_size = {low = 16, high = 64, step = 16}"
    )
    study = optuna.create_study()
    trial = study.ask()
    recipe = space.suggest(trial)
    assert isinstance(recipe.model.width, int)
    assert isinstance(recipe.model.dropout, float)
    distributions = trial.distributions
    assert distributions["model.mlp.width"] == optuna.distributions.IntDistribution(8, 64)
    assert distributions["model.mlp.dropout"] == optuna.distributions.FloatDistribution(0, 0.5)
    size = distributions["training.single_stage.batch_size"]
    assert size == optuna.distributions.IntDistribution(16, 64, step=16)


def test_a_list_is_a_choice_unless_the_hyperparameter_is_a_list() -> None:
    assert parse_entry(SGD, "lr", [0.1, 1], "x") == Choice((0.1, 1.0))
    assert parse_entry(SGD, "lr", [0.1], "x") == Fixed(0.1)
    assert parse_entry(Step, "milestones", [0.1, 0.2], "x") == Fixed([0.1, 0.2])
    assert parse_entry(Step, "milestones", [[0.1], [0.2]], "x") == Choice(([0.1], [0.2]))
    assert parse_entry(SGD, "lr", {"low": 0.1, "high": 0.1}, "x") == Fixed(0.1)


def test_lists_of_lists_come_back_from_optuna_as_lists() -> None:
    space = space_of("[schedule.step]\nmilestones = [[], [0.5], [0.5, 0.75]]")
    recipes = [space.suggest(FixedTrial(params)) for params in space.grid()]
    assert [r.schedule.milestones for r in recipes] == [(), (0.5,), (0.5, 0.75)]


def test_grid_enumerates_every_branch_exactly() -> None:
    space = space_of(
        "[loss.cross_entropy]\n[loss.focal]\ngamma = [1.0, 2.0]\n"
        "[loss.asymmetric]\ngamma_neg = [0.0, 4.0]\neps = {low = 0.0, high = 0.3, step = 0.1}\n"
        "[model.mlp]\nwidth = {low = 8, high = 10}"
    )
    points = list(space.grid())
    assert len(points) == space.grid_size() == (1 + 2 + 2 * 4) * 3
    assert len({tuple(sorted(point.items())) for point in points}) == len(points)
    assert {p["loss.asymmetric.eps"] for p in points if "loss.asymmetric.eps" in p} == {
        0.0,
        0.1,
        0.2,
        0.3,
    }
    for point in points:
        assert all(name in ("loss",) or point["loss"] in name or "mlp" in name for name in point)
        space.suggest(FixedTrial(point))


def test_grid_has_equivalent_recipes_only_once() -> None:
    space = space_of(
        "[loss.cross_entropy]\n[loss.focal]\ngamma = [0.0, 2.0]\n"
        "[loss.class_balanced]\nbeta = [0.9, 0.99]\nbase = ['softmax', 'focal']\ngamma = [1.0, 2.0]"
    )
    # Focal with gamma 0 is cross-entropy, and gamma acts on the focal base alone.
    assert space.grid_size() == 1 + 2 + 8
    assert len(distinct_grid(space)) == 1 + 1 + 2 * (1 + 2)


def test_values_of_a_stepped_range_are_those_optuna_accepts() -> None:
    space = space_of("[optimizer.sgd]\nmomentum = {low = 0.0, high = 0.9, step = 0.1}")
    study = optuna.create_study()
    for point in space.grid():
        study.enqueue_trial(point)
        assert space.suggest(study.ask()).optimizer.momentum == point["optimizer.sgd.momentum"]


def test_rows_say_in_words_what_is_searched() -> None:
    space = space_of(
        "[loss.cross_entropy]\n[loss.focal]\ngamma = {low = 0, high = 5}\n"
        "[optimizer.sgd]\nlr = {low = 1e-3, high = 1, log = true}\nnesterov = [true, false]\n"
        "[model.mlp]\nwidth = {low = 16, high = 1048576, step = 16}"
    )
    assert dict(space.rows()) == {
        "loss": "one of cross_entropy, focal",
        "loss.focal.gamma": "0 to 5",
        "optimizer.sgd.lr": "0.001 to 1, log",
        "optimizer.sgd.nesterov": "one of true, false",
        "model.mlp.width": "16 to 1048576, step 16",
    }


def test_preset_of_the_class_balanced_loss_is_the_published_beta() -> None:
    tables = {"loss": {"class_balanced": {"beta": [0.9, 0.99, 0.999, 0.9999]}}}
    fixed = {"data": {"name": "digits"}, "model": {"name": "linear"}}
    space = parse_space(tables, fixed, epochs=1, seed=0, where="study.toml")
    assert space.defaults(loss="class_balanced")["loss.class_balanced.beta"] == 0.999
