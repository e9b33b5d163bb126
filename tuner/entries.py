"""One entry of a search space: a fixed value, a choice, or a range; read from TOML values."""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol

from pydantic import TypeAdapter, ValidationError

from tuner.errors import StudyFileError, close_match

Value = bool | int | float | str | None
RANGE_KEYS = {"low", "high", "log", "step"}


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

    def grid(self) -> list[Any]:
        """Nothing to enumerate."""
        return []

    def __str__(self) -> str:
        return f"{self.value!r}"


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
        return self._labels()[self.values.index(preferred) if preferred in self.values else 0]

    def grid(self) -> list[Value]:
        """All values."""
        return list(self._labels())

    def __str__(self) -> str:
        return "one of " + ", ".join(repr(v) for v in self.values)


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
            value = self.low + round((value - self.low) / self.step) * self.step
        return round(value) if self.whole else float(value)

    def grid(self) -> list[float]:
        """All values of a range with a step; whole numbers have step 1.

        Raises:
            StudyFileError: The range has no step, so it has no finite grid.
        """
        step = self.step or (1 if self.whole else None)
        if step is None:
            raise StudyFileError("a grid needs a list, or a range with a step")
        count = int((self.high - self.low) / step + 1e-9) + 1
        values = [self.low + i * step for i in range(count)]
        return [round(v) for v in values] if self.whole else values

    def __str__(self) -> str:
        extra = (", log" if self.log else "") + (f", step {self.step:g}" if self.step else "")
        return f"{self.low:g} to {self.high:g}{extra}"


Entry = Fixed | Choice | Range


def parse_entry(cls: type[Any], key: str, value: Any, where: str) -> Entry:
    """Read what a study file gives for one hyperparameter of component ``cls``.

    A table with ``low`` and ``high`` is a range, a list is a choice (unless the hyperparameter
    is itself a list), anything else is fixed. Whether a range is of whole numbers follows the
    component's annotation.

    Raises:
        StudyFileError: The key is unknown or a value does not fit its annotation.
    """
    types_ = typing.get_type_hints(cls, include_extras=True)
    known = [field.name for field in fields(cls)]
    if key not in known:
        raise StudyFileError(f"{where}.{key}: unknown key{close_match(key, known)}")
    adapter = TypeAdapter(types_[key])
    if isinstance(value, Mapping) and {"low", "high"} & set(value):
        return _parse_range(types_[key], adapter, value, f"{where}.{key}")
    if isinstance(value, list) and not _fits(adapter, value):
        if not value:
            raise StudyFileError(f"{where}.{key}: an empty list offers no choice")
        for item in value:
            _check(adapter, item, f"{where}.{key}")
        if len(set(map(json.dumps, value))) < len(value):
            raise StudyFileError(f"{where}.{key} = {value!r}: a value stands twice")
        return Choice(tuple(value)) if len(value) > 1 else Fixed(value[0])
    _check(adapter, value, f"{where}.{key}")
    return Fixed(value)


def _parse_range(hint: Any, adapter: TypeAdapter[Any], value: Any, where: str) -> Entry:
    unknown = set(value) - RANGE_KEYS
    if unknown:
        name = sorted(unknown)[0]
        raise StudyFileError(f"{where}.{name}: unknown key{close_match(name, RANGE_KEYS)}")
    for end in ("low", "high"):
        if end not in value:
            raise StudyFileError(f"{where}: a range needs low and high; {end} is missing")
        if isinstance(value[end], bool) or not isinstance(value[end], int | float):
            raise StudyFileError(f"{where}.{end} = {value[end]!r}: must be a number")
        if not math.isfinite(value[end]):
            raise StudyFileError(f"{where}.{end} = {value[end]!r}: must be finite")
        _check(adapter, value[end], f"{where}.{end}")
    low, high, log, step = (value["low"], value["high"], value.get("log", False), value.get("step"))
    if not isinstance(log, bool):
        raise StudyFileError(f"{where}.log = {log!r}: must be true or false")
    if step is not None and (isinstance(step, bool) or not isinstance(step, int | float)):
        raise StudyFileError(f"{where}.step = {step!r}: must be a number")
    whole = _is_whole(hint)
    if whole and not all(float(v).is_integer() for v in (low, high, step or 1)):
        raise StudyFileError(f"{where}: low, high and step must be whole numbers")
    if low > high:
        raise StudyFileError(f"{where}: low = {low!r} is above high = {high!r}")
    if log and (low <= 0 or step is not None):
        raise StudyFileError(f"{where}: log = true needs low > 0 and no step")
    if step is not None and not 0 < step <= high - low:
        raise StudyFileError(f"{where}.step = {step!r}: must be above 0 and fit between low, high")
    if low == high:
        return Fixed(low)
    return Range(low, high, log, step, whole)


def _check(adapter: TypeAdapter[Any], value: Any, where: str) -> None:
    try:
        adapter.validate_python(value)
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        raise StudyFileError(f"{where} = {value!r}: {message[0].lower()}{message[1:]}") from None


def _fits(adapter: TypeAdapter[Any], value: Any) -> bool:
    try:
        adapter.validate_python(value)
    except ValidationError:
        return False
    return True


def _is_whole(hint: Any) -> bool:
    """Whether a hyperparameter is a whole number, whatever wraps its annotation."""
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        return _is_whole(typing.get_args(hint)[0])
    if origin in (typing.Union, types.UnionType):
        kinds = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        return all(_is_whole(kind) for kind in kinds)
    return hint is int
