"""The study file: parse it, check it, and say what is wrong and where."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tuner.entries import Fixed
from tuner.errors import StudyFileError, shown, unknown_name
from tuner.ladder import Ladder, Rung, space_at
from tuner.metrics import METRICS
from tuner.recipe import PARTS, parse_part, plain, read_text, read_toml
from tuner.registry import checked
from tuner.sections import Budget, Objective, Search
from tuner.space import Space, parse_space

LARGEST_GRID = 10_000
LONGEST_NAME = 100


SECTIONS: dict[str, type[Any]] = {
    "objective": Objective,
    "budget": Budget,
    "ladder": Ladder,
    "search": Search,
}
PROGRESSIVE = ("cross_entropy", "weighted_cross_entropy", "asymmetric", "weighted_asymmetric")


@dataclass(frozen=True)
class StudyFile:
    """A study file that was read and found right; ``text`` is the file as it stands."""

    name: str
    data: Any
    objective: Objective
    budget: Budget
    ladder: Ladder
    search: Search
    space: Space
    text: str

    def digest(self) -> str:
        """Hash of everything that changes results; how many trials there are may change."""
        import tomllib

        values = tomllib.loads(self.text)
        for key in ("trials", "gpu_hours", "hours", "target", "plateau"):
            values.get("budget", {}).pop(key, None)
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    def trials(self) -> int:
        """Number of trials of the last rung; for a grid, the grid's size when not given."""
        if self.budget.trials is not None:
            return self.budget.trials
        return len(self.grid) + 1

    def all_trials(self) -> int:
        """Number of trials of all rungs."""
        ladder, budget = self.ladder, self.trials()
        apart = ladder.last != "full"
        return sum(ladder.trials(rung, budget) for rung in ladder.rungs) + apart

    def space_at(self, rung: Rung) -> Space:
        """What a rung searches."""
        if rung not in self._spaces:
            self._spaces[rung] = space_at(self.space, self.ladder, rung)
        return self._spaces[rung]

    @cached_property
    def baseline_is_default(self) -> bool:
        """Whether the baseline is what cross-entropy is with its published default.

        It is not where the space has no natural sampling, say, or smooths labels in any case.
        """
        from optuna.trial import FixedTrial

        default = self.space.held(PARTS).suggest(FixedTrial({}))
        offered = "cross_entropy" in self.space.parts["loss"]
        return offered and plain(default).digest() == default.digest()

    @cached_property
    def _spaces(self) -> dict[Rung, Space]:
        return {}

    @cached_property
    def grid(self) -> list[dict[str, Any]]:
        """Grid points as Optuna parameters, equivalent recipes only once.

        Raises:
            StudyFileError: A range in the space has no step.
        """
        return distinct_grid(self.space)


def load(path: Path) -> StudyFile:
    """Read the study file at ``path``.

    Raises:
        StudyFileError: Anything in it is wrong; the text names the file, the key, the value
            and what would be right.
    """
    return parse(read_toml(path), read_text(path), where=str(path))


def parse(values: Mapping[str, Any], text: str, *, where: str) -> StudyFile:
    """Check the values of a study file and build what they describe; see ``load``."""
    _check_keys(values, where)
    sections = {name: _section(name, values.get(name, {}), where) for name in SECTIONS}
    budget, search = sections["budget"], sections["search"]
    fixed = {part: values[part] for part in PARTS if part in values}
    tables = values.get("space", {})
    if not isinstance(tables, Mapping):
        raise StudyFileError(
            f"{where}: space = {shown(tables)}: must hold tables, [space.<part>.<name>]"
        )
    space = parse_space(tables, fixed, epochs=budget.epochs, seed=search.seed, where=where)
    study = StudyFile(
        name=values["name"],
        data=parse_part("data", values.get("data"), where=where),
        space=space,
        text=text,
        **sections,
    )
    _check_together(study, where)
    return study


def _check_keys(values: Mapping[str, Any], where: str) -> None:
    known = {"name", "space", *PARTS, *SECTIONS}
    for key in values:
        if key not in known:
            raise StudyFileError(f"{where}: {unknown_name('key', key, known)}")
    if "name" not in values:
        raise StudyFileError(f'{where}: name is missing; add name = "..." as the first line')
    _check_name(values["name"], where)


def _check_name(name: Any, where: str) -> None:
    """A study's name is a folder's name and an argument of commands too."""
    fits = isinstance(name, str) and name.isprintable() and 0 < len(name) <= LONGEST_NAME
    if not fits or name != name.strip() or name[0] in ".-" or set(name) & set("/\\"):
        raise StudyFileError(
            f"{where}: name = {shown(name)}: must be a text of at most {LONGEST_NAME} characters "
            "without slashes, line breaks or spaces around it, and not begin with . or -"
        )
    if name.endswith(".toml"):
        raise StudyFileError(
            f"{where}: name = {shown(name)}: must not end in .toml, as only study files do"
        )


def _section(name: str, values: Any, where: str) -> Any:
    if not isinstance(values, Mapping):
        raise StudyFileError(f"{where}: {name} = {shown(values)}: must be a table, [{name}]")
    return checked(SECTIONS[name], dict(values), f"{where}: {name}")


def _check_together(study: StudyFile, where: str) -> None:
    """What only the sections together can tell."""
    objective, search, space = study.objective, study.search, study.space
    metrics = [("objective.metric", objective.metric)]
    if objective.floor:
        metrics.append(("objective.floor.metric", objective.floor.metric))
    for key, metric in metrics:
        if metric not in METRICS:
            raise StudyFileError(f"{where}: {key}: {unknown_name('metric', metric, METRICS)}")
    if study.budget.trials is None and search.algorithm != "grid":
        raise StudyFileError(
            f'{where}: budget.trials is missing; only a grid (search.algorithm = "grid") knows '
            "its own size"
        )
    if study.ladder.searched != ("full",):
        _check_ladder(study, where)
    if study.ladder.confirms:
        _check_goals(study, where)
    if search.algorithm == "grid":
        _check_grid(study, where)
    if not space.rows() and (study.budget.trials or 2) > 2:
        raise StudyFileError(
            f"{where}: [space] searches nothing; give a hyperparameter in it a list of values or "
            "a range { low = ..., high = ... }, or a part several components"
        )
    if search.strategy == "progressive":
        _check_progressive(study, where)


def _check_goals(study: StudyFile, where: str) -> None:
    for key in ("target", "plateau"):
        value = getattr(study.budget, key)
        if value is not None:
            raise StudyFileError(
                f"{where}: budget.{key} = {value} ends the study at once, before the confirm rung "
                f"trained anything again; leave out budget.{key}, or confirm in ladder.rungs"
            )


def _check_grid(study: StudyFile, where: str) -> None:
    try:
        combinations = study.space.grid_size()
    except StudyFileError as error:
        raise StudyFileError(f"{where}: {error}") from None
    if combinations > LARGEST_GRID:
        raise StudyFileError(
            f"{where}: the grid has {combinations} points, more than {LARGEST_GRID}; use larger "
            "steps or fewer values, or another search.algorithm"
        )
    size = len(study.grid)
    if study.budget.trials is not None and study.budget.trials < size + 1:
        raise StudyFileError(
            f"{where}: budget.trials = {study.budget.trials} is too small for a grid of {size} "
            f"and the cross-entropy baseline; leave it out or give at least {size + 1}"
        )


def _check_progressive(study: StudyFile, where: str) -> None:
    missing = [loss for loss in PROGRESSIVE if loss not in study.space.parts["loss"]]
    if missing:
        raise StudyFileError(
            f"{where}: the progressive strategy climbs {', '.join(PROGRESSIVE)}; "
            f"add [space.loss.{missing[0]}]"
        )
    if "class_aware" not in study.space.parts["sampler"]:
        raise StudyFileError(
            f"{where}: the last rung of the progressive strategy oversamples; "
            "add [space.sampler.class_aware] (and [space.sampler.natural] for the others)"
        )


def _check_ladder(study: StudyFile, where: str) -> None:
    search, rungs = study.search, study.ladder.rungs
    for key, value in (("algorithm", "grid"), ("strategy", "progressive")):
        if getattr(search, key) == value:
            raise StudyFileError(
                f'{where}: search.{key} = "{value}" decides which trials there are, so there is '
                "nothing to climb; leave out [ladder], or choose another"
            )
    _check_backbone(study, where)
    for rung in rungs:
        if rung != "full" and not study.space_at(rung).rows():
            raise StudyFileError(
                f"{where}: ladder.rungs: {rung} searches loss and sampler only, and [space] leaves "
                "neither open; add [space.loss.<name>] tables, or leave the rung out"
            )


def _check_backbone(study: StudyFile, where: str) -> None:
    if "head" not in study.ladder.rungs or study.ladder.head.backbone == "baseline":
        return
    name, entries = next(iter(study.space_at("head").parts["model"].items()))
    if entries.get("weights_file", Fixed(None)).settled(None) is None:
        raise StudyFileError(
            f'{where}: ladder.head.backbone = "initial": needs weights, but {name} is as it was '
            "initialised; give the model a weights_file, such as the model.safetensors of tuner "
            'export, or take "baseline", the network of the plain cross-entropy trial'
        )


def distinct_grid(space: Space) -> list[dict[str, Any]]:
    """Grid points of a space as Optuna parameters, equivalent recipes only once.

    Raises:
        StudyFileError: A range in the space has no step.
    """
    from optuna.trial import FixedTrial

    seen: dict[str, dict[str, Any]] = {}
    for params in space.grid():
        seen.setdefault(space.suggest(FixedTrial(params)).digest(), params)
    return list(seen.values())
