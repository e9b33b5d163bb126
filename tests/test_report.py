"""The report: its numbers, what its figures show, and the page around them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from fabricated import SCRIPT, add_trial, empty_session, metrics, rich_session, verdict

from tuner.errors import StorageError
from tuner.report import data as numbers
from tuner.report import report_html, write_report
from tuner.session import Session
from tuner.statistics import wilson

COMPLETE_BASELINE: dict[str, Any] = {"loss": "cross_entropy", "baseline": True}


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return empty_session(tmp_path)


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return rich_session(tmp_path_factory.mktemp("rich"))


@pytest.fixture(scope="module")
def page(rich: Session) -> str:
    return report_html(rich)


def own_text(page: str) -> str:
    """The page without style, plotly.js and figures, as it is read."""
    text = re.sub(r"<(script|style).*?</\1>", " ", page, flags=re.S)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", text)).replace("\u00a0", " ").split())


def figure_names(page: str) -> list[str]:
    return re.findall(r'data-figure="figure-(\w+)"', page)


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
        assert tail.baseline == numbers.Estimate(0.4, 0.35, 0.45)
        assert tail.best is not None
        assert tail.best.value == 0.6

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
        assert "Trial 1 is better on validation" in own_text(report_html(session))


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
        assert data.baseline == (0.9, pytest.approx(0.45))
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


class TestFigures:
    def test_show_every_value_in_percent(self, rich: Session) -> None:
        from tuner.report.figures import history_figure

        data = numbers.history_data(rich)
        figure = history_figure(data)
        drawn = [y for t in figure.data if t.mode == "markers" for y in t.y]
        expected = [100 * p.value for p in data.points if p.value is not None]
        assert sorted(drawn) == pytest.approx(sorted(expected))

    def test_keep_names_that_look_like_markup_as_they_are(self, rich: Session) -> None:
        from tuner.report.figures import recall_figure

        data = numbers.recall_data(rich)
        assert data is not None
        data = replace(data, classes=(replace(data.classes[0], name=SCRIPT),))
        assert "&lt;script&gt;" in recall_figure(data).data[0].customdata[0]

    def test_stack_to_the_planned_epochs(self, rich: Session) -> None:
        from tuner.report.figures import pruning_figure

        data = numbers.pruning_data(rich)
        bars = sum(sum(trace.y) for trace in pruning_figure(data).data)
        assert bars == data.unpruned


class TestPage:
    def test_says_the_answer_in_words_with_intervals(self, page: str) -> None:
        text = own_text(page)
        assert "better by 20.0 points (10.0 to 30.0)" in text
        assert "worse by 5.0 points (2.0 to 8.0)" in text
        assert "no difference that this test part can show (1.0 points, −2.0 to 4.0)" in text
        assert "40.0 % (35.0 to 45.0)" in text
        assert "66.0 % on validation; on images it never saw, the same recipe has 60.0 %" in text

    def test_has_all_figures_and_plotly_once(self, page: str) -> None:
        assert figure_names(page) == ["recall", "history", "losses", "tradeoff", "pruning"]
        assert page.count("plotly.js v") == 1

    def test_holds_figures_as_json_that_a_browser_reads_back(self, page: str) -> None:
        blocks = re.findall(r'<script type="application/json" id="([^"]+)">(.*?)</script>', page)
        assert len(blocks) == 6
        for _, text in blocks:
            json.loads(text)

    def test_runs_no_script_of_the_study_and_loads_nothing(self, page: str) -> None:
        assert "<script>alert" not in page
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
        assert "default-src &#x27;none&#x27;" in page
        outside = re.sub(r"<script.*?</script>", "", page, flags=re.S)
        assert not re.search(r'(src|href)="', outside)

    def test_escapes_the_name_of_the_study_in_text_and_command(self, tmp_path: Path) -> None:
        html = report_html(empty_session(tmp_path, name="a<b> & 'c'"))
        assert "<b>" not in re.sub(r"<script.*?</script>", "", html, flags=re.S)
        assert "Study a<b> & 'c'" in own_text(html)
        assert """tuner export 'a<b> & '"'"'c'"'"'' -o best""" in own_text(html)

    def test_of_an_empty_study_says_what_is_missing(self, session: Session) -> None:
        html = report_html(session)
        assert "No trial is complete yet" in own_text(html)
        assert "No trial has been started yet" in own_text(html)
        assert figure_names(html) == []

    @pytest.mark.parametrize("state", ["complete", "pruned", "failed", "running"])
    def test_of_a_single_trial_is_whole(self, session: Session, state: Any) -> None:
        add_trial(session, 0.5, state=state)
        assert figure_names(report_html(session))[:2] == ["history", "losses"]

    def test_of_an_undecided_study_shows_the_rest(self, session: Session) -> None:
        add_trial(session, 0.5)
        text = own_text(report_html(session))
        assert "Not decided yet: the best trial so far, number 0" in text
        assert "Best recipe" in text

    def test_warns_when_the_comparison_had_no_test_part(self, session: Session) -> None:
        add_trial(session, 0.5)
        session.study.set_user_attr("verdict", verdict(best=0, part="validation"))
        text = own_text(report_html(session))
        assert "The data have no test part" in text
        assert "images it never saw" not in text

    def test_admits_that_nothing_beats_plain_cross_entropy(self, session: Session) -> None:
        add_trial(session, 0.5, **COMPLETE_BASELINE)
        session.study.set_user_attr("verdict", verdict(best=0, baseline=0))
        text = own_text(report_html(session))
        assert "found no training better than plain cross-entropy" in text


class TestFile:
    def test_is_written_whole_into_new_folders(self, session: Session, tmp_path: Path) -> None:
        path = tmp_path / "new" / "report.html"
        write_report(session, path)
        assert path.read_text(encoding="utf-8") == report_html(session)
        assert list(path.parent.iterdir()) == [path]

    def test_that_cannot_be_written_names_the_path(self, session: Session, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        path = tmp_path / "file" / "report.html"
        with pytest.raises(StorageError, match=re.escape(str(path))):
            write_report(session, path)
