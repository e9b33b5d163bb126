"""The ladder in a report: what each rung did, whether they agree, and no rung among another's."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest
from fabricated import add_head, add_trial, empty_session, ladder_session, metrics

from tuner.climbing import compared
from tuner.report import data as numbers
from tuner.report import report_html
from tuner.report.climb import agreement
from tuner.report.figures import agreement_figure, history_figure, loss_figure
from tuner.session import Session

HEAD_ALONE = '[ladder]\nrungs = ["head"]'


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return ladder_session(tmp_path_factory.mktemp("ladder"))


@pytest.fixture(scope="module")
def page(session: Session) -> str:
    return report_html(session)


@pytest.fixture
def head_alone(tmp_path: Path) -> Session:
    """A study whose answer is of the head rung; plain cross-entropy is trained in full."""
    session = empty_session(tmp_path, ladder=HEAD_ALONE)
    add_trial(session, 0.3, 0.4, loss="cross_entropy", baseline=True)
    for value, loss in ((0.2, "cross_entropy"), (0.6, "ldam")):
        add_trial(session, value, loss=loss, fidelity="head", seconds=0.5)
    return session


def own_text(page: str) -> str:
    text = re.sub(r"<(script|style).*?</\1>", " ", page, flags=re.S)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", text)).replace("\u00a0", " ").split())


def ladder(session: Session) -> numbers.LadderData:
    data = numbers.ladder_data(session)
    assert data is not None
    return data


class TestLadder:
    def test_is_absent_where_there_is_one_rung(self, tmp_path: Path, head_alone: Session) -> None:
        assert numbers.ladder_data(empty_session(tmp_path)) is None
        assert numbers.ladder_data(head_alone) is None

    def test_has_trials_promotions_and_cost_of_each_rung(self, session: Session) -> None:
        head, full = ladder(session).rows
        assert (head.rung, head.ended, head.planned, head.judged) == ("head", 8, 8, 8)
        assert (head.promoted, head.seconds, head.per_trial) == (3, 4.0, 0.5)
        assert (full.rung, full.ended, full.planned, full.judged) == ("full", 9, 9, 8)
        assert (full.promoted, full.seconds) == (None, 20 + 6 * 10 + 5 + 10)

    def test_says_what_a_rung_holds_fixed(self, session: Session) -> None:
        head, full = ladder(session).rows
        assert dict(head.held) == {"optimizer.sgd.lr": "0.1"}
        assert "loss and sampler" in head.why_held
        assert (full.held, full.why_held) == ((), "nothing")

    def test_has_the_baseline_apart_where_the_full_rung_is_not_climbed(
        self, tmp_path: Path
    ) -> None:
        text = '[ladder]\nrungs = ["head", "deferred"]'
        session = empty_session(tmp_path, ladder=text)
        add_trial(session, 0.4, loss="cross_entropy", baseline=True, seconds=20.0)
        rows = ladder(session).rows
        assert [row.rung for row in rows] == ["baseline", "head", "deferred"]
        assert (rows[0].seconds, rows[1].seconds, rows[1].ended) == (20.0, None, 0)

    def test_compares_the_recipes_that_the_study_compares(self, session: Session) -> None:
        found = ladder(session).comparisons[0]
        pairs = compared(session, "head", "full").pairs
        assert tuple((twin.lower, twin.upper) for twin in found.twins) == pairs
        assert [twin.lower_trial for twin in found.twins] == [1, 2, 3, 4, 8, 7, 6]
        assert [twin.upper_trial for twin in found.twins] == [0, 9, 10, 11, 12, 13, 14]

    def test_leaves_out_of_the_comparison_what_has_more_open(self, session: Session) -> None:
        assert 16 not in {t.upper_trial for t in ladder(session).comparisons[0].twins}

    def test_followed_what_ranks_alike_and_not_what_ranks_otherwise(
        self, session: Session, tmp_path: Path
    ) -> None:
        found = ladder(session).comparisons[0]
        assert found.correlation is not None
        assert (found.decision, found.correlation.value) == ("followed", 1.0)
        found = ladder(ladder_session(tmp_path, agree=False)).comparisons[0]
        assert found.correlation is not None
        assert found.decision == "not followed"
        assert found.correlation.value < 0

    def test_is_open_while_only_the_comparing_trials_are_there(self, tmp_path: Path) -> None:
        session = empty_session(tmp_path, ladder='[ladder]\nrungs = ["head", "full"]')
        add_trial(session, 0.4, loss="cross_entropy", baseline=True)
        add_head(session, 0.5, preset="cross_entropy")
        found = ladder(session).comparisons[0]
        assert (found.decision, found.correlation, len(found.twins)) == ("open", None, 1)
        assert "1 recipe trained to the end on both, too few" in agreement(found)
        assert "not decided yet" in agreement(found)


class TestOtherNumbers:
    """Of a study with a ladder, whose trials 1 to 8 are of the head rung."""

    def test_history_shows_the_last_rung_in_its_own_order(self, session: Session) -> None:
        data = numbers.history_data(session)
        assert [p.number for p in data.points] == [0, *range(9, 17)]
        assert [p.place for p in data.points] == list(range(9))
        figure = history_figure(data)
        assert figure.layout.xaxis.title.text == "trials of the full rung, in order"
        assert "of 9 trials so far at the full rung" in figure.layout.title.text

    def test_losses_have_values_of_the_last_rung_alone(self, session: Session) -> None:
        data = numbers.loss_data(session)
        assert sum(row.complete for row in data.rows) == 8
        assert sum(row.pruned for row in data.rows) == 1
        assert "best trial of the full rung" in loss_figure(data).layout.title.text

    def test_pruning_counts_no_trial_of_a_lower_rung(self, session: Session) -> None:
        data = numbers.pruning_data(session)
        assert [row.number for row in data.trials] == [0, *range(9, 17)]
        assert data.reasons == {"behind": 1}

    def test_head_and_tail_are_of_the_last_rung(self, session: Session) -> None:
        shown = {p.number for p in numbers.head_tail_data(session).points}
        assert shown == {0, *range(9, 17)} - {15}

    def test_overview_counts_rungs_apart(self, session: Session) -> None:
        data = numbers.overview_data(session)
        assert (data.states, data.budget) == ({"complete": 8, "pruned": 1}, 9)
        assert (data.last, data.below) == ("full", {"head": 8})


class TestHeadAlone:
    def test_does_not_mix_plain_training_in_full_into_the_losses(self, head_alone: Session) -> None:
        rows = numbers.loss_data(head_alone).rows
        assert [(row.loss, row.complete, row.best) for row in rows] == [
            ("ldam", 1, 0.6),
            ("cross_entropy", 1, 0.2),
        ]

    def test_counts_the_baseline_as_one_trial_more(self, head_alone: Session) -> None:
        data = numbers.overview_data(head_alone)
        assert (data.budget, data.states, data.below) == (41, {"complete": 3}, {})

    def test_page_says_what_the_best_recipe_is_and_shows_no_pruning(
        self, head_alone: Session
    ) -> None:
        html = report_html(head_alone)
        text = own_text(html)
        assert "figure-pruning" not in html
        assert "Trial 0 is plain cross-entropy, trained in full" in text
        assert "Trial 2 (head rung), 60.0 % on validation" in text
        assert "trains the recipe from the start, everything of it" in text


class TestPage:
    def test_has_the_section_with_a_figure_per_pair_of_rungs(self, page: str) -> None:
        assert "<h2>Ladder</h2>" in page
        assert page.count('data-figure="figure-agreement_head_full"') == 1

    def test_says_the_correlation_its_interval_and_what_was_done(self, page: str) -> None:
        text = own_text(page)
        said = r"7 recipes .* Spearman's correlation 1\.00 \(95 % interval 0\.\d\d to 1\.00\)"
        assert re.search(said, text)
        assert "the head rung was followed" in text
        assert "9 trials planned at the full rung; 8 complete, 1 pruned" in text
        assert "Before them, 8 trials of the head rung ended." in text

    def test_says_where_the_budget_went_when_the_ranks_disagreed(self, tmp_path: Path) -> None:
        text = own_text(report_html(ladder_session(tmp_path, agree=False)))
        assert "less than the 0.50 that the study asks for" in text
        assert "the head rung was not followed, and its share of the budget went" in text

    def test_of_a_study_without_a_ladder_has_no_such_section(self, tmp_path: Path) -> None:
        assert "Ladder" not in own_text(report_html(empty_session(tmp_path)))

    def test_stays_as_small_with_many_trials_of_a_lower_rung(
        self, page: str, tmp_path: Path
    ) -> None:
        many = report_html(ladder_session(tmp_path, heads=200))
        assert len(many) < len(page) + 1000

    def test_figure_has_one_point_per_recipe_with_its_trials(self, session: Session) -> None:
        found = ladder(session).comparisons[0]
        figure = agreement_figure(found, "tail_accuracy")
        points = [xy for trace in figure.data for xy in zip(trace.x, trace.y, strict=True)]
        expected = [(100 * twin.lower, 100 * twin.upper) for twin in found.twins]
        assert sorted(points) == sorted(expected)
        texts = [text for trace in figure.data for text in trace.customdata]
        assert any("(trial 8)" in text and "(trial 12)" in text for text in texts)

    def test_figure_of_no_recipes_is_not_drawn(self, session: Session) -> None:
        empty = replace(ladder(session).comparisons[0], twins=(), correlation=None)
        assert "there are 0 recipes" in agreement(empty)


def test_metrics_of_a_head_trial_are_judged_by_the_floor(tmp_path: Path) -> None:
    session = ladder_session(tmp_path)
    number = add_head(session, 0.9, metrics=metrics(0.9, 0.5, 0.5))
    ranked = session.ranked(t for t in session.trials() if "fidelity" in t.user_attrs)
    assert ranked[-1].number == number
