"""Images: what is decoded, that both holders agree, and what is said about broken files."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from tuner.datasets import MappedImages, ResidentImages, StreamedImages, _ahead, _images, _padded
from tuner.datasets._decode import _by_pillow, decode, decoded
from tuner.datasets._images import channel_statistics, joined
from tuner.errors import DataError


def picture(seed: int, height: int, width: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def save(path: Path, pixels: NDArray[np.uint8]) -> str:
    Image.fromarray(pixels).save(path)
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    return [save(tmp_path / f"{i}.png", picture(i, 12 + i, 20 - i)) for i in range(9)]


def test_an_image_of_the_right_size_is_decoded_unchanged(tmp_path: Path) -> None:
    pixels = picture(0, 16, 16)
    decoded = decode(save(tmp_path / "a.png", pixels), 16, 3)
    assert np.array_equal(decoded, pixels.transpose(2, 0, 1))


@pytest.mark.parametrize(("height", "width", "most"), [(40, 40, 0), (40, 61, 3), (90, 40, 3)])
def test_scaling_agrees_with_torchvision(
    tmp_path: Path, height: int, width: int, most: int
) -> None:
    from torchvision.transforms import v2

    pixels = picture(1, height, width)
    steps = v2.Compose([v2.Resize(16), v2.CenterCrop(16), v2.PILToTensor()])
    expected = steps(Image.fromarray(pixels)).numpy().astype(int)
    decoded = decode(save(tmp_path / "a.png", pixels), 16, 3).astype(int)
    # torchvision crops whole pixels after scaling, at most half a pixel off the centre.
    assert np.abs(decoded - expected).mean() <= most


def test_a_large_jpeg_decoded_at_reduced_scale_looks_the_same(tmp_path: Path) -> None:
    pixels = picture(2, 640, 640)
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95)
    expected = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR))
    decoded = decode(str(tmp_path / "a.jpg"), 32, 3).transpose(1, 2, 0)
    assert np.abs(decoded.astype(int) - expected.astype(int)).mean() < 2


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK", "LAB", "YCbCr"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_grey_or_rgb(tmp_path: Path, mode: str, channels: int) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(picture(3, 8, 8)).convert(mode).save(path)
    assert decode(str(path), 8, channels).shape == (channels, 8, 8)


def test_sixteen_bit_grey_keeps_its_contrast(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    assert np.array_equal(decode(str(tmp_path / "a.png"), 8, 1)[0], ramp // 256)


@pytest.mark.parametrize("brightest", [1.0, 65535.0])
def test_floating_point_pixels_that_would_become_black_or_white_are_refused(
    tmp_path: Path, brightest: float
) -> None:
    ramp = np.linspace(0, brightest, 64).reshape(8, 8).astype(np.float32)
    Image.fromarray(ramp).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a.tif \(pixels from 0 to .*; save them as whole numbers"):
        decode(str(tmp_path / "a.tif"), 8, 1)


def test_floating_point_pixels_from_0_to_255_are_kept(tmp_path: Path) -> None:
    ramp = np.arange(64).reshape(8, 8).astype(np.float32)
    Image.fromarray(ramp).save(tmp_path / "a.tif")
    assert np.array_equal(decode(str(tmp_path / "a.tif"), 8, 1)[0], ramp)


def test_a_photo_is_turned_as_its_camera_noted(tmp_path: Path) -> None:
    pixels = picture(4, 8, 8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    decoded = decode(str(tmp_path / "a.png"), 8, 3).transpose(1, 2, 0)
    assert np.array_equal(decoded, np.rot90(pixels, -1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_turn_is_that_of_pillow(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture(4, 8, 8)).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(decode(str(tmp_path / "a.png"), 8, 3).transpose(1, 2, 0), expected)


RESOLUTION_UNIT_AS_TEXT = struct.pack("<HHI4s", 0x0128, 2, 2, b"2")


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize(
    ("damaged", "turned"),
    [
        (struct.pack("<4sIH", b"II*\0", 8, 2) + RESOLUTION_UNIT_AS_TEXT, True),
        (b"no data at all", False),
        (b"II*\0", False),
    ],
    ids=["number as text", "no header", "cut short"],
)
def test_a_photo_with_damaged_exif_data_is_read_at_every_size(
    tmp_path: Path, damaged: bytes, turned: bool, suffix: str
) -> None:
    orientation = struct.pack("<HHIII", 0x0112, 3, 1, 3, 0) if turned else b""
    path, pixels = tmp_path / f"a{suffix}", picture(5, 96, 96)
    Image.fromarray(pixels).save(path, exif=b"Exif\0\0" + damaged + orientation, quality=95)
    for size in (8, 96):
        upright = np.rot90(pixels, 2) if turned else pixels
        expected = np.asarray(Image.fromarray(upright).resize((size, size), 2))
        found = decode(str(path), size, 3).transpose(1, 2, 0)
        assert np.abs(found.astype(int) - expected).mean() < 4


def test_all_broken_files_are_counted_and_five_are_named(tmp_path: Path, files: list[str]) -> None:
    for path in files[:7]:
        Path(path).write_bytes(Path(path).read_bytes()[:60])
    with pytest.raises(DataError, match=r"7 of 9 images cannot be decoded.*and 2 more") as error:
        decoded(files, 8, 3)
    assert [path in str(error.value) for path in files] == [True] * 5 + [False] * 4


def test_large_files_decoded_by_many_threads_stay_in_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (130, 80, 80, 3), dtype=np.uint8)
    paths = [save(tmp_path / f"{i}.png", pixels) for i, pixels in enumerate(noise)]
    assert np.array_equal(decoded(paths, 80, 3), noise.transpose(0, 3, 1, 2))


def test_files_that_are_no_images_or_empty_are_broken(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").touch()
    for name in ("text.png", "empty.png", "missing.png"):
        with pytest.raises(DataError, match=name):
            decode(str(tmp_path / name), 8, 3)


def by_pillow(path: Path, size: int, channels: int) -> NDArray[np.int64]:
    with Image.open(path) as image:
        return _by_pillow(image, size, channels).astype(int)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("channels", [1, 3])
def test_a_jpeg_has_the_same_pixels_with_either_decoder(
    tmp_path: Path, orientation: int, channels: int
) -> None:
    path, exif = tmp_path / "a.jpg", Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture(6, 40, 56)).save(path, exif=exif)
    assert np.array_equal(decode(str(path), 40, channels), by_pillow(path, 40, channels))


@pytest.mark.parametrize("size", [24, 60])
def test_a_scaled_jpeg_looks_the_same_with_either_decoder(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(picture(7, 40, 56)).save(path)
    difference = np.abs(decode(str(path), size, 3) - by_pillow(path, size, 3))
    assert (difference.mean() < 1, difference.max() < 8) == (True, True)


def test_a_jpeg_that_only_its_xmp_says_to_turn_is_turned(tmp_path: Path) -> None:
    path, pixels = tmp_path / "a.jpg", picture(4, 64, 64)
    about = b'<x:xmpmeta><rdf:li tiff:Orientation="6"/></x:xmpmeta>'
    Image.fromarray(pixels).save(path, quality=100, xmp=about)
    turned = np.rot90(pixels, -1).astype(int)
    decoded_pixels = decode(str(path), 64, 3).transpose(1, 2, 0).astype(int)
    assert np.abs(decoded_pixels - turned).mean() < 12 < np.abs(decoded_pixels - pixels).mean()


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_print_jpegs_become_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(picture(3, 8, 8)).convert(mode).save(path)
    assert np.array_equal(decode(str(path), 8, 3), by_pillow(path, 8, 3))


def test_a_truncated_jpeg_is_broken(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(picture(5, 64, 64)).save(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"a\.jpg"):
        decode(str(path), 8, 3)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_streamed_and_resident_images_give_the_same_batches(files: list[str], workers: int) -> None:
    resident = ResidentImages(torch.from_numpy(decoded(files, 8, 3)))
    streamed = StreamedImages(tuple(files), 8, 3)
    order = [torch.tensor([3, 0, 3]), torch.tensor([8]), torch.tensor([1, 8])]
    assert (len(streamed), streamed.shape) == (len(resident), resident.shape) == (9, (3, 8, 8))
    pairs = zip(streamed.batches(order, workers=workers), resident.batches(order), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_select_keeps_the_order_asked_for(files: list[str]) -> None:
    resident = ResidentImages(torch.from_numpy(decoded(files, 8, 3)))
    streamed = StreamedImages(tuple(files), 8, 3)
    chosen = torch.tensor([7, 2])
    (expected,) = resident.batches([chosen])
    for images in (resident.select(chosen), streamed.select(chosen)):
        (batch,) = images.to("cpu").batches([torch.arange(2)])
        assert torch.equal(batch, expected)


def test_mapped_images_give_the_same_batches_in_the_order_asked_for(files: list[str]) -> None:
    pixels = torch.from_numpy(decoded(files, 8, 3))
    mapped = MappedImages(pixels, torch.arange(9)).select(torch.tensor([8, 1, 4]))
    assert (len(mapped), mapped.shape) == (3, (3, 8, 8))
    (batch,) = mapped.to("cpu").batches([torch.tensor([2, 0])])
    assert torch.equal(batch, pixels[[4, 8]])


def test_batches_gathered_ahead_come_all_and_in_order(
    files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)  # needs a GPU
    mapped = MappedImages(torch.from_numpy(decoded(files, 8, 3)), torch.arange(9))
    order = list(torch.split(torch.arange(9).flip(0), 2))
    ahead = list(mapped.batches(order, pin=True))
    assert torch.equal(torch.cat(ahead), mapped.tensor.flip(0))


def test_images_in_a_row_are_selected_without_a_copy() -> None:
    images = ResidentImages(torch.randint(0, 256, (6, 1, 2, 2), dtype=torch.uint8))
    part = images.select(torch.arange(2, 5))
    assert torch.equal(part.tensor, images.tensor[2:5])
    assert part.tensor.data_ptr() == images.tensor[2].data_ptr()


def test_many_images_are_chosen_from_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    images = ResidentImages(torch.randint(0, 256, (6, 1, 2, 2), dtype=torch.uint8))
    chosen, again = torch.tensor([5, 0, 3, 2]), torch.tensor([3, 1])
    few = images.select(chosen)
    monkeypatch.setattr(_images, "COPIED_BYTES", 0)
    many = images.select(chosen)
    assert many.tensor.data_ptr() == images.tensor.data_ptr()
    assert (len(many), many.shape) == (len(few), few.shape)
    for part, same in ((many, few), (many.select(again), few.select(again))):
        assert torch.equal(part.pixels, same.pixels)
        order = [torch.tensor([1, 0, 1])]
        assert torch.equal(*(next(iter(each.batches(order))) for each in (part, same)))
    assert many.crops(1) is None


def test_parts_that_lie_side_by_side_are_joined_without_a_copy() -> None:
    images = ResidentImages(torch.randint(0, 256, (6, 1, 2, 2), dtype=torch.uint8))
    first, second, third = (images.select(torch.arange(i, i + 2)) for i in (0, 2, 4))
    both = joined(first, second)
    assert isinstance(both, ResidentImages)
    assert both.tensor.data_ptr() == images.tensor.data_ptr()
    assert torch.equal(both.tensor, images.tensor[:4])
    for others in ((first, third), (second, first), (first, ResidentImages(third.tensor.clone()))):
        apart = joined(*others)
        assert isinstance(apart, ResidentImages)
        assert torch.equal(apart.tensor, torch.cat([each.tensor for each in others]))


def test_few_padded_copies_are_kept_and_those_in_use_are_shared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = ResidentImages(torch.randint(0, 256, (5, 1, 4, 4), dtype=torch.uint8))
    monkeypatch.setattr(_padded, "PADDED_BYTES", 5 * 6 * 6 + 5 * 8 * 8)
    made: list[int] = []

    def counted(pixels: Tensor, margins: list[int]) -> Tensor:
        made.append(margins[0])
        return torch.nn.functional.pad(pixels, margins)

    monkeypatch.setattr(_padded, "pad", counted)
    used = images.crops(1)
    for margin in (2, 1, 3, 3, 1):
        crops = images.crops(margin)
        assert crops is not None
        assert torch.equal(crops[:, :, margin, margin], images.tensor)
    assert made == [1, 2, 3], "the first is shared, though there was no room to keep it"
    assert images.crops(1) is used
    del used, crops
    images.crops(3)
    images.crops(1)
    images.crops(2)
    assert made == [1, 2, 3, 3, 1, 2]
    assert sum(images.padded.kept) == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_streamed_image_is_named_in_one_line(files: list[str], workers: int) -> None:
    Path(files[4]).write_bytes(b"broken")
    batches = StreamedImages(tuple(files), 8, 3).batches([torch.arange(9)], workers=workers)
    with pytest.raises(DataError, match=r"4\.png") as error:
        next(batches)
    assert "\n" not in str(error.value)


def test_no_more_processes_decode_than_there_are_batches_or_shared_memory_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = list(torch.split(torch.arange(30), 4))

    def with_room(images: int) -> int:
        usage = SimpleNamespace(free=images * 10)
        monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
        return _ahead.loaders(16, batches, 10)

    monkeypatch.setattr(_ahead, "SHARED", tmp_path)
    assert [with_room(images) for images in (10**6, 48, 47, 0)] == [8, 3, 2, 1]
    assert _ahead.loaders(0, batches, 10) == 0
    monkeypatch.setattr(_ahead, "SHARED", tmp_path / "none")
    assert _ahead.loaders(16, batches, 10) == 8
    assert _ahead.loaders(16, [], 10) == 1


def test_streaming_leaves_the_global_generator_alone(files: list[str]) -> None:
    before = torch.get_rng_state()
    list(StreamedImages(tuple(files), 8, 3).batches([torch.arange(2)], workers=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_channel_statistics_agree_with_numpy() -> None:
    pixels = torch.randint(0, 256, (700, 3, 4, 5), dtype=torch.uint8)
    mean, std = channel_statistics(ResidentImages(pixels))
    values = pixels.numpy() / 255
    np.testing.assert_allclose(mean, values.mean(axis=(0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(std, values.std(axis=(0, 2, 3)), rtol=1e-6)


def test_a_constant_channel_has_a_deviation_to_divide_by() -> None:
    _, std = channel_statistics(ResidentImages(torch.full((3, 1, 4, 4), 7, dtype=torch.uint8)))
    assert std[0] == pytest.approx(1 / 255)


def test_statistics_of_many_streamed_images_use_a_sample(files: list[str]) -> None:
    streamed = StreamedImages(tuple(files), 8, 3)
    every_third = streamed.select(torch.tensor([0, 3, 6]))
    assert channel_statistics(streamed, at_most=3) == channel_statistics(every_third)


def test_statistics_of_many_large_images_in_memory_are_those_of_a_sample(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = ResidentImages(torch.randint(0, 256, (9, 3, 4, 5), dtype=torch.uint8))
    monkeypatch.setattr(_images, "COUNTED_BYTES", 100)
    every_third = channel_statistics(images.select(torch.tensor([0, 3, 6])))
    assert channel_statistics(images, at_most=3) == every_third


@pytest.mark.gpu
def test_streamed_batches_on_a_gpu_are_those_of_the_files(files: list[str]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    streamed = StreamedImages(tuple(files), 8, 3)
    order = list(torch.split(torch.arange(len(files)), 2))
    # Each is used and given back before the next one comes, as in training.
    there = [batch.clone() for batch in streamed.to("cuda").batches(order, workers=2, pin=True)]
    assert all(batch.is_cuda for batch in there)
    pairs = zip(there, streamed.batches(order), strict=True)
    assert all(torch.equal(batch.cpu(), here) for batch, here in pairs)


@pytest.mark.gpu
def test_mapped_batches_on_a_gpu_are_those_of_the_tensor(files: list[str]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pixels = torch.from_numpy(decoded(files, 8, 3))
    order = list(torch.split(torch.arange(len(files)).flip(0), 2))
    mapped = MappedImages(pixels, torch.arange(len(files))).to("cuda")
    there = [batch.clone() for batch in mapped.batches(order, workers=2, pin=True)]
    assert all(batch.is_cuda for batch in there)
    assert torch.equal(torch.cat(there).cpu(), pixels.flip(0))
