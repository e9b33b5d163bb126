"""Data sets kept as image files in one folder per class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field

from tuner.datasets._base import DATASETS, Dataset, resolve
from tuner.datasets._decode import DECODER
from tuner.datasets._download import fetch
from tuner.datasets._passed import passed_over
from tuner.datasets._sources import FolderSource, Sources
from tuner.datasets._walk import files_below, is_special, refuse_no_text, subfolders
from tuner.errors import DataError
from tuner.registry import component

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
UNREAD_SUFFIXES = (
    ".avif",
    ".dng",
    ".heic",
    ".heif",
    ".jfif",
    ".jp2",
    ".jxl",
    ".psd",
    ".svg",
    ".tga",
)
"""Of image files that are passed over, which the user should hear of."""

PART_NAMES = {"validation": ("val", "valid", "validation"), "test": ("test",)}

ImageSize = Annotated[int, Field(ge=4, le=2048)]


@dataclass(frozen=True)
class Folder:
    """The classes of one folder: image paths relative to it, by class name.

    ``unread`` are the paths of images in formats that are not read, ``special`` those of what has
    the name of an image but is no file, ``loose`` the names of images that lie beside the class
    folders and so have no class.
    """

    root: Path
    classes: Mapping[str, list[str]]
    unread: tuple[str, ...] = ()
    special: tuple[str, ...] = ()
    loose: tuple[str, ...] = ()

    def source(self, class_names: tuple[str, ...], size: int, channels: int) -> FolderSource:
        """Samples in the order of their paths, with classes numbered by ``class_names``."""
        unknown = sorted(self.classes.keys() - set(class_names))
        if unknown:
            raise DataError(
                f"{self.root / unknown[0]}: no class of this name is in the training part; "
                "remove the folder, or put images of the class there"
            )
        indices = {name: index for index, name in enumerate(class_names)}
        samples = sorted(
            (path, indices[name]) for name, paths in self.classes.items() for path in paths
        )
        targets = torch.tensor([index for _, index in samples], dtype=torch.int64)
        return FolderSource(self.root, tuple(path for path, _ in samples), targets, size, channels)


def scan(root: Path) -> Folder:
    """Find the class folders of ``root`` and the images in them, at any depth.

    Files that are no images and names that begin with a dot are passed over; images in a
    format that is not read are noted.

    Raises:
        DataError: The folder is missing, cannot be read or has no class folders, or one of them
            has no image.
    """
    if not root.is_dir():
        raise DataError(
            f"{root}: there is no such folder; correct root under [data], or say with --data "
            "or TUNER_DATA which folder it is relative to"
        )
    folders = subfolders(root)
    if not folders:
        raise DataError(
            f"{root}: it has no class folders; put the images of each class in a folder of "
            "their own, named after the class"
        )
    refuse_no_text(root, folders)
    files = {name: sorted(files_below(root, name)) for name in folders}
    classes = {name: [path for path in paths if _is_image(path)] for name, paths in files.items()}
    others = (path for paths in files.values() for path in paths)
    unread = tuple(path for path in others if path.lower().endswith(UNREAD_SUFFIXES))
    loose = tuple(sorted(e.name for e in root.iterdir() if _is_image(e.name) and e.is_file()))
    return replace(_checked(root, classes), unread=unread, loose=loose)


def combine(parts: Mapping[str, Folder], *, size: int, channels: int) -> Sources:
    """Samples of each part, with the classes of the training part.

    Raises:
        DataError: There is only one class, or a part has a class that is not trained.
    """
    train = parts["train"]
    names, found = tuple(sorted(train.classes)), tuple(parts.values())
    if len(names) < 2:
        only = train.root / names[0]
        hint = f". If the folders in {only} are the classes, that is the root"
        raise DataError(
            f"{train.root}: it has one class only ({names[0]!r}); a classifier needs two or more"
            + (hint if len(subfolders(only)) > 1 else "")
        )
    sources = {part: folder.source(names, size, channels) for part, folder in parts.items()}
    return Sources(
        names,
        sources["train"],
        validation=sources.get("validation"),
        test=sources.get("test"),
        warnings=passed_over(found),
        decoder=DECODER,
    )


@component
class _ImageFiles(Dataset):
    """The fields of data sets that are decoded from files.

    Attributes:
        image_size: Height and width after scaling the shorter side and cropping the centre.
        channels: 3 for RGB, 1 for grey.
    """

    image_size: ImageSize = 224
    channels: Literal[1, 3] = 3


@DATASETS.register("image_folder")
@component
class ImageFolder(_ImageFiles):
    """A folder per class, or train/ with val/ and test/ of such folders as far as they exist."""

    root: str
    image_size: ImageSize = 64

    def sources(self, folder: Path | None) -> Sources:
        """Find the images; a relative root is looked for in ``folder``."""
        root = resolve(self.root, folder)
        folders = _part_folders(root)
        parts = {part: scan(path) for part, path in folders.items()}
        sources = combine(parts, size=self.image_size, channels=self.channels)
        used = {path.name for path in folders.values()}
        ignored = [] if folders["train"] == root else sorted(set(subfolders(root)) - used)
        if not ignored:
            return sources
        warning = f"{root}: folders that are no part and were passed over: {', '.join(ignored)}"
        return replace(sources, warnings=(*sources.warnings, warning))


@DATASETS.register("imagenet")
@component
class ImageNet(_ImageFiles):
    """ImageNet as torchvision lays it out, train/ and val/; val/ is the test part."""

    root: str = "imagenet"

    def sources(self, folder: Path | None) -> Sources:
        """Find the images; a relative root is looked for in ``folder``."""
        root = resolve(self.root, folder)
        for part in ("train", "val"):
            if not (root / part).is_dir():
                raise DataError(
                    f"{root / part}: there is no such folder. ImageNet cannot be downloaded "
                    "freely: unpack it there into one folder per class, or say with --data or "
                    "TUNER_DATA where it is"
                )
        parts = {"train": scan(root / "train"), "test": scan(root / "val")}
        return combine(parts, size=self.image_size, channels=self.channels)


@DATASETS.register("inaturalist")
@component
class INaturalist(_ImageFiles):
    """iNaturalist through torchvision; 2021_valid is the test part of 2021 if it is there.

    Attributes:
        download: Fetch the version if it is missing (up to 224 GB) instead of saying so.
    """

    root: str = "inaturalist"
    version: Literal["2017", "2018", "2019", "2021_train", "2021_train_mini"] = "2021_train_mini"
    download: bool = False

    def sources(self, folder: Path | None) -> Sources:
        """Find the images; a relative root is looked for in ``folder``."""
        root = resolve(self.root, folder)
        parts = {"train": self._part(root, self.version)}
        if self.version.startswith("2021") and (root / "2021_valid").is_dir():
            parts["test"] = self._part(root, "2021_valid")
        return combine(parts, size=self.image_size, channels=self.channels)

    def _part(self, root: Path, version: str) -> Folder:
        from torchvision.datasets import inaturalist

        found = fetch(
            f"iNaturalist {version}",
            lambda download: inaturalist.INaturalist(root, version, download=download),
            url=inaturalist.DATASET_URLS[version],
            folder=root / version,
            allowed=self.download,
        )
        categories = [Path(category).as_posix() for category in found.all_categories]
        classes: dict[str, list[str]] = {category: [] for category in categories}
        for category, file in found.index:
            if _is_image(file):
                classes[categories[category]].append(f"{categories[category]}/{file}")
        return _checked(root / version, classes)


def _part_folders(root: Path) -> dict[str, Path]:
    """The folder of each part; a plain data set is all training part.

    ``train`` is a part, not a class of that name, if it holds folders and no images.
    """
    if not (root / "train").is_dir():
        _refuse_parts_without_training(root)
        return {"train": root}
    folders = subfolders(root / "train")
    images = sorted(e.name for e in (root / "train").iterdir() if _is_image(e.name))
    if folders and images:
        _refuse_stray_image(root, images[0])
    if not folders or images:
        return {"train": root}
    parts = {"train": root / "train"}
    for part, spellings in PART_NAMES.items():
        there = [root / name for name in spellings if (root / name).is_dir()]
        if len(there) > 1:
            raise DataError(f"{there[0]} and {there[1]} are both there; keep one of them")
        if there:
            parts[part] = there[0]
    return parts


def _refuse_stray_image(root: Path, image: str) -> None:
    """Of nothing but parts an image in the wrong place must not make classes."""
    if set(subfolders(root)) <= {"train", *_part_names()}:
        raise DataError(
            f"{root / 'train' / image}: an image beside the class folders of the training part; "
            "move it into the folder of its class, or remove it"
        )


def _part_names() -> set[str]:
    return {name for names in PART_NAMES.values() for name in names}


def _refuse_parts_without_training(root: Path) -> None:
    folders = subfolders(root) if root.is_dir() else []
    if folders and set(folders) <= _part_names():
        raise DataError(f"{root / 'train'}: there is no such folder beside {', '.join(folders)}")


def _checked(root: Path, found: Mapping[str, list[str]]) -> Folder:
    special = {path for paths in found.values() for path in paths if is_special(f"{root}/{path}")}
    classes = {name: [p for p in paths if p not in special] for name, paths in found.items()}
    empty = [name for name, paths in classes.items() if not paths]
    if empty:
        others = f", and {len(empty) - 1} more have none either" if len(empty) > 1 else ""
        raise DataError(
            f"{root / empty[0]}: this class folder has no image "
            f"({', '.join(IMAGE_SUFFIXES)}){others}; fill it or remove it"
        )
    return Folder(root, classes, special=tuple(sorted(special)))


def _is_image(file: str) -> bool:
    return file[0] != "." and file.lower().endswith(IMAGE_SUFFIXES)
