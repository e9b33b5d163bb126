"""The pages in a real browser: what is seen, what is asked for, and what goes wrong."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from fabricated import SCRIPT, empty_session, ladder_session, rich_session

from tuner.report import write_report
from tuner.session import Session
from tuner.storage import open_storage
from tuner.web import dashboard_app, listen

pytestmark = pytest.mark.browser

QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
WIDE = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 800}


def missing(what: str) -> NoReturn:
    """Skip, except where the services are promised: there, a missing one is a failure."""
    if os.environ.get("TUNER_REQUIRE_SERVICES") == "1":
        pytest.fail(f"{what}, and TUNER_REQUIRE_SERVICES=1 asks for it")
    pytest.skip(what)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, started once for all tests."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        missing("chromium is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(QUIET))
        yield browser
        browser.close()


class Visit:
    """A page that notes every request, error and dialog."""

    def __init__(self, browser: Any, **context: Any) -> None:
        self.context = browser.new_context(**context)
        self.page = self.context.new_page()
        self.requests: list[tuple[str, str]] = []
        self.errors: list[str] = []
        self.page.on("request", lambda r: self.requests.append((r.method, r.url)))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._console)
        self.page.on("dialog", lambda dialog: self.errors.append(f"dialog: {dialog.message}"))

    def _console(self, message: Any) -> None:
        if message.type == "error":
            self.errors.append(message.text)


def drawn(page: Any) -> None:
    """Wait until the last figure stands; by locator, for the page's policy forbids eval."""
    page.locator(".plot[data-figure=figure-pruning] .main-svg").first.wait_for()


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    folder = tmp_path_factory.mktemp("browser")
    return rich_session(folder, open_storage(f"sqlite:///{folder}/tuner.db"), name="rare digits")


@pytest.fixture(scope="module")
def url(session: Session) -> Iterator[str]:
    app = dashboard_app(session.study._storage, load_session=lambda _: session)
    server, address = listen(app, "127.0.0.1", 0)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    yield address
    server.task_dispatcher.shutdown()
    server.close()
    thread.join(5)


@pytest.fixture(scope="module")
def report(session: Session, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(session, path)
    return path


@pytest.mark.parametrize(
    ("viewport", "scheme"), [(WIDE, "light"), (PHONE, "dark")], ids=["wide", "phone"]
)
def test_the_report_opens_from_a_file_without_network_or_errors(
    browser: Any, report: Path, tmp_path: Path, viewport: dict[str, int], scheme: str
) -> None:
    visit = Visit(browser, viewport=viewport, color_scheme=scheme)
    page = visit.page
    page.goto(report.as_uri())
    drawn(page)
    page.screenshot(path=tmp_path / "report.png", full_page=True)
    assert visit.requests == [("GET", report.as_uri())]
    assert visit.errors == []
    table = page.locator("table").first
    assert table.is_visible()
    assert "better by 20.0 points (10.0 to 30.0)" in table.inner_text()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_every_figure_of_the_report_draws_its_marks(browser: Any, report: Path) -> None:
    visit = Visit(browser, viewport=WIDE)
    visit.page.goto(report.as_uri())
    drawn(visit.page)
    marks = "boxes => boxes.map(b => b.querySelectorAll('.point, .points path').length)"
    assert all(n > 0 for n in visit.page.eval_on_selector_all(".plot", marks))


@pytest.mark.parametrize(
    ("viewport", "scheme"), [(WIDE, "dark"), (PHONE, "light")], ids=["wide", "phone"]
)
def test_the_ladder_of_a_study_is_drawn_on_any_screen(
    browser: Any, tmp_path: Path, viewport: dict[str, int], scheme: str
) -> None:
    path = tmp_path / "ladder.html"
    write_report(ladder_session(tmp_path, heads=40), path)
    visit = Visit(browser, viewport=viewport, color_scheme=scheme)
    page = visit.page
    page.goto(path.as_uri())
    drawn(page)
    page.screenshot(path=tmp_path / "ladder.png", full_page=True)
    figure = page.locator(".plot[data-figure=figure-agreement_head_full]")
    assert figure.locator(".points path").count() == 7
    assert page.get_by_text("the head rung was followed").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert visit.errors == []


def test_a_class_named_like_a_script_is_only_a_name(browser: Any, report: Path) -> None:
    visit = Visit(browser, viewport=WIDE)
    page = visit.page
    page.goto(report.as_uri())
    page.locator("summary", has_text="The numbers").click()
    assert page.get_by_role("rowheader", name=SCRIPT).is_visible()
    page.evaluate(
        "Plotly.Fx.hover(document.querySelector('.plot'), [{curveNumber: 0, pointNumber: 0}])"
    )
    assert SCRIPT in page.locator(".plot .hoverlayer").first.text_content()
    assert visit.errors == []


def test_the_report_of_an_empty_study_says_so(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "empty.html"
    write_report(empty_session(tmp_path), path)
    visit = Visit(browser, viewport=PHONE)
    visit.page.goto(path.as_uri())
    assert visit.page.get_by_text("No trial is complete yet").is_visible()
    assert visit.errors == []


def test_the_report_is_served_with_its_policy_in_force(browser: Any, url: str) -> None:
    visit = Visit(browser, viewport=WIDE)
    page = visit.page
    page.goto(f"{url}report")
    page.get_by_role("link", name="rare digits").click()
    drawn(page)
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), "
        "{textContent: 'window.intruded = true'}))"
    )
    assert page.evaluate("window.intruded") is None
    assert all(method == "GET" for method, _ in visit.requests)


def test_the_dashboard_lists_the_study_and_its_trials(
    browser: Any, url: str, session: Session, tmp_path: Path
) -> None:
    visit = Visit(browser, viewport=WIDE)
    page = visit.page
    page.goto(url)
    page.get_by_text("rare digits").first.wait_for()
    page.screenshot(path=tmp_path / "studies.png")
    page.goto(f"{url}dashboard/studies/{session.study._study_id}/trials")
    page.get_by_text("40 Trials").wait_for()
    page.get_by_text("Pruned").first.wait_for()
    page.screenshot(path=tmp_path / "trials.png")
    assert visit.errors == []
    places = (url, "data:", "blob:")
    assert all(method == "GET" and at.startswith(places) for method, at in visit.requests)


def test_the_dashboard_shows_the_best_trial_that_keeps_the_floor(
    browser: Any, url: str, session: Session, tmp_path: Path
) -> None:
    best = session.best()
    assert best is not None
    visit = Visit(browser, viewport=WIDE)
    page = visit.page
    page.goto(f"{url}dashboard/studies/{session.study._study_id}")
    page.get_by_text(f"Best Trial (number={best.number})").wait_for()
    page.locator(".main-svg").first.wait_for()
    page.screenshot(path=tmp_path / "study.png")
    assert visit.errors == []


def test_the_delete_button_of_the_dashboard_deletes_nothing(
    browser: Any, url: str, session: Session, tmp_path: Path
) -> None:
    visit = Visit(browser, viewport=WIDE)
    page = visit.page
    page.goto(url)
    page.get_by_test_id("DeleteIcon").first.click()
    with page.expect_response(lambda answer: answer.request.method == "DELETE") as answered:
        page.get_by_role("dialog").get_by_role("button", name="Yes").click()
    assert answered.value.status == 405
    page.get_by_text("Failed to delete study").wait_for()
    page.screenshot(path=tmp_path / "refused.png")
    page.reload()
    page.get_by_text("rare digits").first.wait_for()
