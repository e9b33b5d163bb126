"""Data sets: each kind read from where it lies, and what is refused."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import stat
import struct
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_folders import counts_of, dataset, folder, photos, pixels, save_image

from tuner.datasets import ResidentImages
from tuner.errors import DataError


def broken_folder(root: Path, kind: str) -> str:
    """Make a broken data set; the path that the error has to name."""
    if kind == "missing":
        return str(root / "nowhere")
    photos(root / "set", {"cat": 5, "dog": 5})
    if kind == "one class":
        shutil.rmtree(root / "set" / "dog")
    if kind == "flat":
        shutil.move(root / "set" / "cat", root / "flat")
        return str(root / "flat")
    if kind == "empty class":
        (root / "set" / "emu").mkdir()
        return str(root / "set" / "emu")
    if kind == "no images":
        (root / "set" / "emu").mkdir()
        (root / "set" / "emu" / "a.heic").touch()
        return str(root / "set" / "emu")
    if kind == "truncated":
        file = root / "set" / "cat" / "002.png"
        file.write_bytes(file.read_bytes()[:100])
        return str(file)
    return str(root / "set")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "no such folder.*--data"),
        ("flat", "no class folders"),
        ("one class", "one class only .'cat'."),
        ("empty class", "has no image"),
        ("no images", "has no image"),
        ("truncated", "1 of 4 validation images cannot be decoded"),
    ],
)
def test_broken_folders_are_refused_with_the_path(tmp_path: Path, kind: str, message: str) -> None:
    path = broken_folder(tmp_path, kind)
    where = tmp_path / ("set" if kind not in ("missing", "flat") else path)
    with pytest.raises(DataError, match=message) as error:
        folder(where, test_fraction=0).build()
    assert path in str(error.value)


def test_folder_within_a_folder_is_told_from_a_single_class(tmp_path: Path) -> None:
    photos(tmp_path / "download" / "photos", {"cat": 5, "dog": 5})
    with pytest.raises(DataError, match=r"only \('photos'\).*/download/photos are the classes"):
        folder(tmp_path / "download").build()


@pytest.mark.parametrize("which", ["", "cat", "cat/more"])
def test_folder_that_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    photos(tmp_path / "set", {"cat": 5, "dog": 5, "cat/more": 2})
    closed, real = tmp_path / "set" / which, os.scandir

    def scandir(path: Any) -> Any:
        if Path(path) == closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=rf"{closed}: cannot be read \(Permission denied\)"):
        folder(tmp_path / "set").build()


def test_an_image_beside_the_training_classes_does_not_make_classes_of_the_parts(
    tmp_path: Path,
) -> None:
    for part in ("train", "val", "test"):
        photos(tmp_path / part, {"cat": 5, "dog": 5})
    save_image(tmp_path / "train" / "preview.png", 99)
    with pytest.raises(DataError, match=r"train/preview.png: an image beside the class folders"):
        folder(tmp_path).build()


def test_images_that_are_not_there_are_named_in_every_part(tmp_path: Path) -> None:
    for part in ("train", "test"):
        photos(tmp_path / part, {"cat": 5, "dog": 5})
    gone = tmp_path / "test" / "cat" / "gone.png"
    gone.symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(
        DataError, match=rf"1 of 11 test images cannot be decoded: {gone} \(No such"
    ):
        folder(tmp_path).build()


@pytest.mark.parametrize("apart", [True, False], ids=["folders", "carved"])
def test_broken_images_of_all_parts_are_told_of_at_once(tmp_path: Path, apart: bool) -> None:
    for number, part in enumerate(("train", "val", "test") if apart else (".",)):
        photos(tmp_path / part, {"cat": 9, "dog": 9}, first=100 * number)
    broken = sorted(tmp_path.rglob("cat/*.png"))
    for path in broken:
        path.write_bytes(b"broken")
    expected = "9 of 18 training images and 9 of 18 validation images and 9 of 18 test images"
    if not apart:
        expected = r"5 of 10 training images and 2 of 4 validation images and 2 of 4 test images"
    with pytest.raises(DataError, match=f"^{expected} cannot be decoded") as error:
        folder(tmp_path).build()
    assert "(cannot identify image file)" in str(error.value), "its path stands before it"


def test_class_folders_whose_name_is_not_utf_8_are_refused(tmp_path: Path) -> None:
    photos(tmp_path, {"cat": 5, "dog": 5})
    (tmp_path / "dog").rename(Path(os.fsdecode(os.fsencode(tmp_path) + b"/se\xf1al")))
    with pytest.raises(DataError, match=r"b'se\\xf1al' has a name that is not UTF-8; rename it"):
        folder(tmp_path).build()


@pytest.mark.parametrize("target", ["..", ".", "../..", "../dog"])
def test_a_link_back_to_a_folder_above_it_brings_no_image_twice(
    tmp_path: Path, target: str
) -> None:
    photos(tmp_path / "set", {"cat": 5, "dog": 5, "dog/more": 2})
    (tmp_path / "set" / "dog" / "again").symlink_to(target)
    data = folder(tmp_path / "set", test_fraction=0).build()
    assert data.pool_counts.tolist() == [5, 7]


def test_linked_folders_of_images_are_read(tmp_path: Path) -> None:
    photos(tmp_path / "set", {"cat": 5, "dog": 5})
    photos(tmp_path, {"elsewhere": 3}, first=20)
    (tmp_path / "set" / "dog" / "more").symlink_to(tmp_path / "elsewhere")
    data = folder(tmp_path / "set", test_fraction=0).build()
    assert data.pool_counts.tolist() == [5, 8]


def test_a_test_class_that_is_not_trained_is_refused(tmp_path: Path) -> None:
    photos(tmp_path / "train", {"cat": 5, "dog": 5})
    photos(tmp_path / "test", {"cat": 5, "emu": 5})
    with pytest.raises(DataError, match=r"test/emu: no class of this name is in the training"):
        folder(tmp_path).build()


def test_two_validation_folders_are_refused(tmp_path: Path) -> None:
    for part in ("train", "val", "valid"):
        photos(tmp_path / part, {"cat": 5, "dog": 5})
    with pytest.raises(DataError, match="both there"):
        folder(tmp_path).build()


def test_a_test_folder_without_a_training_folder_is_refused(tmp_path: Path) -> None:
    for part in ("val", "test"):
        photos(tmp_path / part, {"cat": 5, "dog": 5})
    with pytest.raises(DataError, match="train: there is no such folder beside test, val"):
        folder(tmp_path).build()


def test_folders_beside_the_parts_are_named(tmp_path: Path) -> None:
    for number, part in enumerate(("train", "test", "unsorted")):
        photos(tmp_path / part, {"cat": 5, "dog": 5}, first=100 * number)
    (warning,) = folder(tmp_path).build().warnings
    assert warning == f"{tmp_path}: folders that are no part and were passed over: unsorted"


def test_images_in_a_format_that_is_not_read_are_counted_with_an_example(tmp_path: Path) -> None:
    for number, part in enumerate(("train", "test", "unsorted")):
        photos(tmp_path / part, {"cat": 5, "dog": 5}, first=100 * number)
    for name in ("train/cat/b.svg", "train/cat/a.HEIC", "test/dog/c.avif", "train/dog/notes.txt"):
        (tmp_path / name).touch()
    first, second = folder(tmp_path).build().warnings
    assert first == (
        f"3 files were passed over, for example {tmp_path}/train/cat/a.HEIC: .heic is not read"
    )
    assert "unsorted" in second


def test_a_single_file_that_is_not_read_is_named(tmp_path: Path) -> None:
    photos(tmp_path, {"cat": 5, "dog": 5})
    (tmp_path / "cat" / "deep").mkdir()
    (tmp_path / "cat" / "deep" / "a.jp2").touch()
    assert folder(tmp_path).build().warnings[0] == (
        f"1 file was passed over, for example {tmp_path}/cat/deep/a.jp2: .jp2 is not read"
    )


def test_images_beside_the_class_folders_are_told_of(tmp_path: Path) -> None:
    for number, part in enumerate(("train", "test")):
        photos(tmp_path / part, {"cat": 5, "dog": 5}, first=100 * number)
    for name in ("test/b.png", "test/a.JPG", "test/.hidden.png", "test/notes.txt"):
        (tmp_path / name).touch()
    (warning,) = folder(tmp_path).build().warnings
    assert warning == (
        f"{tmp_path}/test: 2 images lie beside the class folders, for example a.JPG: without a "
        "class, they were passed over"
    )
    photos(tmp_path / "plain", {"cat": 5, "dog": 5}, first=300)
    (tmp_path / "plain" / "one.png").touch()
    (warning,) = folder(tmp_path / "plain").build().warnings
    assert "plain: 1 image lies beside" in warning
    assert "one.png: without a class, it was passed over" in warning


def test_an_image_that_is_in_two_parts_is_counted_as_one(tmp_path: Path) -> None:
    for number, part in enumerate(("train", "test")):
        photos(tmp_path / part, {"cat": 5, "dog": 5}, first=100 * number)
    twin = (tmp_path / "train" / "cat" / "000.png").read_bytes()
    (tmp_path / "test" / "cat" / "000.png").write_bytes(twin)
    (warning,) = folder(tmp_path).build().warnings
    assert warning.startswith("1 image of the test part is in the ")


def test_pipes_and_sockets_are_passed_over(tmp_path: Path) -> None:
    photos(tmp_path, {"cat": 5, "dog": 5})
    os.mkfifo(tmp_path / "cat" / "camera.png")
    (tmp_path / "dog" / "linked.jpg").symlink_to(tmp_path / "cat" / "camera.png")
    os.mknod(tmp_path / "dog" / "server.jpg", stat.S_IFSOCK | 0o600)
    # Not built: where one is not passed over, that would wait for ever.
    sources = folder(tmp_path).sources(None)
    assert sources.warnings == (
        f"3 files were passed over, for example {tmp_path}/cat/camera.png: it is a pipe, a socket "
        "or a device",
    )
    assert sources.train.targets.bincount().tolist() == [5, 5]


def test_gif_files_give_their_first_frame_in_colour(tmp_path: Path) -> None:
    from PIL import Image

    frames = [Image.new("RGB", (8, 8), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    for name in ("cat", "dog"):
        photos(tmp_path, {name: 4})
        file = tmp_path / name / "a.gif"
        frames[0].save(file, save_all=True, append_images=frames[1:])
    data = folder(tmp_path, test_fraction=0).build()
    red = np.array([250, 0, 0], np.uint8).repeat(64).tobytes()
    assert (pixels(data.train) + pixels(data.validation)).count(red) == 2


def test_data_without_an_image_to_validate_with_are_refused(tmp_path: Path) -> None:
    photos(tmp_path, {"cat": 1, "dog": 1})
    with pytest.raises(DataError, match="spare one to validate"):
        folder(tmp_path).build()


def test_a_profile_that_asks_for_too_much_names_class_and_number(tmp_path: Path) -> None:
    root = photos(tmp_path, {"cat": 40, "dog": 20, "emu": 10})
    with pytest.raises(DataError, match="'dog' should keep 17 images, but 16 are there"):
        folder(root, profile={"name": "counts", "counts": [10, 17, 5]}).build()


def test_imagenet_takes_its_validation_folder_as_test_part(tmp_path: Path) -> None:
    photos(tmp_path / "imagenet" / "train", {"n01": 10, "n02": 10})
    photos(tmp_path / "imagenet" / "val", {"n01": 3, "n02": 3}, first=100)
    data = dataset("imagenet", image_size=8).build(tmp_path)
    assert counts_of(data.test, 2) == [3, 3]
    assert counts_of(data.validation, 2) == [2, 2]


def test_imagenet_that_is_missing_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"imagenet/train.*cannot be downloaded"):
        dataset("imagenet").build(tmp_path)


def test_inaturalist_is_read_through_torchvision(tmp_path: Path) -> None:
    names = [f"0000{i}_Animalia_Chordata_Aves_Order_Family_Genus_s{i}" for i in range(2)]
    photos(tmp_path / "inaturalist" / "2021_train_mini", dict.fromkeys(names, 6))
    photos(tmp_path / "inaturalist" / "2021_valid", dict.fromkeys(names, 2), first=90)
    data = dataset("inaturalist", image_size=8).build(tmp_path)
    assert data.class_names == tuple(names)
    assert counts_of(data.test, 2) == [2, 2]
    old = tmp_path / "inaturalist" / "2019"
    photos(old, {"Birds/0": 5, "Fungi/1": 5})
    assert dataset("inaturalist", image_size=8, version="2019").build(tmp_path).class_names == (
        "Birds/0",
        "Fungi/1",
    )


def test_inaturalist_is_not_downloaded_unasked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"2021_train_mini.*data.download = true"):
        dataset("inaturalist").build(tmp_path)


def test_digits_are_those_of_scikit_learn_in_eight_bits() -> None:
    from sklearn.datasets import load_digits

    data = dataset("digits", test_fraction=0).build()
    assert isinstance(data.train.images, ResidentImages)
    assert data.image_shape == (1, 8, 8)
    assert data.pool_counts.tolist() == np.bincount(load_digits().target).tolist()
    expected = {
        np.round(digit * 255 / 16).astype(np.uint8).tobytes() for digit in load_digits().images
    }
    assert set(pixels(data.train)) <= expected


def write_mnist(folder: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        header = struct.pack(">IIII", 0x803, count, 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        targets = (np.arange(count) % 10).astype(np.uint8)
        header = struct.pack(">II", 0x801, count)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(header + targets.tobytes())


@pytest.mark.parametrize(("name", "own"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist_is_read_where_torchvision_keeps_it(tmp_path: Path, name: str, own: str) -> None:
    write_mnist(tmp_path / own / "raw", 60)
    data = dataset(name).build(tmp_path)
    assert data.image_shape == (1, 28, 28)
    assert counts_of(data.test, 10) == [6] * 10
    assert data.pool_counts.tolist() == [6] * 10


def test_cifar_is_read_where_torchvision_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import CIFAR10

    rng = np.random.default_rng(0)
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": None})
    own = tmp_path / "cifar-10-batches-py"
    own.mkdir()
    first = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
    for name, _ in CIFAR10.train_list + CIFAR10.test_list:
        rows = first if name == "data_batch_1" else rng.integers(0, 256, (20, 3072), dtype=np.uint8)
        batch = {"data": rows, "labels": [i % 10 for i in range(20)]}
        (own / name).write_bytes(pickle.dumps(batch))
    (own / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    data = dataset("cifar10").build(tmp_path)
    assert data.class_names == tuple("abcdefghij")
    assert (data.image_shape, len(data.train) + len(data.validation)) == ((3, 32, 32), 100)
    assert {row.tobytes() for row in first} <= set(pixels(data.train)) | set(
        pixels(data.validation)
    )


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "fashion_mnist"])
def test_missing_data_offline_say_where_they_belong(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    with pytest.raises(DataError, match=r"cannot be downloaded.*--data") as error:
        dataset(name).build(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert 'name = "image_folder"' in str(error.value)
