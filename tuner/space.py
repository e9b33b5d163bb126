"""Ranges of a study file → a recipe, by asking a trial; the only bridge between the two."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

from pydantic.fields import FieldInfo

from tuner.entries import Choice, Entry, Fixed, Range, Suggester, parse_entry, plain
from tuner.errors import StudyFileError, shown, unknown_name
from tuner.recipe import DEFAULTS, PARTS, Recipe, dump_component, parse_part
from tuner.training import steps_per_epoch

Branches = dict[str, dict[str, Entry]]


@dataclass(frozen=True)
class Space:
    """What a study searches: for every part its possible components and their entries."""

    parts: dict[str, Branches]
    epochs: int
    seed: int

    def suggest(self, trial: Suggester) -> Recipe:
        """Ask ``trial`` for every open choice and build the recipe."""
        chosen = {part: self._suggest_part(trial, part) for part in PARTS}
        values = {"epochs": self.epochs, "seed": self.seed, **chosen}
        return Recipe.from_dict(values, where="space")

    def _suggest_part(self, trial: Suggester, part: str) -> dict[str, Any]:
        branches = self.parts[part]
        names = list(branches)
        name = trial.suggest_categorical(part, names) if len(names) > 1 else names[0]
        prefix = f"{part}.{name}"
        entries = branches[name].items()
        return {"name": name, **{k: e.suggest(trial, f"{prefix}.{k}") for k, e in entries}}

    def defaults(self, **names: str) -> dict[str, Any]:
        """Optuna parameters of the published defaults, with the given component per part.

        Parts that are not named take the plain component (natural sampling, one stage, …)
        where the space offers it, else their first one.
        """
        params: dict[str, Any] = {}
        for part, branches in self.parts.items():
            name = names.get(part) or _plain(part, branches)
            if len(branches) > 1:
                params[part] = name
            for key, entry in branches[name].items():
                value = entry.default(default_of(PARTS[part][name], key))
                if value is not None:
                    params[f"{part}.{name}.{key}"] = value
        return params

    def held(self, parts: Collection[str]) -> Space:
        """The same space with these parts held fixed at their published defaults."""
        return replace(
            self, parts={p: self._held(p) if p in parts else b for p, b in self.parts.items()}
        )

    def _held(self, part: str) -> Branches:
        name = _plain(part, self.parts[part])
        entries = self.parts[part][name].items()
        cls = PARTS[part][name]
        return {name: {k: Fixed(e.settled(default_of(cls, k))) for k, e in entries}}

    def variants(self, part: str) -> Iterator[dict[str, Any]]:
        """The defaults with every component of a part, and with every choice inside it.

        One choice is changed at a time: enough to try each named thing once.
        """
        for name, entries in self.parts[part].items():
            params = self.defaults(**{part: name})
            yield params
            for key, entry in entries.items():
                if isinstance(entry, Choice):
                    path = f"{part}.{name}.{key}"
                    yield from ({**params, path: v} for v in entry.grid() if v != params[path])

    def within(self, path: str, value: float) -> Any:
        """The allowed value of a searched number that is nearest to ``value``."""
        part, name, key = path.split(".", 2)
        return self.parts[part][name][key].default(value)

    def grid(self) -> Iterator[dict[str, Any]]:
        """Every combination of the open choices, branch by branch, as Optuna parameters.

        Raises:
            StudyFileError: A range has no step.
        """
        per_part = [list(self._part_grid(part)) for part in self.parts]
        for combination in itertools.product(*per_part):
            yield {k: v for params in combination for k, v in params.items()}

    def _part_grid(self, part: str) -> Iterator[dict[str, Any]]:
        for name, entries in self.parts[part].items():
            own = {part: name} if len(self.parts[part]) > 1 else {}
            axes = {f"{part}.{name}.{k}": e for k, e in entries.items() if not isinstance(e, Fixed)}
            for values in itertools.product(*(entry.grid() for entry in axes.values())):
                yield {**own, **dict(zip(axes, values, strict=True))}

    def grid_size(self) -> int:
        """Number of combinations that ``grid`` yields, without making them.

        Raises:
            StudyFileError: A range has no step; the hyperparameter is named.
        """
        return math.prod(
            sum(math.prod(_axis_sizes(f"space.{part}.{name}", e)) for name, e in branches.items())
            for part, branches in self.parts.items()
        )

    def steps(self, images: int) -> tuple[int, int]:
        """Fewest and most optimizer steps of a trial, for a training part of so many images."""
        each = [self.epochs * steps_per_epoch(images, size) for size in self._batch_sizes()]
        return min(each), max(each)

    def _batch_sizes(self) -> Iterator[int]:
        for name, entries in self.parts["training"].items():
            match entries.get("batch_size"):
                case Fixed(value):
                    yield value
                case Choice(values):
                    yield from values
                case Range(low=low, high=high):
                    yield from (int(low), int(high))
                case None:
                    yield default_of(PARTS["training"][name], "batch_size")

    def rows(self) -> list[tuple[str, str]]:
        """The searched hyperparameters as (name, what it ranges over), for people."""
        rows = []
        for part, branches in self.parts.items():
            if len(branches) > 1:
                rows.append((part, "one of " + ", ".join(branches)))
            for name, entries in branches.items():
                open_ = ((k, e) for k, e in entries.items() if not isinstance(e, Fixed))
                rows += [(f"{part}.{name}.{key}", str(entry)) for key, entry in open_]
        return rows


def _plain(part: str, branches: Branches) -> str:
    return DEFAULTS[part] if DEFAULTS.get(part) in branches else next(iter(branches))


def _axis_sizes(place: str, entries: dict[str, Entry]) -> Iterator[int]:
    for key, entry in entries.items():
        try:
            yield entry.size()
        except StudyFileError as error:
            raise StudyFileError(f"{place}.{key}: {error}") from None


def default_of(cls: type[Any], key: str) -> Any:
    """Default of a component's hyperparameter; None when it has none.

    Where the field is None by default and stands for a number, the component says which
    under ``published``.
    """
    if key in getattr(cls, "published", {}):
        return cls.published[key]
    for field in fields(cls):
        if field.name == key:
            default = field.default
            if isinstance(default, FieldInfo):
                default = default.default
            return None if default is MISSING else plain(default)
    return None


def parse_space(
    tables: Mapping[str, Any], fixed: Mapping[str, Any], *, epochs: int, seed: int, where: str
) -> Space:
    """Read ``[space.<part>.<name>]`` tables, and the fixed parts beside them.

    Raises:
        StudyFileError: A part, component or key is unknown, a part is given twice, or a value
            does not fit its hyperparameter.
    """
    if "data" in tables:
        raise StudyFileError(
            f"{where}: [space.data] cannot be searched; all trials of a study share [data]"
        )
    for part in tables:
        if part not in PARTS:
            known = [p for p in PARTS if p != "data"]
            raise StudyFileError(f"{where}: {unknown_name('part', part, known)}")
        if part in fixed:
            raise StudyFileError(
                f"{where}: [{part}] and [space.{part}] are both given; keep one of them"
            )
    parts = {}
    for part in PARTS:
        if part in tables:
            parts[part] = _parse_branches(part, tables[part], f"{where}: space.{part}")
        else:
            values = dump_component(part, _parse_fixed(part, fixed.get(part), where))
            name = values.pop("name")
            parts[part] = {name: {key: Fixed(value) for key, value in values.items()}}
    return Space(parts, epochs, seed)


def _parse_fixed(part: str, values: Any, where: str) -> Any:
    try:
        return parse_part(part, values, where=where)
    except StudyFileError as error:
        given = values.values() if isinstance(values, Mapping) and part != "data" else ()
        if not any(isinstance(value, list | Mapping) for value in given):
            raise
        raise StudyFileError(
            f"{error}; to search lists and ranges, write [space.{part}.<name>] instead of [{part}]"
        ) from None


def _parse_branches(part: str, tables: Any, where: str) -> Branches:
    if not isinstance(tables, Mapping) or not tables:
        raise StudyFileError(
            f"{where} = {shown(tables)}: must hold a table per component, [space.{part}.<name>]"
        )
    branches: Branches = {}
    for name, entries in tables.items():
        if not isinstance(entries, Mapping):
            raise StudyFileError(
                f"{where}.{name} = {shown(entries)}: must be a table; write [space.{part}.<name>] "
                f"with the component's name, or [{part}] for a fixed one"
            )
        if name not in PARTS[part]:
            raise StudyFileError(f"{where}: {PARTS[part].unknown(name)}")
        cls = PARTS[part][name]
        branches[name] = {k: parse_entry(cls, k, v, f"{where}.{name}") for k, v in entries.items()}
        _check_together(part, name, branches[name], where)
    return branches


def _check_together(part: str, name: str, entries: dict[str, Entry], where: str) -> None:
    """Build the component once, so that keys that exclude each other are found now."""
    default = {
        key: entry.value
        if isinstance(entry, Fixed)
        else (entry.values[0] if isinstance(entry, Choice) else entry.default(None))
        for key, entry in entries.items()
    }
    PARTS[part].parse(name, default, where=f"{where}.{name}")
