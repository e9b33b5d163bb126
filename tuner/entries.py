"""One entry of a search space: a fixed value, a choice, or a range; read from TOML values."""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from decimal import Decimal
from typing import Any, Protocol

from tuner.errors import StudyFileError, close_match, shown
from tuner.registry import checked

Value = bool | int | float | str | None
RANGE_KEYS = ("low", "high", "log", "step")
LARGEST_WHOLE = 2**53
"""Optuna's storages keep parameters as float64, which is exact up to here."""


class Suggester(Protocol):
    """What a space asks: Optuna's Trial, FixedTrial, or anything that answers alike."""

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        """One of ``choices``."""

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """A float in [low, high]."""

    def suggest_int(
        self, name: str, low: int, high: int, *, step: int = 1, log: bool = False
    ) -> int:
        """A whole number in [low, high]."""


@dataclass(frozen=True)
class Fixed:
    """A hyperparameter with one value."""

    value: Any

    def suggest(self, trial: Suggester, name: str) -> Any:
        """The value; the trial is not asked."""
        return self.value

    def default(self, preferred: Any) -> None:
        """Nothing to preset."""

    def settled(self, preferred: Any) -> Any:
        """The value itself."""
        return self.value

    def grid(self) -> list[Any]:
        """Nothing to enumerate."""
        return []

    def size(self) -> int:
        """One value."""
        return 1

    def __str__(self) -> str:
        return shown(self.value)


@dataclass(frozen=True)
class Choice:
    """A hyperparameter that takes one of several values."""

    values: tuple[Any, ...]

    def _labels(self) -> tuple[Value, ...]:
        """The values as Optuna stores them: lists and tables as JSON text."""
        simple = (bool, int, float, str, type(None))
        return tuple(v if isinstance(v, simple) else json.dumps(v) for v in self.values)

    def suggest(self, trial: Suggester, name: str) -> Any:
        """The value the trial chooses."""
        labels = self._labels()
        return self.values[labels.index(trial.suggest_categorical(name, labels))]

    def default(self, preferred: Any) -> Value:
        """The component's own default where it is among the values, else the first."""
        return self._labels()[self._place(preferred)]

    def settled(self, preferred: Any) -> Any:
        """As ``default``, but the value as the component takes it."""
        return self.values[self._place(preferred)]

    def _place(self, preferred: Any) -> int:
        return self.values.index(preferred) if preferred in self.values else 0

    def grid(self) -> list[Value]:
        """All values."""
        return list(self._labels())

    def size(self) -> int:
        """Number of values."""
        return len(self.values)

    def __str__(self) -> str:
        return "one of " + ", ".join(map(shown, self.values))


@dataclass(frozen=True)
class Range:
    """A number between ``low`` and ``high``, both included."""

    low: float
    high: float
    log: bool
    step: float | None
    whole: bool

    def suggest(self, trial: Suggester, name: str) -> float:
        """The number the trial chooses."""
        if self.whole:
            step = int(self.step or 1)
            return trial.suggest_int(name, int(self.low), int(self.high), step=step, log=self.log)
        return trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log)

    def default(self, preferred: Any) -> float:
        """The component's own default moved into the range, else the (geometric) middle."""
        if isinstance(preferred, int | float) and not isinstance(preferred, bool):
            value = min(max(preferred, self.low), self.high)
        elif self.log:
            value = math.sqrt(self.low * self.high)
        else:
            value = (self.low + self.high) / 2
        if self.step is not None:
            value = self._at(min(round((value - self.low) / self.step), self.size() - 1))
        return round(value) if self.whole else float(value)

    def settled(self, preferred: Any) -> float:
        """As ``default``."""
        return self.default(preferred)

    def grid(self) -> list[float]:
        """All values of a range with a step; whole numbers have step 1.

        Raises:
            StudyFileError: The range has no step, so it has no finite grid.
        """
        return [self._at(i) for i in range(self.size())]

    def size(self) -> int:
        """Number of values of the grid; raises as ``grid`` does."""
        step = self.step or (1 if self.whole else None)
        if step is None:
            raise StudyFileError("a grid needs a list of values, or a range with a step")
        return int((_decimal(self.high) - _decimal(self.low)) / _decimal(step)) + 1

    def _at(self, index: int) -> float:
        """Value ``index`` steps above ``low``, without the rounding of repeated addition."""
        value = _decimal(self.low) + index * _decimal(self.step or 1)
        return int(value) if self.whole else float(value)

    def __str__(self) -> str:
        extra = (", log" if self.log else "") + (f", step {self.step:.12g}" if self.step else "")
        return f"{self.low:.12g} to {self.high:.12g}{extra}"


Entry = Fixed | Choice | Range


def parse_entry(cls: type[Any], key: str, value: Any, where: str) -> Entry:
    """Read what a study file gives for one hyperparameter of component ``cls``.

    A table with ``low`` and ``high`` is a range, a list is a choice (unless the hyperparameter
    is itself a list), anything else is fixed. Whether a range is of whole numbers follows the
    component's annotation.

    Raises:
        StudyFileError: The key is unknown or a value does not fit its annotation.
    """
    known = [field.name for field in fields(cls)]
    if key not in known:
        raise StudyFileError(f"{where}.{key}: unknown key{close_match(key, known)}")
    hint = typing.get_type_hints(cls, include_extras=True)[key]
    if isinstance(value, Mapping):
        return _parse_range(hint, value, f"{where}.{key}")
    if isinstance(value, list) and (not _is_list(hint) or any(isinstance(v, list) for v in value)):
        return _parse_choice(hint, value, f"{where}.{key}")
    return Fixed(plain(checked(hint, value, f"{where}.{key}")))


def _parse_choice(hint: Any, items: list[Any], where: str) -> Entry:
    if not items:
        raise StudyFileError(f"{where} = []: an empty list offers no choice; give it values")
    values = [plain(checked(hint, item, f"{where}[{i}]")) for i, item in enumerate(items)]
    twice = [value for i, value in enumerate(values) if value in values[:i]]
    if twice:
        raise StudyFileError(f"{where} = {shown(items)}: {shown(twice[0])} stands twice")
    return Choice(tuple(values)) if len(values) > 1 else Fixed(values[0])


def _parse_range(hint: Any, table: Mapping[str, Any], where: str) -> Entry:
    kinds = set(_alternatives(hint))
    if not kinds <= {int, float}:
        raise StudyFileError(
            f"{where} = {shown(table)}: only numbers have ranges; give a value or a list of values"
        )
    for key in table:
        if key not in RANGE_KEYS:
            raise StudyFileError(f"{where}.{key}: unknown key{close_match(key, RANGE_KEYS)}")
    for end in ("low", "high"):
        if end not in table:
            raise StudyFileError(f"{where}: a range needs low and high; {end} is missing")
    low, high = (checked(hint, table[end], f"{where}.{end}") for end in ("low", "high"))
    log = checked(bool, table.get("log", False), f"{where}.log")
    step = table.get("step")
    whole = kinds == {int}
    if step is not None:
        step = checked(int if whole else float, step, f"{where}.step")
    _check_range(low, high, log, step, where)
    return Fixed(low) if low == high else Range(low, high, log, step, whole)


def _check_range(low: float, high: float, log: bool, step: float | None, where: str) -> None:
    if low > high:
        raise StudyFileError(f"{where}: low = {low:.12g} is above high = {high:.12g}")
    if isinstance(high, int) and high > LARGEST_WHOLE:
        raise StudyFileError(f"{where}.high = {shown(high)}: must be at most {LARGEST_WHOLE}")
    if log and low <= 0:
        raise StudyFileError(f"{where}.low = {low:.12g}: must be above 0 when log = true")
    if log and step is not None:
        raise StudyFileError(f"{where}: log = true and a step exclude each other; leave one out")
    if step is None or low == high:
        return
    if not 0 < step <= high - low:
        raise StudyFileError(
            f"{where}.step = {step:.12g}: must be above 0 and at most high - low = "
            f"{high - low:.12g}"
        )
    if (high - low) / step > LARGEST_WHOLE:
        raise StudyFileError(f"{where}.step = {step:.12g}: is too small to count the steps")
    over = (_decimal(high) - _decimal(low)) % _decimal(step)
    if over:
        raise StudyFileError(
            f"{where}: steps of {step:.12g} from low = {low:.12g} do not meet high = {high:.12g}; "
            f"write high = {_decimal(high) - over:.12g}, or take another step"
        )


def plain(value: Any) -> Any:
    """A hyperparameter's value as TOML has it: a list for a tuple."""
    return list(value) if isinstance(value, tuple) else value


def _decimal(value: float) -> Decimal:
    return Decimal(str(value))


def _is_list(hint: Any) -> bool:
    """Whether the values of a hyperparameter are lists themselves."""
    return any(typing.get_origin(kind) is tuple for kind in _alternatives(hint))


def _alternatives(hint: Any) -> Iterator[Any]:
    """The types a value may have, whatever wraps the annotation; None is left out."""
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        yield from _alternatives(typing.get_args(hint)[0])
    elif origin in (typing.Union, types.UnionType):
        for kind in typing.get_args(hint):
            yield from _alternatives(kind)
    elif hint is not type(None):
        yield hint
