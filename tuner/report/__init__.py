"""The report of a study: its numbers, its figures, and one self-contained page of both."""

from __future__ import annotations

from tuner.report.page import report_html, write_report

__all__ = ["report_html", "write_report"]
