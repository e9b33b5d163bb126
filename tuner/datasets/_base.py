"""The fields that every data set component has, and the registry of data sets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field
from torch import Tensor

from tuner.datasets._assemble import Rules, assemble
from tuner.datasets._data import Data
from tuner.datasets._profiles import ProfileField, carved_counts
from tuner.datasets._residence import RESIDENT_LIMIT
from tuner.datasets._sources import Sources
from tuner.imbalance import TailRule
from tuner.registry import Registry, component


@component
class Dataset(ABC):
    """Images with classes, a long tail to carve, and rules that divide them into parts.

    Attributes:
        profile: Long tail to carve out of what training and validation share.
        permute: Let ``seed`` choose which class takes which place in the profile.
        carve_test: Thin the test part like the training pool instead of leaving it as it is.
        tail: Which classes are head, medium and tail.
        validation_fraction: Share of each class for validation, where no such part is given.
        validation_cap: Most validation images of a class; 0 for no cap.
        test_fraction: Share of each class for testing, where no such part is given; 0 for none.
        seed: Chooses the images that are kept, and those for validation.
    """

    profile: ProfileField = None
    permute: bool = False
    carve_test: bool = False
    tail: TailRule = TailRule(bottom=0.3)
    validation_fraction: Annotated[float, Field(gt=0, le=0.5)] = 0.2
    validation_cap: Annotated[int, Field(ge=0)] = 20
    test_fraction: Annotated[float, Field(ge=0, le=0.5)] = 0.2
    seed: int = 0

    @abstractmethod
    def sources(self, folder: Path | None) -> Sources:
        """Find the samples; a relative root is looked for in ``folder``."""

    def build(self, root: Path | None = None, *, resident_limit: int = RESIDENT_LIMIT) -> Data:
        """Load, carve and divide the data.

        Args:
            root: Folder against which a relative root of the data set is resolved.
            resident_limit: Decoded bytes above which image files are mapped or streamed from disk;
                ``Data.to`` may still lay them on a GPU.

        Raises:
            DataError: Data are missing or broken, or the profile does not fit them.
        """
        rules = Rules(
            seed=self.seed,
            validation_fraction=self.validation_fraction,
            validation_cap=self.validation_cap,
            test_fraction=self.test_fraction,
            carve=self._carve,
            carve_test=self.carve_test,
            tail=self.tail,
        )
        return assemble(DATASETS.name_of(self), self.sources(root), rules, resident_limit)

    def _carve(self, available: Tensor, class_names: Sequence[str]) -> Tensor:
        if self.profile is None:
            return available
        seed = self.seed if self.permute else None
        return carved_counts(self.profile, available, class_names, permutation_seed=seed)


DATASETS: Registry[Dataset] = Registry("dataset")


def resolve(root: str, folder: Path | None) -> Path:
    """``root`` itself if it is absolute, else inside ``folder`` or the working directory."""
    return (folder or Path()) / Path(root).expanduser()
