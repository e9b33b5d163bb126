"""Rungs: what each searches, and when the ranks of one are followed at the next."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from conftest import MakeFile
from optuna.trial import FixedTrial, TrialState, create_trial
from scipy import stats

from tuner.errors import StudyFileError
from tuner.ladder import FEWEST_PAIRS, agreement, is_judged, rung_of
from tuner.models import MODELS
from tuner.statistics import rank_correlation
from tuner.training import Deferred, SingleStage

UNIT = {"low": 0.0, "high": 1.0}
SPACE: dict[str, Any] = {
    "optimizer": {"sgd": {"lr": {"low": 0.05, "high": 0.5}, "nesterov": [True, False]}},
    "augment": {"none": {}, "standard": {"mixup": [0.2, 0.0]}},
    "training": {"single_stage": {"batch_size": [64, 128]}},
    "sampler": {"natural": {}, "class_aware": {"exponent": UNIT, "start": [0.0, 0.8]}},
    "loss": {
        "cross_entropy": {},
        "weighted_cross_entropy": {"power": UNIT, "start": [0.0, 0.6]},
    },
}


def ladder(*rungs: str, **keys: Any) -> dict[str, Any]:
    return {"ladder": {"rungs": list(rungs), **keys}, "training": None, "space": SPACE}


def test_lower_rungs_search_loss_and_sampler_and_hold_the_rest_at_published_defaults(
    make_file: MakeFile,
) -> None:
    file = make_file(**ladder("head", "full"))
    names = {name for name, _ in file.space_at("head").rows()}
    assert names == {
        *("sampler", "sampler.class_aware.exponent"),
        *("loss", "loss.weighted_cross_entropy.power"),
    }
    chosen = {"loss": "weighted_cross_entropy", "loss.weighted_cross_entropy.power": 0.5}
    trial = FixedTrial({**chosen, "sampler": "class_aware", "sampler.class_aware.exponent": 0.7})
    recipe = file.space_at("head").suggest(trial)
    plain = file.space.suggest(FixedTrial(file.space.defaults()))
    assert (recipe.loss.power, recipe.loss.start) == (0.5, 0.0)
    assert (recipe.sampler.exponent, recipe.sampler.start) == (0.7, 0.0)
    assert (recipe.optimizer, recipe.augment) == (plain.optimizer, plain.augment)
    assert recipe.training == plain.training
    assert file.space_at("full") is file.space


def test_the_deferred_rung_lets_recipes_act_from_its_switch_on(make_file: MakeFile) -> None:
    file = make_file(**ladder("deferred", "full", deferred={"switch": 0.75}))
    space = file.space_at("deferred")
    recipe = space.suggest(FixedTrial(space.defaults(loss="weighted_cross_entropy")))
    plain = file.space.suggest(FixedTrial(file.space.defaults()))
    assert isinstance(recipe.training, Deferred)
    assert isinstance(plain.training, SingleStage)
    assert recipe.training.switch == 0.75
    assert recipe.training.batch_size == plain.training.batch_size


def test_all_recipes_of_the_deferred_rung_with_one_kind_of_head_share_stage_one(
    make_file: MakeFile,
) -> None:
    space = make_file(**ladder("deferred", "full")).space_at("deferred")
    keys = {
        space.suggest(FixedTrial(space.defaults(loss=loss, sampler=sampler))).stage_one_key()
        for loss in space.parts["loss"]
        for sampler in space.parts["sampler"]
    }
    assert len(keys) == 1


@pytest.mark.parametrize(
    ("rungs", "trials"),
    [
        (("full",), 4),
        (("head", "full"), 34),
        (("head", "deferred", "full"), 41),
        (("head",), 5),
        (("deferred",), 5),
    ],
)
def test_the_budget_is_the_last_rungs_and_the_baseline_is_beside_it_where_that_is_another(
    make_file: MakeFile, rungs: tuple[str, ...], trials: int
) -> None:
    file = make_file(**ladder(*rungs, head={"trials": 30}, deferred={"trials": 7}))
    assert file.all_trials() == trials


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (ladder("full", "head"), "in this order: head, deferred, full, confirm"),
        (ladder("head", "head"), "once each"),
        (ladder("head", "full", head={"trails": 3}), "ladder.head.trails: unknown key"),
        (ladder("head", "full", head={"trials": 0}), "ladder.head.trials = 0: must be at least 1"),
        (ladder("head", "full", deferred={"switch": 1}), "deferred.switch = 1: must be below"),
        (ladder("head", "full", promoted=1.5), "ladder.promoted = 1.5: must be at most 1"),
        (
            ladder("head", "full") | {"search": {"strategy": "progressive"}},
            'search.strategy = "progressive" decides which trials there are',
        ),
        (
            ladder("head", "full") | {"space": {"optimizer": SPACE["optimizer"]}},
            "head searches loss and sampler only, and [space] leaves neither open",
        ),
        (
            ladder("head", "full", head={"backbone": "initial"}),
            'ladder.head.backbone = "initial": needs weights, but linear is as it was '
            "initialised; give the model a weights_file",
        ),
    ],
)  # fmt: skip
def test_ladder_that_cannot_be_climbed_is_refused(
    make_file: MakeFile, sections: dict[str, Any], said: str
) -> None:
    with pytest.raises(StudyFileError) as caught:
        make_file(**sections)
    assert said in str(caught.value)


@pytest.mark.parametrize("name", [*MODELS])
def test_head_rung_takes_the_weights_of_any_model_as_its_backbone(
    make_file: MakeFile, name: str
) -> None:
    model = {"name": name, "weights_file": "mine.pth"}
    file = make_file(**ladder("head", "full", head={"backbone": "initial"}), model=model)
    held = file.space_at("head").suggest(FixedTrial(file.space_at("head").defaults()))
    assert held.model.weights_file == "mine.pth"


def test_trial_of_a_lower_rung_counts_as_judged_only_when_it_came_to_its_end() -> None:
    def trial(state: TrialState, **attrs: str) -> bool:
        known = {"metrics": {}, **attrs}
        return is_judged(create_trial(state=state, value=0.5, user_attrs=known))

    assert trial(TrialState.COMPLETE)
    assert trial(TrialState.PRUNED, fidelity="head", reason="head")
    assert not trial(TrialState.PRUNED, fidelity="deferred", reason="behind")
    assert not trial(TrialState.PRUNED, reason="behind")
    assert rung_of(create_trial(value=0.5)) == "full"


def test_correlation_is_spearmans_and_its_interval_covers_the_truth() -> None:
    generator = np.random.default_rng(0)
    drawn = generator.multivariate_normal([0, 0], [[1, 0.8], [0.8, 1]], size=(2000, 14))
    truth = 6 / np.pi * np.arcsin(0.8 / 2)
    covered = 0
    for sample in drawn:
        pairs = [(float(a), float(b)) for a, b in sample]
        found = rank_correlation(pairs)
        assert found is not None
        correlation, interval = found
        expected = stats.spearmanr(*np.array(pairs).T).statistic
        assert correlation == pytest.approx(expected, abs=1e-12)
        covered += interval.low <= truth <= interval.high
    assert 0.93 < covered / len(drawn) < 0.97


def test_equal_values_share_their_mean_rank() -> None:
    drawn = np.random.default_rng(1).integers(0, 5, size=(50, 12, 2))
    for sample in drawn:
        found = rank_correlation([(float(a), float(b)) for a, b in sample])
        assert found is not None
        assert found[0] == pytest.approx(stats.spearmanr(*sample.T).statistic, abs=1e-12)


def test_correlation_of_few_or_equal_values_is_not_defined_and_a_perfect_one_stays_unsure() -> None:
    assert rank_correlation([(1, 1), (2, 2), (3, 3)]) is None
    assert rank_correlation([(1, n) for n in range(9)]) is None
    found = rank_correlation([(n, 2 * n) for n in range(8)])
    assert found is not None
    assert found[0] == 1.0
    assert 0.8 < found[1].low < 1.0


@pytest.mark.parametrize("alike", ["head", "full"])
def test_recipes_that_cannot_be_ranked_are_not_called_few(alike: str) -> None:
    pairs = [(0.5, n / 10) if alike == "head" else (n / 10, 0.5) for n in range(FEWEST_PAIRS)]
    found = agreement("head", "full", pairs)
    assert not found.is_low(1.0)
    assert (
        str(found) == f"all 6 recipes trained on both head and full have the same value on {alike}"
    )


def test_few_pairs_decide_nothing_and_say_so() -> None:
    pairs = [(n / 10, -n / 10) for n in range(FEWEST_PAIRS)]
    few = agreement("head", "full", pairs[:-1])
    assert not few.is_low(0.5)
    assert "too few recipes trained on both head and full to compare them (5)" in str(few)
    enough = agreement("head", "full", pairs)
    assert enough.is_low(0.5)
    assert str(enough).startswith("head and full rank 6 recipes with correlation -1.00 [")


def test_every_order_of_rungs_but_the_climbing_ones_is_refused(make_file: MakeFile) -> None:
    right: list[tuple[str, ...]] = [("head",), ("deferred",), ("full",)]
    right += list(itertools.combinations(("head", "deferred", "full"), 2))
    right += [("head", "deferred", "full")]
    for count in (1, 2, 3):
        for rungs in itertools.product(("head", "deferred", "full"), repeat=count):
            if rungs in right:
                assert make_file(**ladder(*rungs)).ladder.rungs == rungs
            else:
                with pytest.raises(StudyFileError):
                    make_file(**ladder(*rungs))
