"""How long a database takes to answer and to keep something."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from tuner.ledger import clocks

PAIRS = 10


def measured(times: int, action: Callable[[], object]) -> list[float]:
    """Seconds that ``action`` took, each of so many ``times``."""
    found = []
    for _ in range(times):
        begin = time.perf_counter()
        action()
        found.append(time.perf_counter() - begin)
    return found


def described(times: list[float]) -> str:
    """Median and 95th percentile in milliseconds."""
    ordered = sorted(times)
    middle, high = ordered[len(ordered) // 2], ordered[int(0.95 * (len(ordered) - 1))]
    return f"p50 {1000 * middle:.1f} ms, p95 {1000 * high:.1f} ms"


def commits(engine: Engine) -> list[float]:
    """Seconds of 20 small transactions: a row that means nothing is written and removed.

    It goes into the table where SQLite's workers note when their machine started, under a name
    no machine has; a database knows no smaller write that it has to keep.

    Raises:
        SQLAlchemyError: It cannot be written.
    """
    names = [f"doctor {uuid.uuid4().hex}" for _ in range(PAIRS)]
    found = []
    try:
        for name in names:
            found += _pair(engine, name)
    finally:
        with engine.begin() as connection:
            connection.execute(sa.delete(clocks).where(clocks.c.boot_id.in_(names)))
    return found


def _pair(engine: Engine, name: str) -> list[float]:
    def write(statement: sa.Executable) -> None:
        with engine.begin() as connection:
            connection.execute(statement)

    one = sa.insert(clocks).values(boot_id=name, zero=0.0)
    other = sa.delete(clocks).where(clocks.c.boot_id == name)
    return [*measured(1, lambda: write(one)), *measured(1, lambda: write(other))]
