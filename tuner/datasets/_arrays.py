"""Small data sets that come as arrays: scikit-learn's digits, and CIFAR and MNIST."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from tuner.datasets._base import DATASETS, Dataset, resolve
from tuner.datasets._download import fetch
from tuner.datasets._sources import ArraySource, Sources
from tuner.registry import component

DOWNLOADS = Path("data")
"""Where downloads go when neither a root nor a folder is given."""


@DATASETS.register("digits")
@component
class Digits(Dataset):
    """scikit-learn's 1797 handwritten digits, 8x8 grey; needs no download."""

    def sources(self, folder: Path | None) -> Sources:
        """The images; ``folder`` is not needed."""
        table = np.loadtxt(_digits_file(), delimiter=",")
        pixels = torch.from_numpy((table[:, :-1] * (255 / 16)).round().astype(np.uint8))
        targets = torch.from_numpy(table[:, -1]).long()
        names = tuple(map(str, range(10)))
        return Sources(names, ArraySource(pixels.view(-1, 1, 8, 8), targets, "digits"))


def _digits_file() -> Path:
    """What ``sklearn.datasets.load_digits`` reads, without the second that its import takes."""
    spec = find_spec("sklearn")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).with_name("datasets") / "data" / "digits.csv.gz"


@component
class _Downloaded(Dataset):
    """The fields of data sets that torchvision downloads and keeps as arrays.

    Attributes:
        root: Folder in which torchvision keeps its own folder of the data set.
    """

    torchvision_class: ClassVar[str]
    own_folder: ClassVar[str]

    root: str | None = None

    def sources(self, folder: Path | None) -> Sources:
        """Read the data set, downloading it first if it is missing."""
        root = (folder or DOWNLOADS) if self.root is None else resolve(self.root, folder)
        train, test = self._read(root, train=True), self._read(root, train=False)
        return Sources(tuple(train.classes), _source(train, "train"), test=_source(test, "test"))

    def _read(self, root: Path, *, train: bool) -> Any:
        from torchvision import datasets

        reader = getattr(datasets, self.torchvision_class)
        return fetch(
            self.torchvision_class,
            lambda download: reader(root, train=train, download=download),
            url=reader.url if hasattr(reader, "url") else reader.mirrors[0],
            folder=root / self.own_folder,
        )


@DATASETS.register("cifar10")
@component
class Cifar10(_Downloaded):
    """CIFAR-10: 50000 + 10000 photos of 10 classes, 32x32 RGB."""

    torchvision_class = "CIFAR10"
    own_folder = "cifar-10-batches-py"


@DATASETS.register("cifar100")
@component
class Cifar100(_Downloaded):
    """CIFAR-100: 50000 + 10000 photos of 100 classes, 32x32 RGB."""

    torchvision_class = "CIFAR100"
    own_folder = "cifar-100-python"


@DATASETS.register("mnist")
@component
class Mnist(_Downloaded):
    """MNIST: 60000 + 10000 handwritten digits, 28x28 grey."""

    torchvision_class = "MNIST"
    own_folder = "MNIST/raw"


@DATASETS.register("fashion_mnist")
@component
class FashionMnist(_Downloaded):
    """Fashion-MNIST: 60000 + 10000 pieces of clothing of 10 classes, 28x28 grey."""

    torchvision_class = "FashionMNIST"
    own_folder = "FashionMNIST/raw"


def _source(dataset: Any, part: str) -> ArraySource:
    pixels = torch.as_tensor(dataset.data)
    pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
    targets = torch.as_tensor(dataset.targets, dtype=torch.int64)
    return ArraySource(pixels, targets, part)
