"""The pages in a real browser: what is seen, what is asked for, and what goes wrong."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fabricated import SCRIPT, empty_session, rich_session

from tuner.report import write_report
from tuner.session import Session
from tuner.storage import open_storage
from tuner.web import dashboard_app, listen

pytestmark = pytest.mark.browser

WIDE = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 800}


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


def test_a_class_named_like_a_script_is_only_a_name(browser: Any, report: Path) -> None:
    visit = Visit(browser, viewport=WIDE)
    page = visit.page
    page.goto(report.as_uri())
    page.locator("summary", has_text="The numbers").click()
    assert page.get_by_role("rowheader", name=SCRIPT).is_visible()
    hostile = "document.querySelector('#figure-recall').textContent.includes('&lt;script&gt;')"
    assert page.evaluate(hostile) is False  # class 9 has no images, so it is in the table only
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
    study = session.study._study_id
    page.goto(f"{url}dashboard/studies/{study}/trialTable")
    page.get_by_role("table").first.wait_for()
    page.get_by_role("cell", name="Complete").first.wait_for()
    page.screenshot(path=tmp_path / "trials.png")
    page.goto(f"{url}dashboard/studies/{study}")
    page.locator(".main-svg").first.wait_for()
    page.screenshot(path=tmp_path / "study.png")
    assert all(
        method == "GET" and at.startswith((url, "data:", "blob:")) for method, at in visit.requests
    )
    assert visit.errors == []


def test_a_button_of_the_dashboard_cannot_change_the_storage(
    browser: Any, url: str, session: Session
) -> None:
    visit = Visit(browser, viewport=WIDE)
    page = visit.page
    page.goto(url)
    page.get_by_text("rare digits").first.wait_for()
    study = session.study._study_id
    status = page.evaluate(
        f"fetch('/api/studies/{study}', {{method: 'DELETE'}}).then(answer => answer.status)"
    )
    assert status == 405
    page.reload()
    page.get_by_text("rare digits").first.wait_for()
