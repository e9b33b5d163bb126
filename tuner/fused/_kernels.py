"""Loops over maps in bfloat16 or float32 as they lie in memory, compiled for the processor at hand.

Maps are rows of pixels with all channels of a pixel together, (R, W * c), or squares of 2 x 2
pixels, (N, H/2, 2, W/2, 2, c). numpy knows no bfloat16: such maps come as uint16 with the same
bits. What belongs to a channel is (c,), in float64 where it comes of sums over many rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import llvmlite.ir as ir
import numpy as np
from numba import njit, types
from numba.extending import intrinsic

Function = TypeVar("Function", bound=Callable[..., Any])

FLAGS: dict[str, Any] = {
    # Not "nnan" and "ninf": what has diverged must stay so.
    "fastmath": {"contract", "nsz", "reassoc", "arcp"},
    "error_model": "numpy",
    "boundscheck": False,
    "cache": True,
    "nogil": True,
}
FOLDED_ROWS = 64
APART = 16
"""Places between two rows of sums, so that they never lie a multiple of 4 KB apart."""
ZERO = np.float32(0)
WORD = ir.IntType(32)
HALF = ir.Constant(WORD, 16)


def _loop(function: Function) -> Function:
    compiled: Function = njit(**FLAGS)(function)
    return compiled


def _wide_of(_context: Any, value: Any) -> Any:
    """A value of a map as float32."""

    def code(_target: Any, builder: Any, _signature: Any, given: Any) -> Any:
        if value == types.float32:
            return given[0]
        bits = builder.shl(builder.zext(given[0], WORD), HALF)
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(value), code


def _narrow_of(_context: Any, value: Any, maps: Any) -> Any:
    """A float32 as ``maps`` hold it; to bfloat16 rounded to the nearest, of two to the even one."""

    def code(_target: Any, builder: Any, _signature: Any, given: Any) -> Any:
        if maps.dtype == types.float32:
            return given[0]
        bits = builder.bitcast(given[0], WORD)
        odd = builder.and_(builder.lshr(bits, HALF), ir.Constant(WORD, 1))
        bits = builder.add(bits, builder.add(odd, ir.Constant(WORD, 0x7FFF)))
        return builder.trunc(builder.lshr(bits, HALF), ir.IntType(16))

    return maps.dtype(value, maps), code


_wide: Any = intrinsic(_wide_of)
_narrow: Any = intrinsic(_narrow_of)


@_loop
def _folded(rows: Any, sums: Any) -> None:
    """Add up each of two rows (2, >= W * c) by channel, (2, c)."""
    channels, length = sums.shape[1], rows.shape[1] - APART
    for which in range(2):
        for begin in range(0, length, channels):
            for c in range(channels):
                sums[which, c] += rows[which, begin + c]


@_loop
def _tiled(values: Any, length: Any) -> Any:
    """What belongs to channels for every place in a row, float32."""
    row = np.empty(length, np.float32)
    for begin in range(0, length, len(values)):
        for c in range(len(values)):
            row[begin + c] = values[c]
    return row


@_loop
def statistics(
    maps: Any, momentum: Any, eps: Any, kept_mean: Any, kept_variance: Any, mean: Any, inverse: Any
) -> None:
    """Mean and inverse deviation of maps (R, W * c); the kept statistics are moved towards them."""
    rows, length = maps.shape
    channels = len(mean)
    number = rows * (length // channels)
    near = np.empty(length, np.float32)
    for i in range(length):
        near[i] = _wide(maps[0, i % channels])
    sums, some = np.zeros((2, channels)), np.empty((2, length + APART), np.float32)
    for first in range(0, rows, FOLDED_ROWS):
        some[:] = 0
        for row in range(first, min(first + FOLDED_ROWS, rows)):
            for i in range(length):
                away = _wide(maps[row, i]) - near[i]
                some[0, i] += away
                some[1, i] += away * away
        _folded(some, sums)
    for c in range(channels):
        away = sums[0, c] / number
        variance = sums[1, c] / number - away * away
        variance = 0.0 if variance < 0.0 else variance
        mean[c] = near[c] + away
        inverse[c] = 1 / np.sqrt(variance + eps)
        kept_mean[c] += momentum * (mean[c] - kept_mean[c])
        kept_variance[c] += momentum * (variance * number / (number - 1) - kept_variance[c])


@_loop
def normed(
    maps: Any, mean: Any, inverse: Any, weight: Any, bias: Any, added: Any, positive: bool, out: Any
) -> None:
    """Maps (R, W * c) normed, with the maps ``added`` unless None, and where ``positive`` ReLU."""
    rows, length = maps.shape
    scale = _tiled(weight * inverse, length)
    shift = _tiled(bias - mean * weight * inverse, length)
    lowest = ZERO if positive else np.float32(-np.inf)
    for row in range(rows):
        for i in range(length):
            value = _wide(maps[row, i]) * scale[i] + shift[i]
            if added is not None:
                value += _wide(added[row, i])
            out[row, i] = _narrow(lowest if value < lowest else value, out)


@_loop
def _descent(maps: Any, mean: Any, inverse: Any, weight: Any, sums: Any, number: Any) -> Any:
    """Of a gradient with respect to maps: factors of the gradient and the maps, and the rest.

    Ioffe and Szegedy 2015, section 3, with the sums of the gradient and of its product with the
    maps less their mean.
    """
    scale = weight * inverse
    slope = -scale * inverse * inverse * sums[1] / number
    return scale, slope, -scale * sums[0] / number - slope * mean


@_loop
def learned(
    gradient: Any,
    out: Any,
    maps: Any,
    mean: Any,
    inverse: Any,
    weight: Any,
    masked: Any,
    sums: Any,
    into: Any,
) -> None:
    """Gradients of ``normed``: of the maps ``into`` them, of bias and weight as ``sums`` (2, c).

    ReLU let pass what is above 0 in ``out``, or there was none if that is None; ``masked`` gets the
    gradient that it let pass, unless None.
    """
    rows, length = maps.shape
    middle, some = _tiled(mean, length), np.empty((2, length + APART), np.float32)
    for first in range(0, rows, FOLDED_ROWS):
        some[:] = 0
        for row in range(first, min(first + FOLDED_ROWS, rows)):
            for i in range(length):
                value: Any = _wide(gradient[row, i])
                if out is not None:
                    value = ZERO if _wide(out[row, i]) <= ZERO else value
                if masked is not None:
                    masked[row, i] = _narrow(value, masked)
                some[0, i] += value
                some[1, i] += value * (_wide(maps[row, i]) - middle[i])
        _folded(some, sums)
    number = rows * (length // len(mean))
    factors = _descent(maps, mean, inverse, weight, sums, number)
    scale, slope, shift = [_tiled(each, length) for each in factors]
    for row in range(rows):
        for i in range(length):
            value = _wide(gradient[row, i]) * scale[i]
            if out is not None:
                value = ZERO if _wide(out[row, i]) <= ZERO else value
            into[row, i] = _narrow(value + _wide(maps[row, i]) * slope[i] + shift[i], into)
    sums[1] *= inverse


@_loop
def pooled(
    maps: Any, mean: Any, inverse: Any, weight: Any, bias: Any, out: Any, where: Any
) -> None:
    """ReLU of the largest of 2 x 2 pixels, normed with a positive weight: ``out`` (N, H/2, W/2, c).

    ``where`` gets the number of the pixel, the first of equal ones, unless it is None.
    """
    images, height, _, width, _, channels = maps.shape
    scale, shift = (
        _tiled(weight * inverse, channels),
        _tiled(bias - mean * weight * inverse, channels),
    )
    for n in range(images):
        for y in range(height):
            for x in range(width):
                for c in range(channels):
                    most, place = _wide(maps[n, y, 0, x, 0, c]), np.uint8(0)
                    value = _wide(maps[n, y, 0, x, 1, c])
                    place = np.uint8(1) if value > most or value != value else place
                    most = value if value > most or value != value else most
                    value = _wide(maps[n, y, 1, x, 0, c])
                    place = np.uint8(2) if value > most or value != value else place
                    most = value if value > most or value != value else most
                    value = _wide(maps[n, y, 1, x, 1, c])
                    place = np.uint8(3) if value > most or value != value else place
                    most = value if value > most or value != value else most
                    value = most * scale[c] + shift[c]
                    out[n, y, x, c] = _narrow(ZERO if value < ZERO else value, out)
                    if where is not None:
                        where[n, y, x, c] = place


@_loop
def pooled_learned(
    gradient: Any,
    out: Any,
    where: Any,
    maps: Any,
    mean: Any,
    inverse: Any,
    weight: Any,
    sums: Any,
    into: Any,
) -> None:
    """Gradients of ``pooled``, as of ``learned``."""
    images, height, _, width, _, channels = maps.shape
    middle, some = _tiled(mean, channels), np.empty((2, channels + APART), np.float32)
    for n in range(images):
        for y in range(height):
            some[:] = 0
            for x in range(width):
                for c in range(channels):
                    above = max(_wide(maps[n, y, 0, x, 0, c]), _wide(maps[n, y, 0, x, 1, c]))
                    below = max(_wide(maps[n, y, 1, x, 0, c]), _wide(maps[n, y, 1, x, 1, c]))
                    value = _wide(gradient[n, y, x, c])
                    value = ZERO if _wide(out[n, y, x, c]) <= ZERO else value
                    some[0, c] += value
                    some[1, c] += value * (max(above, below) - middle[c])
            _folded(some, sums)
    factors = _descent(maps, mean, inverse, weight, sums, 4 * images * height * width)
    scale, slope, shift = [_tiled(each, channels) for each in factors]
    part = np.empty(channels, np.float32)
    for n in range(images):
        for y in range(height):
            for x in range(width):
                for c in range(channels):
                    value = _wide(gradient[n, y, x, c]) * scale[c]
                    part[c] = ZERO if _wide(out[n, y, x, c]) <= ZERO else value
                for row in range(2):
                    for column in range(2):
                        here = np.uint8(2 * row + column)
                        for c in range(channels):
                            value = part[c]
                            value = value if where[n, y, x, c] == here else ZERO
                            value += _wide(maps[n, y, row, x, column, c]) * slope[c] + shift[c]
                            into[n, y, row, x, column, c] = _narrow(value, into)
    sums[1] *= inverse
