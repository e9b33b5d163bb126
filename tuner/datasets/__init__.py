"""Data sets by name, divided into parts that search may and may not see."""

from __future__ import annotations

from tuner.datasets import _arrays, _folders  # noqa: F401  (they register their data sets)
from tuner.datasets._base import DATASETS, Dataset
from tuner.datasets._data import Data, Part
from tuner.datasets._folds import fold
from tuner.datasets._images import Images, MappedImages, ResidentImages, StreamedImages
from tuner.datasets._profiles import PROFILES, Profile
from tuner.datasets._residence import RESIDENT_LIMIT, with_images
from tuner.datasets._split import validation_counts

__all__ = [
    "DATASETS",
    "PROFILES",
    "RESIDENT_LIMIT",
    "Data",
    "Dataset",
    "Images",
    "MappedImages",
    "Part",
    "Profile",
    "ResidentImages",
    "StreamedImages",
    "fold",
    "validation_counts",
    "with_images",
]
