"""A browser, or a word on why there is none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")


def _missing(what: str) -> None:
    """Skip, except where the services are promised: there, a missing one is a failure."""
    if os.environ.get("TUNER_REQUIRE_SERVICES") == "1":
        pytest.fail(f"{what}, and TUNER_REQUIRE_SERVICES=1 asks for it")
    pytest.skip(what)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium, started once for all tests."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _missing("playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        _missing("chromium is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(QUIET))
        yield browser
        browser.close()
