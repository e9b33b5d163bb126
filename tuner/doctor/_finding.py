"""What one check found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """The name of a check, how it went, what it found, and what to do about it."""

    check: str
    level: Level
    found: str
    cure: str | None = None


def ok(check: str, found: str) -> Finding:
    """Nothing to do."""
    return Finding(check, "ok", found)


def warn(check: str, found: str, cure: str) -> Finding:
    """Work goes on, but worse than it could, or not for long."""
    return Finding(check, "warn", found, cure)


def fail(check: str, found: str, cure: str) -> Finding:
    """Work cannot go on like this."""
    return Finding(check, "fail", found, cure)


def gibibytes(count: float) -> str:
    """Bytes as people read them."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
