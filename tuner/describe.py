"""Registered components as text: summary, parameters, bounds and defaults."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from tuner.datasets import PROFILES
from tuner.errors import shown
from tuner.recipe import PARTS

BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
KINDS = {
    "array": "list",
    "boolean": "true or false",
    "integer": "whole number",
    "number": "number",
    "null": "null",
    "string": "text",
}


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
    summary = (cls.__doc__ or "").strip().partition("\n")[0]
    return {"name": name, "summary": summary, "parameters": parameters}


def _parameter(entry: dict[str, Any], schema: dict[str, Any], required: bool) -> str:
    kind = _kind(entry, schema)
    if required:
        return f"({kind}, required)"
    default = _given(entry.get("default"))
    return f"({kind})" if default is None else f"= {shown(default)} ({kind})"


def _given(default: Any) -> Any:
    """A default without the keys that are not set; TOML has no null."""
    if isinstance(default, dict):
        return {key: value for key, value in default.items() if value is not None}
    return default


def _kind(entry: dict[str, Any], schema: dict[str, Any]) -> str:
    if "anyOf" in entry:
        kinds = [_kind(option, schema) for option in entry["anyOf"]]
        return " or ".join(kind for kind in kinds if kind != "null")
    if "enum" in entry:
        return "one of " + ", ".join(map(shown, entry["enum"]))
    if "const" in entry:
        return shown(entry["const"])
    if "$ref" in entry:
        return _table(entry["$ref"].rpartition("/")[2], schema)
    limits = [f"{sign} {entry[key]:g}" for key, sign in BOUNDS.items() if key in entry]
    return " ".join([KINDS.get(entry.get("type", ""), "value"), *limits])


def _table(name: str, schema: dict[str, Any]) -> str:
    if name == "Profile":
        return "table with a name, one of " + ", ".join(PROFILES)
    return "table of " + ", ".join(schema["$defs"][name]["properties"])
