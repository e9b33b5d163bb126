"""Data sets: who is in which part, and what the fingerprint notices."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from image_folders import counts_of, dataset, folder, photos, pixels, save_image
from PIL import Image

from tuner.datasets import ResidentImages, StreamedImages
from tuner.errors import DataError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photos(tmp_path_factory.mktemp("photos"), {"cat": 40, "dog": 20, "emu": 10})


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
    photos(tmp_path, dict.fromkeys("abcdef", 10))
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
    photos(tmp_path, {"ant": 6, "zebra": 7}, first=1000)
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
    one = photos(tmp_path / "one", {"cat": 8, "dog": 6})
    two = photos(tmp_path / "two", {"cat": 8, "dog": 6}, backwards=True)
    assert folder(one).build().fingerprint == folder(two).build().fingerprint


def test_the_fingerprint_notices_every_change(tmp_path: Path) -> None:
    original = photos(tmp_path / "original", {"cat": 8, "dog": 6})
    replaced, renamed, moved = (
        Path(shutil.copytree(original, tmp_path / name)) for name in ("one", "two", "three")
    )
    save_image(replaced / "cat" / "003.png", seed=999)
    (renamed / "dog").rename(renamed / "wolf")
    (moved / "cat" / "007.png").rename(moved / "dog" / "007.png")
    changed = [
        folder(replaced),
        folder(renamed),
        folder(moved),
        folder(original, seed=1),
        folder(original, channels=1),
        folder(original, profile={"name": "counts", "counts": [6, 3]}),
    ]
    seen = {data.build().fingerprint for data in (folder(original), *changed)}
    assert len(seen) == 1 + len(changed)


def test_one_changed_byte_in_a_file_is_noticed_at_either_end(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    photos(tmp_path, {"cat": 4, "dog": 4})
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


def drawings(root: Path, first: int) -> Path:
    """Uncompressed images of 128x128 that differ in their middle only."""
    for number, name in enumerate(["cat"] * 6 + ["dog"] * 6):
        pixels = np.zeros((128, 128, 3), dtype=np.uint8)
        pixels[50:78, 50:78] = np.random.default_rng(first + number).integers(0, 256, (28, 28, 3))
        (root / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / name / f"{number}.bmp")
    return root


def test_uncompressed_images_on_the_same_background_are_told_apart(tmp_path: Path) -> None:
    one = folder(drawings(tmp_path / "a" / "set", 0)).build()
    other = folder(drawings(tmp_path / "b" / "set", 100)).build()
    assert not [line for line in one.warnings if "are in the" in line]
    assert one.fingerprint != other.fingerprint


def test_given_parts_are_taken_as_they_are(tmp_path: Path) -> None:
    photos(tmp_path / "train", {"cat": 10, "dog": 10})
    photos(tmp_path / "valid", {"cat": 3, "dog": 1}, first=100)
    photos(tmp_path / "test", {"cat": 2, "dog": 5}, first=200)
    data = folder(tmp_path, profile={"name": "counts", "counts": [8, 4]}).build()
    assert data.class_counts.tolist() == data.pool_counts.tolist() == [8, 4]
    assert counts_of(data.validation, 2) == [3, 1]
    assert counts_of(data.test, 2) == [2, 5]


def test_a_missing_part_is_split_off_the_training_folder(tmp_path: Path) -> None:
    photos(tmp_path / "train", {"cat": 10, "dog": 10})
    photos(tmp_path / "test", {"cat": 2, "dog": 5}, first=100)
    data = folder(tmp_path).build()
    assert counts_of(data.test, 2) == [2, 5]
    assert counts_of(data.validation, 2) == [2, 2]
    (tmp_path / "test").rename(tmp_path / "val")
    data = folder(tmp_path).build()
    assert counts_of(data.validation, 2) == [2, 5]
    assert counts_of(data.test, 2) == [2, 2]


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    photos(tmp_path, {"boat": 6, "train": 6})
    assert folder(tmp_path).build().class_names == ("boat", "train")


def test_no_test_part_is_made_when_none_is_wanted(root: Path) -> None:
    data = folder(root, test_fraction=0).build()
    assert data.test is None
    assert data.pool_counts.tolist() == [40, 20, 10]


def test_test_images_are_not_decoded_before_they_are_asked_for(tmp_path: Path) -> None:
    photos(tmp_path / "train", {"cat": 6, "dog": 6})
    photos(tmp_path / "test", {"cat": 2, "dog": 2}, first=100)
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
    photos(tmp_path, {"ant": 12, "bee": 3, "cow": 2, "dodo": 1})
    data = folder(tmp_path).build()
    assert data.class_counts.tolist() == [8, 1, 1, 1]
    text = "\n".join(data.warnings)
    assert "fewer than 4 images" in text
    assert "'bee' (2), 'cow' (2), 'dodo' (1)" in text
    assert "without a validation image, which no validation metric counts: 'dodo'" in text
    assert "without a test image, which no test metric counts: 'cow', 'dodo'" in text


def test_the_same_image_in_training_and_test_is_pointed_out(tmp_path: Path) -> None:
    photos(tmp_path / "train", {"cat": 6, "dog": 6})
    photos(tmp_path / "test", {"cat": 2, "dog": 2}, first=100)
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
    photos(tmp_path, {"cat": 4, "dog": 6})
    photos(tmp_path / "cat", {"indoors": 4}, first=50)
    assert folder(tmp_path, test_fraction=0).build().pool_counts.tolist() == [8, 6]


def test_relative_roots_lie_in_the_data_folder(root: Path) -> None:
    data = dataset("image_folder", root=root.name, image_size=8).build(root.parent)
    assert data.fingerprint == folder(root).build().fingerprint
