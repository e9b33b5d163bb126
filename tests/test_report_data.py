"""The numbers behind a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fabricated import add_trial, empty_session, metrics, rich_session, verdict

from tuner.report import data as numbers
from tuner.session import Session
from tuner.statistics import wilson

COMPLETE_BASELINE: dict[str, Any] = {"loss": "cross_entropy", "baseline": True}


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return empty_session(tmp_path)


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return rich_session(tmp_path_factory.mktemp("rich"))


class TestVerdict:
    def test_is_absent_before_the_comparison(self, session: Session) -> None:
        assert numbers.verdict_data(session) is None

    def test_has_both_models_and_their_difference_per_metric(self, session: Session) -> None:
        session.study.set_user_attr("verdict", verdict(best=3))
        data = numbers.verdict_data(session)
        assert data is not None
        assert (data.best, data.baseline, data.images, data.tau) == (3, 0, 180, 0.7)
        tail = data.rows[0]
        assert tail.metric == "tail_accuracy"
        assert tail.baseline is not None
        assert tail.baseline == numbers.Estimate(0.4, 0.4 - 0.05, 0.4 + 0.05)
        assert tail.best is not None
        assert tail.best.value == 0.6
        assert tail.adjusted is not None
        assert (data.plain_tau, tail.adjusted.value) == (1.2, 0.5)

    def test_counts_a_difference_only_where_interval_and_test_agree(self, session: Session) -> None:
        session.study.set_user_attr("verdict", verdict(best=3))
        data = numbers.verdict_data(session)
        assert data is not None
        outcomes = {r.metric: r.difference and r.difference.outcome for r in data.rows}
        assert outcomes == {
            "tail_accuracy": "better",
            "head_accuracy": "worse",
            "accuracy": "unclear",
            "balanced_accuracy": None,
        }
        doubtful = {"tail_accuracy": {"estimate": 0.2, "low": 0.1, "high": 0.3, "p_value": 0.2}}
        session.study.set_user_attr("verdict", verdict(best=3, differences=doubtful))
        data = numbers.verdict_data(session)
        assert data is not None
        assert data.rows[0].difference is not None
        assert data.rows[0].difference.outcome == "unclear"

    def test_shows_an_objective_that_is_none_of_the_usual_metrics(self, tmp_path: Path) -> None:
        session = empty_session(tmp_path, metric="nll")
        session.study.set_user_attr("verdict", verdict(best=3))
        data = numbers.verdict_data(session)
        assert data is not None
        assert data.rows[0] == numbers.VerdictRow("nll", None, None, None)

    def test_tells_when_a_better_trial_came_later(self, session: Session) -> None:
        add_trial(session, 0.4, **COMPLETE_BASELINE)
        add_trial(session, 0.5)
        session.study.set_user_attr("verdict", verdict(best=0))
        data = numbers.verdict_data(session)
        assert data is not None
        assert data.newer_best == 1


class TestRecall:
    def test_has_every_class_with_wilson_intervals_largest_first(self, session: Session) -> None:
        session.study.set_user_attr("verdict", verdict(best=0))
        data = numbers.recall_data(session)
        assert data is not None
        assert [c.training for c in data.classes] == [500, 300, 180, 108, 65, 39, 23, 14, 8, 5]
        largest = data.classes[0]
        interval = wilson(19, 20)
        assert (largest.name, largest.group, largest.images) == ("digit 0", "head", 20)
        assert largest.baseline == numbers.Estimate(0.95, interval.low, interval.high)

    def test_knows_no_recall_of_a_class_without_images(self, session: Session) -> None:
        session.study.set_user_attr("verdict", verdict(best=0))
        data = numbers.recall_data(session)
        assert data is not None
        assert (data.classes[-1].baseline, data.classes[-1].best) == (None, None)


class TestHistory:
    def test_best_so_far_leaves_out_trials_that_break_the_floor(self, session: Session) -> None:
        add_trial(session, 0.4, **COMPLETE_BASELINE)
        add_trial(session, 0.9, accuracy=0.5)
        add_trial(session, 0.5)
        add_trial(session, 0.45)
        data = numbers.history_data(session)
        assert data.best_so_far == (0.4, 0.4, 0.5, 0.5)
        assert [p.feasible for p in data.points] == [True, False, True, True]
        assert data.best == 2
        assert data.baseline == pytest.approx(0.35)

    def test_a_metric_to_minimise_is_best_when_lowest(self, tmp_path: Path) -> None:
        session = empty_session(tmp_path, metric="nll")
        for value in (1.0, 0.7, 0.9):
            add_trial(session, value)
        assert numbers.history_data(session).best_so_far == (1.0, 0.7, 0.7)

    def test_unfinished_trials_have_their_last_value_and_are_no_result(
        self, session: Session
    ) -> None:
        add_trial(session, 0.8, 0.6, state="pruned", reason="behind")
        add_trial(session, 0.9, state="running")
        add_trial(session, state="failed", reason="code_error")
        data = numbers.history_data(session)
        assert [(p.state, p.value) for p in data.points] == [
            ("pruned", 0.6),
            ("running", 0.9),
            ("failed", None),
        ]
        assert data.best_so_far == (None, None, None)

    def test_tickets_that_wait_are_not_trials_yet(self, session: Session) -> None:
        session.study.enqueue_trial({})
        assert numbers.history_data(session).points == ()


class TestLosses:
    def test_rows_have_best_median_and_counts_best_loss_first(self, session: Session) -> None:
        for value in (0.3, 0.4, 0.8):
            add_trial(session, value, loss="ldam")
        add_trial(session, 0.9, loss="asymmetric")
        add_trial(session, 0.1, loss="asymmetric", state="pruned", reason="behind")
        add_trial(session, 0.1, loss="cross_entropy", state="failed", reason="code_error")
        rows = numbers.loss_data(session).rows
        found = [(r.loss, r.best, r.median, r.complete, r.pruned, r.failed) for r in rows]
        assert found == [
            ("asymmetric", 0.9, 0.9, 1, 1, 0),
            ("ldam", 0.8, 0.4, 3, 0, 0),
            ("cross_entropy", None, None, 0, 0, 1),
        ]

    def test_a_duplicate_is_not_one_more_result(self, session: Session) -> None:
        add_trial(session, 0.5)
        add_trial(session, 0.5, duplicate_of=0)
        assert [row.complete for row in numbers.loss_data(session).rows] == [1]


class TestHeadAndTail:
    def test_the_front_holds_the_trials_that_no_other_beats(self, session: Session) -> None:
        for head, tail in ((0.9, 0.5), (0.8, 0.6), (0.8, 0.4), (0.7, 0.6), (0.5, 0.9)):
            add_trial(session, tail, head=head)
        points = numbers.head_tail_data(session).points
        assert [p.number for p in points if p.on_front] == [0, 1, 4]

    def test_the_baseline_is_shown_as_it_is(self, session: Session) -> None:
        add_trial(session, 0.5, head=0.9, **COMPLETE_BASELINE)
        data = numbers.head_tail_data(session)
        assert data.baseline is not None
        assert data.baseline == pytest.approx((0.9, 0.45))
        assert (data.points[0].head, data.points[0].tail) == (0.9, 0.5)

    def test_trials_of_groups_without_images_are_left_out(self, session: Session) -> None:
        nothing = metrics(0.5, 0.9, 0.8)
        nothing["adjusted"].pop("head_accuracy")
        add_trial(session, 0.5, metrics=nothing)
        assert numbers.head_tail_data(session).points == ()


class TestPruning:
    def test_adds_up_epochs_and_the_time_they_would_have_taken(self, session: Session) -> None:
        add_trial(session, *[0.5] * 10, seconds=10.0)
        add_trial(session, *[0.2] * 4, state="pruned", reason="behind", seconds=8.0)
        add_trial(session, *[0.2] * 5, state="pruned", reason="chance", seconds=5.0)
        data = numbers.pruning_data(session)
        assert (data.trained, data.unpruned) == (19, 30)
        assert data.seconds_saved == pytest.approx(6 * 2.0 + 5 * 1.0)
        assert data.reasons == {"behind": 1, "chance": 1}

    def test_a_loss_that_is_not_finite_is_no_saving(self, session: Session) -> None:
        add_trial(session, 0.1, 0.1, state="pruned", reason="not_finite")
        data = numbers.pruning_data(session)
        assert (data.trained, data.unpruned, data.seconds_saved) == (2, 2, None)
        assert data.reasons == {"not_finite": 1}

    def test_epochs_that_another_trial_trained_are_neither_trained_nor_saved(
        self, session: Session
    ) -> None:
        add_trial(session, *[0.5] * 10)
        add_trial(session, 0.5, 0.5, first=8, seconds=2.0)
        add_trial(session, 0.2, first=8, state="pruned", reason="behind", seconds=3.0)
        data = numbers.pruning_data(session)
        assert [(row.trained, row.planned) for row in data.trials] == [(10, 10), (2, 2), (1, 2)]
        assert (data.trained, data.unpruned, data.seconds_saved) == (13, 14, 3.0)

    def test_known_results_are_counted_apart(self, session: Session) -> None:
        add_trial(session, *[0.5] * 10)
        add_trial(session, *[0.5] * 10, duplicate_of=0)
        data = numbers.pruning_data(session)
        assert (data.trained, data.duplicates, data.duplicate_epochs) == (10, 1, 10)

    def test_regret_is_what_the_spared_trials_gained(self, session: Session) -> None:
        add_trial(session, 0.5)
        add_trial(session, 0.3, state="pruned", reason="behind")
        add_trial(session, 0.4, state="pruned", reason="behind")
        add_trial(session, 0.36, would_prune_at=0)
        control = numbers.pruning_data(session).control
        assert control == numbers.Control(1, 1, 0, 0.0)
        add_trial(session, 0.56, would_prune_at=0)
        control = numbers.pruning_data(session).control
        assert (control.flagged, control.above_median_pruned, control.above_best_pruned) == (
            2,
            2,
            1,
        )
        assert control.regret == pytest.approx(0.06)

    def test_nothing_is_claimed_without_control_or_pruned_trials(self, session: Session) -> None:
        add_trial(session, 0.5)
        assert numbers.pruning_data(session).control == numbers.Control(0, None, None, None)


class TestOverview:
    def test_sums_up_the_data_and_the_trials(self, rich: Session) -> None:
        data = numbers.overview_data(rich)
        assert (data.classes, data.training, data.validation, data.test) == (10, 1242, 300, 180)
        assert data.imbalance_ratio == 100
        assert data.groups[0] == numbers.GroupSize("head", 3, 980)
        assert sum(data.states.values()) == data.budget == 40

    def test_tells_searched_settings_from_fixed_ones(self, session: Session) -> None:
        add_trial(session, 0.5, loss="ldam")
        best = numbers.overview_data(session).best
        assert best is not None
        searched = {(s.part, s.key) for s in best.settings if s.searched}
        assert {("loss", ""), ("loss", "max_margin"), ("optimizer", "lr")} <= searched
        assert ("optimizer", "momentum") not in searched


def test_one_read_of_the_study_serves_every_number(session: Session) -> None:
    add_trial(session, 0.5)
    still = numbers.still(session)
    add_trial(session, 0.9)
    assert len(numbers.history_data(still).points) == 1
    assert len(numbers.history_data(session).points) == 2
