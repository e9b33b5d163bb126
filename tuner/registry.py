"""One table of named components per part, with "did you mean" for wrong names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any, Generic, TypeVar, dataclass_transform

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from tuner.errors import StudyFileError, UnknownNameError, close_match, unknown_name

C = TypeVar("C")
D = TypeVar("D", bound=type[Any])


@dataclass_transform(kw_only_default=True, frozen_default=True)
def component(cls: D) -> D:
    """Make ``cls`` a frozen, validated record that refuses unknown keys.

    The annotations of the class are the only place where the names, types, bounds and
    defaults of its hyperparameters stand.
    """
    config = ConfigDict(extra="forbid", arbitrary_types_allowed=False)
    return pydantic_dataclass(cls, frozen=True, kw_only=True, config=config)  # type: ignore[return-value]


class Registry(Generic[C]):
    """The components that may fill one part of a recipe, by name."""

    def __init__(self, part: str) -> None:
        self.part = part
        self._components: dict[str, type[C]] = {}

    def register(self, name: str) -> Callable[[D], D]:
        """Enter a component class under ``name``; a name is given once."""

        def enter(cls: D) -> D:
            if name in self._components:
                raise ValueError(f"{self.part} {name!r} is registered already")
            self._components[name] = cls
            return cls

        return enter

    def __getitem__(self, name: str) -> type[C]:
        if name not in self._components:
            raise UnknownNameError(unknown_name(self.part, name, self._components))
        return self._components[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._components)

    def __contains__(self, name: object) -> bool:
        return name in self._components

    def parse(self, name: str, values: Mapping[str, Any], *, where: str) -> C:
        """Component ``name`` with ``values`` as its hyperparameters.

        Raises:
            StudyFileError: The name or a key is unknown, or a value is out of bounds; the
                text starts with ``where`` and names every key that is wrong.
        """
        if name not in self._components:
            raise StudyFileError(f"{where}: {unknown_name(self.part, name, self._components)}")
        cls = self._components[name]
        try:
            return TypeAdapter(cls).validate_python(dict(values))
        except ValidationError as error:
            known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
            raise StudyFileError(explain(error, f"{where}.{name}", known)) from None

    def name_of(self, instance: C) -> str:
        """Name under which the class of ``instance`` is registered."""
        return next(name for name, cls in self._components.items() if type(instance) is cls)


def explain(error: ValidationError, where: str, known: Iterable[str] = ()) -> str:
    """One line per mistake of a pydantic error: where it is, what is wrong, what was given."""
    return "\n".join(_mistake(item, where, known) for item in error.errors())


def _mistake(item: Any, where: str, known: Iterable[str]) -> str:
    place = ".".join([where, *(str(step) for step in item["loc"])])
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{place}: unknown key{close_match(str(item['loc'][-1]), known)}"
    if item["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{place}: is missing"
    return f"{place} = {item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}"
