"""What this machine measured of its speeds: a small file that its processes share."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tuner.alone import cache_folder

Rows = list[dict[str, Any]]


def path() -> Path:
    """Where it lies."""
    return cache_folder() / "speeds.json"


def read(key: str) -> Rows | None:
    """What was measured under ``key``; None where nothing was, or what is there is damaged."""
    return _rows(_entries().get(key))


def read_all() -> Iterator[tuple[str, Rows]]:
    """All that was measured: what it is of, for people, and the rows."""
    for key, entry in _entries().items():
        rows = _rows(entry)
        if rows is not None:
            yield str(entry.get("label", key)), rows


def write(key: str, label: str, rows: Rows) -> None:
    """Add an entry; one that cannot be kept is measured again another time."""
    file = path()
    own = file.with_name(f"{file.name}.{os.getpid()}")
    entries = {**_entries(), key: {"label": label, "rows": rows}}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        own.write_text(json.dumps(entries, indent=1))
        own.replace(file)
    except OSError:
        return


def _entries() -> dict[str, Any]:
    """What the file holds; nothing where it is missing or damaged."""
    try:
        found = json.loads(path().read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _rows(entry: Any) -> Rows | None:
    rows = entry.get("rows") if isinstance(entry, Mapping) else None
    return rows if isinstance(rows, list) and rows else None
