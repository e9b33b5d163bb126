"""Registered components as text: summary, parameters, bounds and defaults."""

from __future__ import annotations

import re
from typing import Any

from pydantic import TypeAdapter

from tuner.recipe import PARTS


def components(part: str) -> list[dict[str, Any]]:
    """Every component of a part: its name, the first line of its docstring, its parameters."""
    return [_describe(name, PARTS[part][name]) for name in PARTS[part]]


def _describe(name: str, cls: type[Any]) -> dict[str, Any]:
    schema = TypeAdapter(cls).json_schema()
    required = set(schema.get("required", ()))
    parameters = {
        key: _parameter(entry, schema, key in required)
        for key, entry in schema.get("properties", {}).items()
    }
    summary = (cls.__doc__ or "").strip().splitlines()[0]
    return {"name": name, "summary": summary, "parameters": parameters}


def _parameter(entry: dict[str, Any], schema: dict[str, Any], required: bool) -> str:
    kind = _kind(entry, schema)
    if required:
        return f"({kind}, required)"
    default = entry.get("default")
    return f"({kind})" if default is None else f"= {default!r} ({kind})"


def _kind(entry: dict[str, Any], schema: dict[str, Any]) -> str:
    if "anyOf" in entry:
        kinds = [_kind(option, schema) for option in entry["anyOf"]]
        return " or ".join(kind for kind in kinds if kind != "null")
    if "enum" in entry:
        return "one of " + ", ".join(map(repr, entry["enum"]))
    if "const" in entry:
        return repr(entry["const"])
    if "$ref" in entry:
        return re.sub(r".*/", "", entry["$ref"])
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {entry[key]:g}" for key, sign in bounds.items() if key in entry]
    return " ".join([str(entry.get("type", "table")), *limits])
