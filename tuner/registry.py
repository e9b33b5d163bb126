"""One table of named components per part, with "did you mean" for wrong names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import lru_cache
from typing import Any, Generic, TypeVar, dataclass_transform, get_args, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from tuner.errors import StudyFileError, UnknownNameError, close_match, shown, unknown_name
from tuner.packages import PACKAGES

C = TypeVar("C")
D = TypeVar("D", bound=type[Any])

CONFIG = ConfigDict(extra="forbid", arbitrary_types_allowed=False, allow_inf_nan=False)
INSTALLED = "; is the package that has it installed here?"


@dataclass_transform(kw_only_default=True, frozen_default=True)
def component(cls: D) -> D:
    """Make ``cls`` a frozen, validated record that refuses unknown keys.

    The annotations of the class are the only place where the names, types, bounds and
    defaults of its hyperparameters stand.
    """
    return pydantic_dataclass(cls, frozen=True, kw_only=True, config=CONFIG)  # type: ignore[return-value]


class Registry(Generic[C]):
    """The components that may fill one part of a recipe, by name; also those of other packages."""

    def __init__(self, part: str) -> None:
        self.part = part
        self._components: dict[str, type[C]] = {}

    def register(self, name: str) -> Callable[[D], D]:
        """Enter a component class under ``name``; a name is given once.

        Raises:
            ValueError: It is taken.
        """

        def enter(cls: D) -> D:
            if name in self._components:
                known = self._components[name]
                raise ValueError(
                    f"{self.part} {name!r} is registered already, as {known.__module__}."
                    f"{known.__qualname__}"
                )
            self._components[name] = cls
            return cls

        return enter

    @property
    def _all(self) -> dict[str, type[C]]:
        PACKAGES.load()
        return self._components

    def __getitem__(self, name: str) -> type[C]:
        if name not in self._all:
            raise UnknownNameError(self.unknown(name))
        return self._components[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __contains__(self, name: object) -> bool:
        return name in self._all

    def unknown(self, name: str) -> str:
        """Say that no component is called ``name``: misspelt, or of a package that is not here."""
        return unknown_name(self.part, name, self._all, INSTALLED)

    def parse(self, name: str, values: Mapping[str, Any], *, where: str) -> C:
        """Component ``name`` with ``values`` as its hyperparameters.

        Raises:
            StudyFileError: The name or a key is unknown, or a value is out of bounds; the
                text starts with ``where`` and names every key that is wrong.
        """
        if name not in self._all:
            raise StudyFileError(f"{where}: {self.unknown(name)}")
        return checked(self._components[name], dict(values), where)  # type: ignore[no-any-return]

    def name_of(self, instance: C) -> str:
        """Name under which the class of ``instance`` is registered."""
        return next(name for name, cls in self._components.items() if type(instance) is cls)


@lru_cache(maxsize=512)
def adapter_of(kind: Any) -> TypeAdapter[Any]:
    """What reads and dumps ``kind``, a component class or an annotation; it is made once."""
    return TypeAdapter(kind) if is_dataclass(kind) else TypeAdapter(kind, config=CONFIG)


def checked(kind: Any, value: Any, where: str) -> Any:
    """``value`` of a TOML file read as ``kind``: a component class, or an annotation.

    Texts and truth values never pass for numbers.

    Raises:
        StudyFileError: The value does not fit; one line per mistake, each with ``where``.
    """
    try:
        result = adapter_of(kind).validate_python(value)
    except ValidationError as error:
        raise StudyFileError(_explain(error, kind, value, where)) from None
    except UnknownNameError as error:
        raise StudyFileError(f"{where}: {error}") from None
    if mistaken := list(_mistaken_kinds(value, result, where)):
        raise StudyFileError("\n".join(mistaken))
    return result


def _mistaken_kinds(given: Any, read: Any, place: str) -> Iterator[str]:
    """Lines about texts and truth values that pydantic took for something else."""
    if isinstance(given, Mapping):
        for key, value in given.items():
            yield from _mistaken_kinds(value, getattr(read, key, None), f"{place}.{key}")
    elif isinstance(given, list) and isinstance(read, tuple | list):
        for i, (value, item) in enumerate(zip(given, read, strict=False)):
            yield from _mistaken_kinds(value, item, f"{place}[{i}]")
    elif read is not None and any(isinstance(given, t) != isinstance(read, t) for t in (bool, str)):
        kind = "true or false" if isinstance(read, bool) else "a number"
        quotes = ", without quotes" if isinstance(given, str) else ""
        yield f"{place} = {shown(given)}: must be {kind}{quotes}"


def _explain(error: ValidationError, kind: Any, given: Any, where: str) -> str:
    """One line per mistake: where it is, what was given, what is wrong."""
    items = error.errors(include_url=False)
    messages: dict[str, list[str]] = {}
    for item in items:
        if not any(_is_inside(other["loc"], item["loc"]) for other in items):
            start = where + _place(item["loc"], given)
            start, message = _mistake(item, start, kind)
            messages.setdefault(start, []).append(message)
    return "\n".join(start + _joined(texts) for start, texts in messages.items())


def _joined(texts: list[str]) -> str:
    return " or ".join([texts[0], *(text.removeprefix("must be ") for text in texts[1:])])


def _is_inside(inner: tuple[int | str, ...], outer: tuple[int | str, ...]) -> bool:
    return len(inner) > len(outer) and inner[: len(outer)] == outer


def _place(steps: tuple[int | str, ...], given: Any) -> str:
    """Path to a mistake; steps below a plain value are pydantic's names of alternatives."""
    path = ""
    for step in steps:
        if not isinstance(given, Mapping | list | tuple):
            break
        path += f"[{step}]" if isinstance(step, int) else f".{step}"
        inside = dict(enumerate(given)) if isinstance(given, list | tuple) else given
        given = inside.get(step)
    return path


def _mistake(item: Any, place: str, kind: Any) -> tuple[str, str]:
    """Place with the value, and what is wrong with it."""
    name, context = item["type"], item.get("ctx", {})
    if name in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _known_keys(kind, item["loc"][:-1])
        return f"{place}: ", f"unknown key{close_match(str(item['loc'][-1]), known)}"
    if name.startswith("missing"):
        return place, " is missing"
    value = "" if isinstance(item["input"], Mapping) else f" = {shown(item['input'])}"
    if name == "value_error":
        return f"{place}{value}: ", str(context["error"])
    start = f"{place} = {shown(item['input'])}: "
    message: str = item["msg"].replace("Input should be", "must be")
    return start, MESSAGES[name].format(**context) if name in MESSAGES else message


def _known_keys(kind: Any, steps: tuple[int | str, ...]) -> set[str]:
    """Keys of the component that lies ``steps`` below the component ``kind``."""
    for step in steps:
        if isinstance(step, str):
            kind = _component_in(get_type_hints(kind, include_extras=True).get(step))
        if kind is None:
            return set()
    return {field.name for cls in (kind, *kind.__subclasses__()) for field in fields(cls)}


def _component_in(hint: Any) -> Any:
    """The component class that an annotation speaks of, or None."""
    if is_dataclass(hint):
        return hint
    found = map(_component_in, get_args(hint))
    return next((kind for kind in found if kind is not None), None)


MESSAGES = {
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "dataclass_type": "must be a table",
    "finite_number": "must be a finite number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a smaller whole number",
    "int_type": "must be a whole number",
    "less_than": "must be below {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "string_type": "must be a text in quotes",
    "too_long": "must hold at most {max_length}",
    "too_short": "must hold at least {min_length}",
    "tuple_type": "must be a list",
}
