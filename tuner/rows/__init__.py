"""Losses as rows of a table, and their gradients in closed form for many lanes at once."""

from __future__ import annotations

from tuner.rows._adaptive import GRADIENTS
from tuner.rows._gradients import Batch, Gradient, Table, plain_gradient
from tuner.rows._lines import lines
from tuner.rows._rows import Kind, Row, bare_row, row_of

__all__ = [
    "GRADIENTS",
    "Batch",
    "Gradient",
    "Kind",
    "Row",
    "Table",
    "bare_row",
    "lines",
    "plain_gradient",
    "row_of",
]
