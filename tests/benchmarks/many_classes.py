"""Two hundred classes of larger images, made of CIFAR-10: for the benchmarks, and to try things on.

A class is one of CIFAR's ten, turned by one of four quarter turns, with one of five orders of its
colours; no image serves two classes. It is enlarged and written as JPEG: squares of 64 pixels, or
with ``--photos`` 160 to 256 pixels at the shorter side and up to half as much again at the longer.

    python tests/benchmarks/many_classes.py --cifar FOLDER --to FOLDER [--photos] [--plain]

CIFAR-10 lies in train/ and test/ with a folder per class. Written are train/, from 200 images of a
class down to 2, and val/, with 5 of each; or with ``--plain`` one folder of classes: 150 with 100
images, and 50 with 10 to 50.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import islice, permutations, product
from pathlib import Path

import numpy as np
from PIL import Image

TURNS, ORDERS = 4, 5
MOST, FEWEST, UNSEEN = 200, 2, 5
QUALITY = 90


def classes(cifar: Path) -> Iterator[tuple[str, str, int, tuple[int, ...]]]:
    """Name of each class, its CIFAR class, quarter turns and order of colours."""
    orders = list(islice(permutations(range(3)), ORDERS))
    kinds = sorted(folder.name for folder in cifar.iterdir() if folder.is_dir())
    for kind, turns, order in product(kinds, range(TURNS), range(ORDERS)):
        yield f"{kind}-{90 * turns}-{order}", kind, turns, orders[order]


def counts(plain: bool, number: int) -> list[int]:
    """Training images of each class, in an order that has nothing to do with what they show."""
    if plain:
        sizes = [100] * (number - number // 4) + np.linspace(50, 10, number // 4).tolist()
    else:
        sizes = np.geomspace(MOST, FEWEST, number).tolist()
    order = np.random.default_rng(0).permutation(number)
    return [round(sizes[place]) for place in order]


def write(files: list[Path], folder: Path, turns: int, order: tuple[int, ...], sizes: bool) -> None:
    """Write changed copies of the files into the folder."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(len(files) + turns)
    for index, file in enumerate(files):
        pixels = np.rot90(np.asarray(Image.open(file).convert("RGB")), turns)[..., list(order)]
        short, longer = (rng.integers(160, 257), rng.uniform(1, 1.5)) if sizes else (64, 1)
        width, height = int(short), int(short * longer)
        size = (width, height) if index % 2 else (height, width)
        image = Image.fromarray(np.ascontiguousarray(pixels)).resize(size, Image.Resampling.BICUBIC)
        image.save(folder / f"{index:04}.jpg", quality=QUALITY)


def main() -> None:
    """Write the data set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cifar", type=Path, required=True)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--photos", action="store_true")
    parser.add_argument("--plain", action="store_true")
    options = parser.parse_args()
    found = list(classes(options.cifar / "train"))
    variants = TURNS * ORDERS
    for number, (name, kind, turns, order) in enumerate(found):
        count = counts(options.plain, len(found))[number]
        parts = [("train", count)] if options.plain else [("train", count), ("test", UNSEEN)]
        for part, most in parts:
            files = sorted((options.cifar / part / kind).iterdir())[number % variants :: variants]
            base = options.to if options.plain else options.to / part.replace("test", "val")
            write(files[:most], base / name, turns, order, options.photos)


if __name__ == "__main__":
    main()
