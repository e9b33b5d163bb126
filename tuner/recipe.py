"""One trial's resolved choice: what is trained, on what and how; frozen, TOML both ways."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import tomli_w
from pydantic import Field
from torch import Tensor

from tuner.augment import AUGMENTS
from tuner.datasets import DATASETS
from tuner.errors import StudyFileError, shown, unknown_name
from tuner.imbalance import Groups, total_correction
from tuner.losses import LOSSES
from tuner.models import MODELS
from tuner.optim import OPTIMIZERS
from tuner.registry import Registry, adapter_of, checked
from tuner.samplers import SAMPLERS
from tuner.schedules import SCHEDULES
from tuner.training import TRAININGS, Deferred, steps_per_epoch

PARTS: dict[str, Registry[Any]] = {
    "data": DATASETS,
    "model": MODELS,
    "loss": LOSSES,
    "sampler": SAMPLERS,
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "augment": AUGMENTS,
    "training": TRAININGS,
}
DEFAULTS = {
    "loss": "cross_entropy",
    "sampler": "natural",
    "optimizer": "sgd",
    "schedule": "cosine",
    "augment": "none",
    "training": "single_stage",
}
EPOCHS, SEED = Annotated[int, Field(ge=1)], Annotated[int, Field(ge=0)]
SOME_CLASSES = 10
"""A head bias follows from the number of classes: at one number it tells two rules apart."""


@dataclass(frozen=True)
class Recipe:
    """The fully resolved choice of one trial; every part is a registered component."""

    data: Any
    model: Any
    loss: Any
    sampler: Any
    optimizer: Any
    schedule: Any
    augment: Any
    training: Any
    epochs: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values: ``epochs``, ``seed`` and one table with a ``name`` per part."""
        tables = {part: dump_component(part, getattr(self, part)) for part in PARTS}
        return {"epochs": self.epochs, "seed": self.seed, **tables}

    def to_toml(self) -> str:
        """The recipe as TOML text; ``Recipe.from_dict(tomllib.loads(text))`` reads it back."""
        return tomli_w.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
        """Build a recipe from plain values; parts other than data and model have defaults.

        Raises:
            StudyFileError: A part, key or value is unknown, missing or out of bounds.
        """
        known = {*PARTS, "epochs", "seed"}
        for key in values:
            if key not in known:
                raise StudyFileError(f"{where}: {unknown_name('key', key, known)}")
        parts = {part: parse_part(part, values.get(part), where=where) for part in PARTS}
        if "epochs" not in values:
            raise StudyFileError(f"{where}: epochs is missing; add it at the top, as epochs = 60")
        epochs = checked(EPOCHS, values["epochs"], f"{where}: epochs")
        seed = checked(SEED, values.get("seed", 0), f"{where}: seed")
        return cls(**parts, epochs=epochs, seed=seed)

    def canonical(self) -> Recipe:
        """The simplest recipe that trains to the same numbers (same digest = same training)."""
        simpler = {
            part: getattr(self, part).canonical()
            for part in PARTS
            if hasattr(getattr(self, part), "canonical")
        }
        simple = replace(self, **simpler)
        return replace(simple, training=simple.training.canonical_for(simple.loss, simple.sampler))

    def digest(self) -> str:
        """Hash of the canonical recipe, 16 hex digits; equal for equivalent recipes."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        return _hash(self.canonical().to_dict())

    def steps(self, images: int) -> int:
        """The budget in optimizer steps, for a training part of so many images."""
        return self.epochs * steps_per_epoch(images, self.training.batch_size)

    def switch_epoch(self) -> int:
        """First epoch of the last stage; 0 when there is one stage, ``epochs`` if it never comes.

        A switch within an epoch acts from the next one on.
        """
        begin = self.training.stage_start()
        return next((e for e in range(self.epochs) if e / self.epochs >= begin), self.epochs)

    def stage_one_key(self) -> str | None:
        """Hash of all that acts before the switch of a deferred training; None for any other.

        Recipes with one key are the same training up to their switch, bit for bit.
        """
        if not isinstance(self.training, Deferred):
            return None
        loss, sampler = self.training.losses(self.loss)[0], self.training.samplers(self.sampler)[0]
        acts = replace(self, loss=loss, sampler=sampler).canonical().to_dict()
        head = [self.loss.head, self.loss.output_scale(), self.loss.head_bias(SOME_CLASSES)]
        return _hash({**acts, "head": head, "switch_epoch": self.switch_epoch()})

    def origin(self) -> dict[str, str]:
        """What snapshots of this training are known by."""
        key = self.stage_one_key()
        return {"recipe": self.digest()} | ({"stage_one": key} if key else {})

    def refusal(self, snapshot: Mapping[str, Any]) -> str | None:
        """Why a snapshot with these facts is nothing to go on from; None if it is.

        One of the same recipe is, and one of the stage that this recipe shares with another.
        """
        own = self.origin()
        if snapshot["recipe"] == own["recipe"]:
            return None
        if "stage_one" not in own or "stage_one" not in snapshot:
            return "the snapshot belongs to another recipe"
        if snapshot["stage_one"] != own["stage_one"]:
            return (
                "the snapshot belongs to another recipe, which differs before the switch: its "
                f"stage one is {snapshot['stage_one']}, this one's {own['stage_one']}"
            )
        if snapshot["stage"] > 0:
            return (
                "the snapshot belongs to another recipe and was taken after its switch: both are "
                f"the same only before epoch {self.switch_epoch()}"
            )
        return None

    def correction(self, class_counts: Tensor, groups: Groups) -> float:
        """Total correction κ = s + w of sampler and loss, before any post-hoc adjustment."""
        sampler = self.training.samplers(self.sampler)[-1]
        return total_correction(
            sampler.exponent_share(class_counts, groups),
            self.loss.weight_exponent(class_counts),
            0.0,
        )

    def last_start(self) -> float:
        """Progress from which every deferred part acts, in [0, 1); 0 where nothing waits."""
        acting = self.canonical()
        starts = [getattr(part, "start", 0.0) for part in (acting.loss, acting.sampler)]
        return float(max(acting.training.stage_start(), *starts))

    def settled(self) -> float:
        """Progress from which warm-up is over and every deferred part acts, in [0, 1)."""
        warm = self.schedule.warmup_end(self.epochs)
        if self.training.restart_schedule:
            begin = self.training.stage_start()
            rest = max(1, round((1 - begin) * self.epochs))
            warm = begin + (1 - begin) * self.schedule.warmup_end(rest)
        return float(max(warm, self.last_start()))


def _hash(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def plain(recipe: Recipe) -> Recipe:
    """The same training with plain cross-entropy and natural sampling in one stage."""
    training = TRAININGS["single_stage"](
        batch_size=recipe.training.batch_size,
        precision=recipe.training.precision,
        layout=recipe.training.layout,
    )
    loss, sampler = LOSSES["cross_entropy"](), SAMPLERS["natural"]()
    return replace(recipe, loss=loss, sampler=sampler, training=training)


def parse_part(part: str, values: Mapping[str, Any] | None, *, where: str) -> Any:
    """Component of one part from its table, ``name`` included; None takes the default.

    Raises:
        StudyFileError: The table has no name and no default, or does not validate.
    """
    if values is None:
        if part not in DEFAULTS:
            raise StudyFileError(
                f"{where}: [{part}] is missing; add [{part}] with a name, one of: "
                + ", ".join(sorted(PARTS[part]))
            )
        return PARTS[part][DEFAULTS[part]]()
    if not isinstance(values, Mapping):
        raise StudyFileError(
            f"{where}: {part} = {shown(values)}: must be a table; write [{part}] with a name"
        )
    rest = dict(values)
    name = rest.pop("name", DEFAULTS.get(part))
    if not isinstance(name, str):
        wrong = f"[{part}] has no name" if name is None else f"{part}.name = {shown(name)}"
        known = ", ".join(sorted(PARTS[part]))
        raise StudyFileError(f"{where}: {wrong}; give one name in quotes, of: {known}")
    try:
        return PARTS[part].parse(name, rest, where=f"{where}: {part}")
    except StudyFileError as error:
        unnamed = "" if "name" in values else f" ([{part}] has no name, so it is {name})"
        raise StudyFileError(f"{error}{unnamed}") from None


def dump_component(part: str, instance: Any) -> dict[str, Any]:
    """Plain values of a component with its registered name; unset (None) keys are left out."""
    kind: Any = type(instance)
    values = adapter_of(kind).dump_python(instance, mode="json", exclude_none=True)
    return {"name": PARTS[part].name_of(instance), **values}


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file.

    Raises:
        StudyFileError: The file is missing, unreadable or no TOML; the line is named.
    """
    import tomllib

    try:
        return tomllib.loads(read_text(path))
    except RecursionError:
        raise StudyFileError(f"{path}: not valid TOML: nested too deeply") from None
    except ValueError as error:
        raise StudyFileError(f"{path}: not valid TOML: {error}") from None


def read_text(path: Path) -> str:
    """Text of a file in UTF-8, with or without a byte order mark.

    Raises:
        StudyFileError: The file is missing or cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise StudyFileError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise StudyFileError(f"{path}: is a folder; give the file in it") from None
    except UnicodeDecodeError as error:
        raise StudyFileError(
            f"{path}: not a text file in UTF-8 (byte {error.start}); save it as UTF-8"
        ) from None
    except (OSError, ValueError) as error:
        raise StudyFileError(f"{path}: cannot be read: {error}") from None
