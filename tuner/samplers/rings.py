"""Rings: draws without replacement per class, shuffled anew after every full turn."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Words = NDArray[np.uint64]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Rings(NamedTuple):
    """One ring per class: its images, where it begins, its size and the draws already made.

    ``order`` holds image indices class by class; the ring of class c is made of
    ``order[start[c] : start[c] + size[c]]``.
    """

    order: Integers
    start: Integers
    size: Integers
    drawn: Integers
    key: int


def draw(rings: Rings, classes: Integers) -> Integers:
    """Next image of each class in ``classes`` (L,), in that order; returns (L,) indices.

    The j-th draw of class c since the beginning is π(key, c, j // n_c)[j mod n_c], with π
    a shuffle of the class that depends on its arguments alone. Any draw can therefore be
    recomputed from the counters, and an image returns only after the whole class was shown.
    """
    # Numbers of two bytes are sorted in one pass.
    narrow = classes.astype(np.uint16) if len(rings.size) <= 2**16 else classes
    by_class = np.argsort(narrow, kind="stable")
    ordered = classes[by_class]
    draws = np.bincount(classes, minlength=len(rings.size))
    ordinal = rings.drawn[ordered] + _positions(draws)
    present = np.flatnonzero(draws)
    size, first = rings.size[present], rings.drawn[present] // rings.size[present]
    turns = (rings.drawn[present] + draws[present] - 1) // size - first + 1
    shuffled = _shuffles(present, size, first, turns, rings.key)
    begin = np.zeros_like(rings.size)
    begin[present] = _starts(turns * size) - first * size
    images = np.empty_like(classes)
    images[by_class] = rings.order[rings.start[ordered] + shuffled[begin[ordered] + ordinal]]
    return images


def _shuffles(
    classes: Integers, size: Integers, first: Integers, turns: Integers, key: int
) -> Integers:
    """Shuffles of ``turns`` successive turns of every class, one after the other."""
    turn = np.repeat(first, turns) + _positions(turns)
    block_class, block_size = np.repeat(classes, turns), np.repeat(size, turns)
    block_key = _mix(_mix(np.uint64(key) ^ block_class.astype(np.uint64)) ^ turn.astype(np.uint64))
    position = _positions(block_size)
    block = np.repeat(np.arange(len(turn), dtype=np.uint64), block_size)
    words = _mix(block_key[block] + position.astype(np.uint64) * GOLDEN)
    bits = np.uint64(len(turn).bit_length())
    sorting = (block << (np.uint64(64) - bits)) | (words >> bits)
    return position[stable_order(sorting)]


def stable_order(words: Words) -> Integers:
    """``np.argsort(words, kind="stable")``, in half the time where their upper bits all differ.

    The places lie in the lower bits then, and the words themselves are sorted.
    """
    bits = np.uint64(len(words).bit_length())
    places = np.arange(len(words), dtype=np.uint64)
    packed = np.sort(words >> bits << bits | places)
    upper = packed >> bits
    if (upper[1:] == upper[:-1]).any():
        return np.argsort(words, kind="stable")
    return (packed & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)


def _mix(words: Words) -> Words:
    """Finaliser of SplitMix64 (Steele, Lea and Flood 2014), a bijection of 64-bit words."""
    words = words + GOLDEN
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _starts(sizes: Integers) -> Integers:
    return np.cumsum(sizes) - sizes


def _positions(sizes: Integers) -> Integers:
    """0, 1, … size - 1 for every size, one after the other."""
    return np.arange(sizes.sum()) - np.repeat(_starts(sizes), sizes)


def unseen_share(draws_per_image: NDArray[np.float64]) -> NDArray[np.float64]:
    """Expected share of a ring that a stretch of draws misses, f = draws / ring size.

    Averaged over where in its turn the ring stands: 1 - f + f³/6 below one turn (the cubic
    term is what an unlucky new turn repeats), (2 - f)³/6 below two turns, else 0. Exact
    for large rings.
    """
    f = np.clip(draws_per_image, 0.0, 2.0)
    return np.where(f < 1, 1 - f + f**3 / 6, (2 - f) ** 3 / 6)
