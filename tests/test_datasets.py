"""Data sets: who is in which part, what the fingerprint notices, and what is refused."""

from __future__ import annotations

import pickle
import shutil
import struct
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from tuner.datasets import (
    DATASETS,
    Data,
    Dataset,
    Part,
    ResidentImages,
    StreamedImages,
    validation_counts,
)
from tuner.datasets._split import Split, split
from tuner.errors import DataError
from tuner.imbalance import class_counts


def image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def photos(root: Path, *, first: int = 0, backwards: bool = False, **counts: int) -> Path:
    """A folder per class with so many images, all different."""
    files = [(name, i) for name, count in counts.items() for i in range(count)]
    jobs = [(root / name / f"{i:03}.png", first + seed) for seed, (name, i) in enumerate(files)]
    for path, seed in reversed(jobs) if backwards else jobs:
        image(path, seed)
    return root


def folder(root: Path, **fields: Any) -> Dataset:
    return DATASETS["image_folder"](root=str(root), image_size=8, **fields)


def pixels(part: Part | None) -> list[bytes]:
    assert part is not None
    assert isinstance(part.images, ResidentImages)
    return [sample.numpy().tobytes() for sample in part.images.tensor]


def counts_of(part: Part | None, num_classes: int) -> list[int]:
    assert part is not None
    return [int(count) for count in class_counts(part.targets, num_classes)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photos(tmp_path_factory.mktemp("photos"), cat=40, dog=20, emu=10)


def test_a_plain_folder_is_divided_by_class_into_three_parts(root: Path) -> None:
    data = folder(root).build()
    assert data.class_names == ("cat", "dog", "emu")
    assert counts_of(data.test, 3) == [8, 4, 2]
    assert counts_of(data.validation, 3) == [6, 3, 2]
    assert data.class_counts.tolist() == counts_of(data.train, 3) == [26, 13, 6]
    assert data.pool_counts.tolist() == [32, 16, 8]
    assert (data.num_classes, data.image_shape) == (3, (3, 8, 8))
    assert data.train.targets.dtype == torch.int64
    assert data.warnings == ()


def test_no_image_is_in_two_parts_and_none_is_lost(root: Path) -> None:
    data = folder(root).build()
    parts = [set(pixels(part)) for part in (data.train, data.validation, data.test)]
    assert sum(len(part) for part in parts) == len(set.union(*parts)) == 70


def test_every_image_has_the_class_of_its_folder(root: Path) -> None:
    data = folder(root).build()
    for part in (data.train, data.validation):
        for sample, target in zip(pixels(part), part.targets.tolist(), strict=True):
            files = (root / data.class_names[target]).iterdir()
            contents = {np.asarray(Image.open(file)).transpose(2, 0, 1).tobytes() for file in files}
            assert sample in contents


def test_the_profile_is_carved_from_the_pool_and_leaves_the_test_part_alone(root: Path) -> None:
    profile = {"name": "counts", "counts": [30, 10, 4]}
    plain, carved = folder(root).build(), folder(root, profile=profile).build()
    assert carved.pool_counts.tolist() == [30, 10, 4]
    assert pixels(carved.test) == pixels(plain.test)
    assert set(pixels(carved.train)) < set(pixels(plain.train)) | set(pixels(plain.validation))


def test_the_test_part_can_be_thinned_like_the_pool(root: Path) -> None:
    profile = {"name": "counts", "counts": [32, 8, 2]}
    data = folder(root, profile=profile, carve_test=True).build()
    assert counts_of(data.test, 3) == [8, 2, 1]


def test_a_shorter_tail_is_part_of_a_longer_one(root: Path) -> None:
    short, long = (
        folder(root, profile={"name": "counts", "counts": [30, 15, n]}).build() for n in (4, 8)
    )
    pools = [set(pixels(data.train)) | set(pixels(data.validation)) for data in (short, long)]
    assert pools[0] < pools[1]


def test_permute_lets_the_seed_choose_the_tail(tmp_path: Path) -> None:
    photos(tmp_path, **{name: 10 for name in "abcdef"})
    profile = {"name": "keep", "classes": [0], "keep": 1.0, "others": 0.5}
    heads = {
        folder(tmp_path, profile=profile, permute=True, seed=seed).build().groups.head
        for seed in range(8)
    }
    assert len(heads) > 1
    assert folder(tmp_path, profile=profile).build().pool_counts.tolist() == [8, 4, 4, 4, 4, 4]


def test_the_same_seed_gives_the_same_parts_and_another_one_does_not(root: Path) -> None:
    one, same, other = (folder(root, seed=seed).build() for seed in (0, 0, 1))
    assert pixels(one.train) == pixels(same.train)
    assert pixels(one.validation) != pixels(other.validation)


def test_no_seed_trains_on_what_another_is_tested_on(root: Path) -> None:
    tests = [pixels(folder(root, seed=seed).build().test) for seed in range(3)]
    assert tests[0] == tests[1] == tests[2]


def test_the_split_of_a_class_does_not_depend_on_the_others(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "emu", tmp_path / "emu")
    photos(tmp_path, first=1000, ant=6, zebra=7)
    ours, theirs = folder(root).build(), folder(tmp_path).build()
    emus = [
        {
            sample
            for sample, target in zip(pixels(data.train), data.train.targets.tolist(), strict=True)
            if data.class_names[target] == "emu"
        }
        for data in (ours, theirs)
    ]
    assert emus[0] == emus[1]


def test_the_fingerprint_does_not_depend_on_place_or_order_of_creation(tmp_path: Path) -> None:
    one = photos(tmp_path / "one", cat=8, dog=6)
    two = photos(tmp_path / "two", backwards=True, cat=8, dog=6)
    assert folder(one).build().fingerprint == folder(two).build().fingerprint


def test_the_fingerprint_notices_every_change(tmp_path: Path) -> None:
    original = photos(tmp_path / "original", cat=8, dog=6)
    seen = [folder(original).build().fingerprint]

    def changed() -> Path:
        return Path(shutil.copytree(original, tmp_path / str(len(seen))))

    def note(data: Data) -> None:
        seen.append(data.fingerprint)

    replaced, renamed, moved, test = changed(), tmp_path / "renamed", tmp_path / "m", tmp_path / "t"
    image(replaced / "cat" / "003.png", seed=999)
    note(folder(replaced).build())
    shutil.copytree(original, renamed)
    (renamed / "dog").rename(renamed / "wolf")
    note(folder(renamed).build())
    shutil.copytree(original, moved)
    (moved / "cat" / "007.png").rename(moved / "dog" / "007.png")
    note(folder(moved).build())
    shutil.copytree(original, test)
    photos(test / "test", first=50, cat=1, dog=1)
    note(folder(original, seed=1).build())
    note(folder(original, channels=1).build())
    note(folder(original, profile={"name": "counts", "counts": [6, 3]}).build())
    assert len(set(seen)) == len(seen) == 7


def test_one_changed_byte_in_a_file_is_noticed_at_either_end(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    photos(tmp_path, cat=4, dog=4)
    large = tmp_path / "cat" / "000.bmp"
    Image.fromarray(rng.integers(0, 256, (90, 90, 3), dtype=np.uint8)).save(large)
    content = large.read_bytes()
    seen = {folder(tmp_path).build().fingerprint}
    for position in (200, len(content) - 1):
        large.write_bytes(
            content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]
        )
        seen.add(folder(tmp_path).build().fingerprint)
    assert len(seen) == 3


def test_given_parts_are_taken_as_they_are(tmp_path: Path) -> None:
    photos(tmp_path / "train", cat=10, dog=10)
    photos(tmp_path / "valid", first=100, cat=3, dog=1)
    photos(tmp_path / "test", first=200, cat=2, dog=5)
    data = folder(tmp_path, profile={"name": "counts", "counts": [8, 4]}).build()
    assert data.class_counts.tolist() == data.pool_counts.tolist() == [8, 4]
    assert counts_of(data.validation, 2) == [3, 1]
    assert counts_of(data.test, 2) == [2, 5]


def test_a_missing_part_is_split_off_the_training_folder(tmp_path: Path) -> None:
    photos(tmp_path / "train", cat=10, dog=10)
    photos(tmp_path / "test", first=100, cat=2, dog=5)
    data = folder(tmp_path).build()
    assert counts_of(data.test, 2) == [2, 5]
    assert counts_of(data.validation, 2) == [2, 2]
    (tmp_path / "test").rename(tmp_path / "val")
    data = folder(tmp_path).build()
    assert counts_of(data.validation, 2) == [2, 5]
    assert counts_of(data.test, 2) == [2, 2]


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    photos(tmp_path, boat=6, train=6)
    assert folder(tmp_path).build().class_names == ("boat", "train")


def test_no_test_part_is_made_when_none_is_wanted(root: Path) -> None:
    data = folder(root, test_fraction=0).build()
    assert data.test is None
    assert data.pool_counts.tolist() == [40, 20, 10]


def test_test_images_are_not_decoded_before_they_are_asked_for(tmp_path: Path) -> None:
    photos(tmp_path / "train", cat=6, dog=6)
    photos(tmp_path / "test", first=100, cat=2, dog=2)
    (tmp_path / "test" / "cat" / "001.png").write_bytes(b"broken")
    data = folder(tmp_path).build()
    with pytest.raises(DataError, match=r"1 of 4 images cannot be decoded.*cat/001\.png"):
        _ = data.test


def test_what_does_not_fit_in_memory_is_streamed_and_equal(root: Path) -> None:
    resident, streamed = folder(root).build(), folder(root).build(resident_limit=5000)
    assert isinstance(streamed.train.images, StreamedImages)
    assert streamed.fingerprint == resident.fingerprint
    assert streamed.mean == pytest.approx(resident.mean)
    (batch,) = streamed.validation.images.batches([torch.arange(len(streamed.validation))])
    assert [sample.numpy().tobytes() for sample in batch] == pixels(resident.validation)


def test_mean_and_deviation_are_those_of_the_training_part(root: Path) -> None:
    data = folder(root).build()
    values = np.stack([np.frombuffer(raw, np.uint8).reshape(3, -1) for raw in pixels(data.train)])
    np.testing.assert_allclose(data.mean, (values / 255).mean(axis=(0, 2)), rtol=1e-5)
    np.testing.assert_allclose(data.std, (values / 255).std(axis=(0, 2)), rtol=1e-5)


def test_data_on_another_device_carry_every_part_along(root: Path) -> None:
    data = folder(root).build().to("meta")
    assert data.test is not None
    for part in (data.train, data.validation, data.test):
        assert isinstance(part.images, ResidentImages)
        assert part.images.tensor.device.type == part.targets.device.type == "meta"


def test_groups_follow_the_tail_rule_on_the_pool(root: Path) -> None:
    assert folder(root, tail={"max_count": 8}).build().groups.tail == (2,)
    assert folder(root, tail={"max_count": 16}).build().groups.tail == (1, 2)


def test_classes_too_small_to_estimate_are_named(tmp_path: Path) -> None:
    photos(tmp_path, ant=12, bee=3, cow=2, dodo=1)
    data = folder(tmp_path).build()
    assert data.class_counts.tolist() == [8, 1, 1, 1]
    text = "\n".join(data.warnings)
    assert "fewer than 4 images" in text
    assert "'bee' (2), 'cow' (2), 'dodo' (1)" in text
    assert "without a validation image, which no validation metric counts: 'dodo'" in text
    assert "without a test image, which no test metric counts: 'cow', 'dodo'" in text


def test_the_same_image_in_training_and_test_is_pointed_out(tmp_path: Path) -> None:
    photos(tmp_path / "train", cat=6, dog=6)
    photos(tmp_path / "test", first=100, cat=2, dog=2)
    shutil.copy(tmp_path / "train/cat/000.png", tmp_path / "test/dog/twin.png")
    (warning,) = folder(tmp_path).build().warnings
    assert "dog/twin.png = cat/000.png" in warning


def test_files_that_are_no_images_are_passed_over(root: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(root, tmp_path / "copy"))
    (copy / "readme.txt").write_text("hello")
    (copy / "cat" / "notes.txt").write_text("hello")
    (copy / "cat" / "._000.png").write_bytes(b"resource fork")
    (copy / ".cache").mkdir()
    assert folder(copy).build().fingerprint == folder(root).build().fingerprint


def test_images_in_subfolders_of_a_class_belong_to_it(tmp_path: Path) -> None:
    photos(tmp_path, cat=4, dog=6)
    photos(tmp_path / "cat", first=50, indoors=4)
    assert folder(tmp_path, test_fraction=0).build().pool_counts.tolist() == [8, 6]


def test_relative_roots_lie_in_the_data_folder(root: Path) -> None:
    data = DATASETS["image_folder"](root=root.name, image_size=8).build(root.parent)
    assert data.fingerprint == folder(root).build().fingerprint


def broken_folder(root: Path, kind: str) -> str:
    """Make a broken data set; the path that the error has to name."""
    if kind == "missing":
        return str(root / "nowhere")
    photos(root / "set", cat=5, dog=5)
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
        ("truncated", "of 10 images cannot be decoded"),
    ],
)
def test_broken_folders_are_refused_with_the_path(tmp_path: Path, kind: str, message: str) -> None:
    path = broken_folder(tmp_path, kind)
    where = tmp_path / ("set" if kind not in ("missing", "flat") else path)
    with pytest.raises(DataError, match=message) as error:
        folder(where, test_fraction=0).build()
    assert path in str(error.value)


def test_a_test_class_that_is_not_trained_is_refused(tmp_path: Path) -> None:
    photos(tmp_path / "train", cat=5, dog=5)
    photos(tmp_path / "test", cat=5, emu=5)
    with pytest.raises(DataError, match=r"test/emu: no class of this name is in the training"):
        folder(tmp_path).build()


def test_two_validation_folders_are_refused(tmp_path: Path) -> None:
    for part in ("train", "val", "valid"):
        photos(tmp_path / part, cat=5, dog=5)
    with pytest.raises(DataError, match="both there"):
        folder(tmp_path).build()


def test_data_without_an_image_to_validate_with_are_refused(tmp_path: Path) -> None:
    photos(tmp_path, cat=1, dog=1)
    with pytest.raises(DataError, match="spare one to validate"):
        folder(tmp_path).build()


def test_a_profile_that_asks_for_too_much_names_class_and_number(root: Path) -> None:
    with pytest.raises(DataError, match="'dog' should keep 17 images, but 16 are there"):
        folder(root, profile={"name": "counts", "counts": [10, 17, 5]}).build()


def test_imagenet_takes_its_validation_folder_as_test_part(tmp_path: Path) -> None:
    photos(tmp_path / "imagenet" / "train", n01=10, n02=10)
    photos(tmp_path / "imagenet" / "val", first=100, n01=3, n02=3)
    data = DATASETS["imagenet"](image_size=8).build(tmp_path)
    assert counts_of(data.test, 2) == [3, 3]
    assert counts_of(data.validation, 2) == [2, 2]


def test_imagenet_that_is_missing_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"imagenet/train.*cannot be downloaded"):
        DATASETS["imagenet"]().build(tmp_path)


def test_inaturalist_is_read_through_torchvision(tmp_path: Path) -> None:
    names = [f"0000{i}_Animalia_Chordata_Aves_Order_Family_Genus_s{i}" for i in range(2)]
    photos(tmp_path / "inaturalist" / "2021_train_mini", **{name: 6 for name in names})
    photos(tmp_path / "inaturalist" / "2021_valid", first=90, **{name: 2 for name in names})
    data = DATASETS["inaturalist"](image_size=8).build(tmp_path)
    assert data.class_names == tuple(names)
    assert counts_of(data.test, 2) == [2, 2]
    old = tmp_path / "inaturalist" / "2019"
    photos(old, **{"Birds/0": 5, "Fungi/1": 5})
    assert DATASETS["inaturalist"](image_size=8, version="2019").build(tmp_path).class_names == (
        "Birds/0",
        "Fungi/1",
    )


def test_inaturalist_is_not_downloaded_unasked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"2021_train_mini.*data.download = true"):
        DATASETS["inaturalist"]().build(tmp_path)


def test_digits_are_those_of_scikit_learn_in_eight_bits() -> None:
    from sklearn.datasets import load_digits

    data = DATASETS["digits"](test_fraction=0).build()
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
    data = DATASETS[name]().build(tmp_path)
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
    data = DATASETS["cifar10"]().build(tmp_path)
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
        DATASETS[name]().build(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_capped_balanced_validation_counts() -> None:
    counts = torch.tensor([5000, 100, 99, 51, 10, 5, 4, 3, 2, 1])
    assert validation_counts(counts, 0.2, 20).tolist() == [20, 20, 20, 10, 2, 2, 2, 1, 1, 0]
    assert validation_counts(counts, 0.2, 0).tolist() == [1000, 20, 20, 10, 2, 2, 2, 1, 1, 0]
    assert validation_counts(counts, 0.2, 1).tolist() == [1] * 9 + [0]


def divided(targets: Tensor, names: Sequence[str], **changes: Any) -> Split:
    rules: dict[str, Any] = {
        "seed": 0,
        "test_fraction": 0.2,
        "validation_fraction": 0.2,
        "validation_cap": 20,
        "carve": lambda available: available,
    }
    return split(targets, names, **(rules | changes))


@given(
    counts=st.lists(st.integers(1, 60), min_size=2, max_size=12),
    test_fraction=st.none() | st.floats(0.01, 0.5),
    validation_fraction=st.none() | st.floats(0.01, 0.5),
    cap=st.integers(0, 10),
    seed=st.integers(0, 2**63 - 1),
)
def test_every_split_is_complete_disjoint_and_leaves_every_class_to_train(
    counts: list[int],
    test_fraction: float | None,
    validation_fraction: float | None,
    cap: int,
    seed: int,
) -> None:
    names = [str(i) for i in range(len(counts))]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed))
    targets = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))[order]
    plan = divided(
        targets,
        names,
        seed=seed,
        test_fraction=test_fraction,
        validation_fraction=validation_fraction,
        validation_cap=cap,
    )
    parts = [part for part in (plan.train, plan.validation, plan.test) if part is not None]
    assert torch.cat(parts).sort().values.tolist() == list(range(len(targets)))
    assert all(part.tolist() == sorted(part.tolist()) for part in parts)
    train = class_counts(targets[plan.train], len(counts))
    assert bool((train >= 1).all())
    if plan.validation is not None:
        validation = class_counts(targets[plan.validation], len(counts))
        assert torch.equal(plan.pool_counts, train + validation)
        assert bool((2 * validation <= plan.pool_counts).all())
        assert cap == 0 or int(validation.max()) <= cap


@given(seed=st.integers(0, 1000), others=st.lists(st.integers(1, 30), min_size=1, max_size=5))
def test_the_split_of_a_class_is_its_own(seed: int, others: list[int]) -> None:
    alone = divided(torch.zeros(25, dtype=torch.int64), ["cat"], seed=seed)
    counts = torch.tensor([25, *others])
    targets = torch.repeat_interleave(torch.arange(len(counts)), counts)
    names = ["cat", *(str(i) for i in range(len(others)))]
    company = divided(targets, names, seed=seed)
    assert alone.train.tolist() == [i for i in company.train.tolist() if i < 25]
