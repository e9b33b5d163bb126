"""The report: what its figures show, and the page around them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from fabricated import SCRIPT, add_trial, empty_session, rich_session, verdict

from tuner.cli.finish import conclusions
from tuner.confirmation import ONE_TRAINING_EACH
from tuner.errors import StorageError
from tuner.report import data as numbers
from tuner.report import report_html, write_report
from tuner.report.lead import lead
from tuner.session import Session

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
        assert "τ = 1.20, needs no search and gives 50.0 % tail accuracy and 69.0 %" in text
        assert "66.0 % on validation; on images it never saw, the same recipe has 60.0 %" in text

    def test_says_how_much_overall_accuracy_a_recipe_must_keep(self, session: Session) -> None:
        text = own_text(report_html(session))
        assert "while overall accuracy stays within 2.0 points of plain cross-entropy." in text
        add_trial(session, 0.4, accuracy=0.05, **COMPLETE_BASELINE)
        text = own_text(report_html(session))
        assert "overall accuracy stays at 4.0 % or above; plain cross-entropy has 5.0 %." in text
        assert "plain cross-entropy does no better than guessing" in text

    def test_says_when_the_seeds_do_not_tell_the_compared_recipes_apart(
        self, session: Session
    ) -> None:
        session.study.set_user_attr("verdict", verdict(best=3))
        overview, found = numbers.overview_data(session), numbers.verdict_data(session)
        beside = numbers.ConfirmedData("tail_accuracy", 4, False, False, (2, 8), (), (5,))
        with_plain = replace(beside, rivals=(5, 0))
        shown = ["".join(lead(overview, found, seeds)) for seeds in (with_plain, beside, None)]
        assert [ONE_TRAINING_EACH in text for text in shown] == [True, False, False]
        told = verdict(best=3, beyond_adjustment={}, confirmed={"rivals": [0]})
        [first, *_] = conclusions(session, told)
        assert first.endswith(f"accuracy by +20.0 [+10.0, +30.0] points. {ONE_TRAINING_EACH}")

    def test_terminal_says_why_an_interval_without_zero_shows_no_difference(
        self, session: Session
    ) -> None:
        found = verdict(best=3, beyond_adjustment={})
        shown = found["differences"]["tail_accuracy"]
        found["differences"]["tail_accuracy"] = {**shown, "p_value": 0.053}
        [first, *_] = conclusions(session, found)
        assert "do not show a difference in tail accuracy (p = 0.053, corrected" in first

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
        assert f"tuner export {session.file.name} -o best" in text.partition("Best recipe")[0]
        assert "Best recipe" in text

    def test_warns_when_the_comparison_had_no_test_part(self, session: Session) -> None:
        add_trial(session, 0.5)
        session.study.set_user_attr("verdict", verdict(best=0, part="validation"))
        text = own_text(report_html(session))
        assert "The data have no test part" in text
        assert "images it never saw" not in text

    def test_tells_when_a_better_trial_came_later(self, session: Session) -> None:
        add_trial(session, 0.4, **COMPLETE_BASELINE)
        add_trial(session, 0.5)
        session.study.set_user_attr("verdict", verdict(best=0))
        assert "Trial 1 is better on validation" in own_text(report_html(session))

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
