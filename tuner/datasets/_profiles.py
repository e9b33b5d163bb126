"""Long-tail profiles: how many images each class keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, PlainSerializer, model_validator
from torch import Tensor

from tuner.errors import DataError
from tuner.registry import Registry, adapter_of, component
from tuner.seeding import generator

PositiveInt = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]


@component
class Profile(ABC):
    """Counts for the classes in a certain order, the head first.

    ``order``: ``given`` takes the classes as the data set lists them, ``size`` the largest
    first, which carves a tail out of data that are uneven already.
    """

    order: Literal["given", "size"] = "given"

    @abstractmethod
    def carve(self, available: Tensor) -> Tensor:
        """Images to keep of each class (C,) int64, out of ``available`` (C,)."""


PROFILES: Registry[Profile] = Registry("profile")


@PROFILES.register("exponential")
@component
class Exponential(Profile):
    """Counts that fall exponentially from head to tail.

    Class i of C keeps int(n_max·(1/ratio)^(i/(C-1))) images, where ``ratio`` is the imbalance
    ratio (Cui et al. 2019, section 5.1). Without ``n_max`` the head keeps all it has.
    """

    ratio: Annotated[float, Field(ge=1)]
    n_max: PositiveInt | None = None

    def carve(self, available: Tensor) -> Tensor:
        """Images to keep of each class (C,)."""
        largest = self.n_max or int(available[0])
        last = len(available) - 1
        return torch.tensor(
            [int(largest * (1 / self.ratio) ** (i / last)) for i in range(last + 1)]
        )


@component
class Step:
    """A run of classes with one ``count``, or with counts evenly spaced from high to low."""

    classes: PositiveInt
    count: PositiveInt | None = None
    low: PositiveInt | None = None
    high: PositiveInt | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Step:
        spread = (self.low, self.high)
        if (self.count is None) == (spread == (None, None)) or (spread.count(None) == 1):
            raise ValueError("give either count, or low and high")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low = {self.low} is above high = {self.high}")
        return self

    def sizes(self) -> list[int]:
        """Images of each class of this run, largest first."""
        high, low = self.high or self.count or 1, self.low or self.count or 1
        steps = max(1, self.classes - 1)
        return [round(high - (high - low) * i / steps) for i in range(self.classes)]


@PROFILES.register("step")
@component
class Steps(Profile):
    """Groups of classes, each with one count or with counts spaced evenly between two.

    ``groups = [{classes = 150, count = 500}, {classes = 50, low = 10, high = 50}]``
    """

    groups: Annotated[tuple[Step, ...], Field(min_length=1)]

    def carve(self, available: Tensor) -> Tensor:
        """Images to keep of each class (C,)."""
        return _for_every_class(
            [size for group in self.groups for size in group.sizes()], len(available)
        )


@PROFILES.register("keep")
@component
class Keep(Profile):
    """A share ``keep`` of the named classes and a share ``others`` of all the rest.

    With equally large classes the imbalance ratio is keep / others.
    """

    classes: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    keep: Share = 0.9
    others: Share = 0.1

    def carve(self, available: Tensor) -> Tensor:
        """Images to keep of each class (C,)."""
        if max(self.classes) >= len(available):
            raise DataError(
                f"data.profile.classes: there is no class {max(self.classes)}; the "
                f"{len(available)} classes are numbered from 0"
            )
        shares = torch.full((len(available),), self.others, dtype=torch.float64)
        shares[list(self.classes)] = self.keep
        return (shares * available).round().long()


@PROFILES.register("counts")
@component
class Counts(Profile):
    """An explicit count for every class."""

    counts: tuple[PositiveInt, ...]

    def carve(self, available: Tensor) -> Tensor:
        """Images to keep of each class (C,)."""
        return _for_every_class(list(self.counts), len(available))


def _for_every_class(counts: list[int], classes: int) -> Tensor:
    if len(counts) != classes:
        raise DataError(
            f"data.profile: it gives counts for {len(counts)} classes, but the data have {classes}"
        )
    return torch.tensor(counts)


def carved_counts(
    profile: Profile,
    available: Tensor,
    class_names: Sequence[str],
    *,
    permutation_seed: int | None = None,
) -> Tensor:
    """Images to keep of each class (C,), by class index.

    With a ``permutation_seed`` the classes take their places in the profile in random order.

    Raises:
        DataError: The profile does not fit: too few or too many classes, a class that would
            be left empty, or more images than a class has.
    """
    order = _class_order(profile, available, permutation_seed)
    counts = torch.empty_like(available)
    counts[order] = profile.carve(available[order])
    _refuse_misfits(profile, counts, available, class_names)
    return counts


def _refuse_misfits(
    profile: Profile, counts: Tensor, available: Tensor, class_names: Sequence[str]
) -> None:
    empty = (counts < 1).nonzero().flatten().tolist()
    if empty:
        raise DataError(
            f"data.profile: class {class_names[empty[0]]!r} would keep no image of its "
            f"{int(available[empty[0]])} (classes like this: {len(empty)}); give the tail at "
            "least 1 by a smaller ratio or a larger share"
        )
    short = (counts > available).nonzero().flatten().tolist()
    if short:
        way_out = "" if profile.order == "size" else ', or order the classes with order = "size"'
        raise DataError(
            f"data.profile: class {class_names[short[0]]!r} should keep {int(counts[short[0]])} "
            f"images, but {int(available[short[0]])} are there for training and validation "
            f"(classes like this: {len(short)}); ask for fewer{way_out}"
        )


def _class_order(profile: Profile, available: Tensor, seed: int | None) -> Tensor:
    if seed is None:
        if profile.order == "given":
            return torch.arange(len(available))
        return available.argsort(descending=True, stable=True)
    if profile.order == "size":
        raise DataError('data: permute = true and profile.order = "size" exclude each other')
    return torch.randperm(len(available), generator=generator(seed, "class order"))


def _from_table(value: Any) -> Any:
    """Turn a table with a ``name`` into the profile registered under it."""
    if not isinstance(value, dict):
        return value
    if not isinstance(value.get("name"), str):
        raise ValueError(f"give the profile a name, one of {', '.join(sorted(PROFILES))}")
    return PROFILES[value["name"]](**{key: v for key, v in value.items() if key != "name"})


def _as_table(profile: Profile | None) -> dict[str, Any] | None:
    """The table that ``_from_table`` reads back."""
    if profile is None:
        return None
    values = adapter_of(type(profile)).dump_python(profile, mode="json", exclude_none=True)
    return {"name": PROFILES.name_of(profile), **values}


ProfileField = Annotated[Profile | None, BeforeValidator(_from_table), PlainSerializer(_as_table)]
