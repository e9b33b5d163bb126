"""One image file to pixels, and many files at once with every broken one named."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from multiprocessing.pool import ThreadPool
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tuner.errors import DataError
from tuner.slots import usable_cores

if TYPE_CHECKING:
    from PIL.Image import Image

NAMED = 5
"""How many broken files an error names; the rest are counted."""

DECODER = "torchvision, else Pillow; 2"
"""How files become pixels: other ways would give pixels that differ a little."""

DRAFTED = 4
"""How many times as large as needed a JPEG is decoded at reduced scale."""

SMALL_FILE = 8 * 1024
"""Mean bytes of a file below which threads only get in each other's way."""


class BrokenImageError(DataError):
    """An image file that cannot be decoded."""


class BrokenImagesError(DataError):
    """Image files of one part or of several that cannot be decoded."""


def decode(path: str, size: int, channels: int) -> NDArray[np.uint8]:
    """Pixels (channels, size, size) of the largest centred square of an image file.

    The square is scaled with antialiasing. The picture is turned as its EXIF data say, and
    palettes, transparency, CMYK and 16-bit grey become grey (1 channel) or RGB (3 channels).

    Raises:
        BrokenImageError: The file is missing, truncated or not an image.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            if _is_plain_jpeg(image, size):
                with contextlib.suppress(RuntimeError):  # what torchvision refuses, Pillow judges
                    return _by_torchvision(path, size, channels)
            return _by_pillow(image, size, channels)
    except Exception as error:  # Pillow's plugins raise whatever a broken file leads them to
        raise BrokenImageError(f"{path} ({_reason(error, path)})") from error


def _reason(error: Exception, path: str) -> str:
    """What is wrong with a file, without its path, which Pillow and the system repeat."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return said.removesuffix(f" {path!r}") or type(error).__name__


def decode_all(
    paths: Sequence[str], size: int, channels: int, keep: Callable[[int, NDArray[np.uint8]], Any]
) -> None:
    """Decode every file and hand ``keep`` its index and pixels (channels, size, size).

    Large files are decoded on all cores, so that ``keep`` is called by several threads; never
    after the return, or after an error.

    Raises:
        BrokenImagesError: Some files are broken; all are counted and the first five named.
    """
    if broken := undecodable(paths, size, channels, keep):
        raise BrokenImagesError(broken_images(broken, f"{len(broken)} of {len(paths)} images"))


def undecodable(
    paths: Sequence[str],
    size: int,
    channels: int,
    keep: Callable[[int, NDArray[np.uint8]], Any] = lambda index, pixels: None,
) -> list[str]:
    """What is wrong with each broken file, in their order; see ``decode_all``."""

    def fill(index: int) -> str | None:
        try:
            pixels = decode(paths[index], size, channels)
        except BrokenImageError as error:
            return str(error)
        keep(index, pixels)
        return None

    pool = ThreadPool(_threads(paths))
    try:
        outcomes = pool.imap(fill, range(len(paths)), chunksize=64)
        return [outcome for outcome in outcomes if outcome is not None]
    finally:
        # After an error of ``keep`` threads would go on, and write to what is closed by then.
        pool.terminate()
        pool.join()


def decoded(paths: Sequence[str], size: int, channels: int) -> NDArray[np.uint8]:
    """Pixels (N, channels, size, size) of every file.

    Raises:
        DataError: See ``decode_all``.
    """
    pixels = np.empty((len(paths), channels, size, size), dtype=np.uint8)
    decode_all(paths, size, channels, pixels.__setitem__)
    return pixels


def _threads(paths: Sequence[str]) -> int | None:
    """One thread for small files, whose headers cost more interpreter time than their pixels.

    Measured on 1 KB JPEGs (CIFAR-10): 11500 images/s with one thread, 6600 with two.
    """
    probed = [path for path in paths[:: len(paths) // 32 + 1] if os.path.exists(path)]
    mean_size = sum(os.path.getsize(path) for path in probed) / max(1, len(probed))
    return 1 if mean_size < SMALL_FILE else usable_cores()


def broken_images(broken: Sequence[str], which: str) -> str:
    """Say that the ``which`` images, by number, are broken, and what the first of them have."""
    more = f"; and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
    named = "; ".join(broken[:NAMED])
    return f"{which} cannot be decoded: {named}{more}. Replace these files or remove them"


def _is_plain_jpeg(image: Image, size: int) -> bool:
    """Whether torchvision gives what Pillow gives, and not later.

    It knows of no orientation but EXIF's, and decodes at full scale only.
    """
    return (
        image.format == "JPEG"
        and image.mode in ("L", "RGB")
        and min(image.size) < DRAFTED * size
        and b"Orientation" not in image.info.get("xmp", b"")
    )


def _by_torchvision(path: str, size: int, channels: int) -> NDArray[np.uint8]:
    """The same pixels as Pillow's, as both decode with libjpeg-turbo, but twice as fast."""
    import torch
    from torch.nn.functional import interpolate
    from torchvision.io import ImageReadMode, decode_jpeg, read_file

    mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
    pixels = decode_jpeg(read_file(path), mode, apply_exif_orientation=True)
    height, width = pixels.shape[1:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square: NDArray[np.uint8] = pixels[:, top : top + side, left : left + side].numpy()
    if side == size:
        return square
    # Copied by NumPy: torch would start threads for it, which get in the way of those here.
    rows = torch.from_numpy(np.ascontiguousarray(square.transpose(1, 2, 0))).permute(2, 0, 1)
    scaled = interpolate(rows[None], (size, size), mode="bilinear", antialias=True)[0]
    found: NDArray[np.uint8] = scaled.numpy()
    return found


def _by_pillow(image: Image, size: int, channels: int) -> NDArray[np.uint8]:
    mode = "L" if channels == 1 else "RGB"
    # A JPEG far larger than needed is decoded at 1/2, 1/4 or 1/8; twice the wanted size is left
    # for the antialiased scaling.
    image.draft(mode, (DRAFTED // 2 * size, DRAFTED // 2 * size))
    upright = _eight_bit(_upright(image))
    if upright.mode == "LAB":  # which Pillow turns into colours only
        upright = upright.convert("RGB")
    pixels = np.asarray(_centre_square(upright.convert(mode), size))
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _upright(image: Image) -> Image:
    """The picture turned as its EXIF data, or XMP data, say; as it is where they are damaged.

    ``ImageOps.exif_transpose`` also writes all data anew, and fails where one is of another type
    than it should be.
    """
    from PIL.ExifTags import Base
    from PIL.Image import Transpose

    try:
        orientation = image.getexif().get(Base.Orientation, 1)
    except Exception:  # Pillow's parser raises whatever damaged data lead it to
        return image
    turn = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }.get(orientation)
    return image if turn is None else image.transpose(turn)


def _centre_square(image: Image, size: int) -> Image:
    from PIL.Image import Resampling

    width, height = image.size
    if width == height == size:
        return image
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Resampling.BILINEAR, box)


def _eight_bit(image: Image) -> Image:
    """Scale 16-bit grey to 8 bits; Pillow's own conversion would clip it to white.

    Raises:
        ValueError: Its pixels are floating-point numbers that would become black or white.
    """
    if image.mode == "F":
        low, high = np.asarray(image).min(), np.asarray(image).max()
        if not (low >= 0 and 1 < high <= 255):
            raise ValueError(f"pixels from {low:g} to {high:g}; save them as whole numbers")
    if not image.mode.startswith("I"):
        return image
    from PIL.Image import fromarray

    values: NDArray[Any] = np.asarray(image)
    return fromarray((values.clip(0, 65535) // 256).astype(np.uint8))
