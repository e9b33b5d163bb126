"""Rings against their definition: counters, whole turns, fair shuffles."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from tuner.samplers.rings import Rings, draw, stable_order


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    epochs=st.lists(st.lists(st.integers(0, 4), max_size=30), max_size=4),
    key=st.integers(0, 2**63 - 1),
)
def test_rings_drawn_in_pieces_equal_one_long_draw(
    sizes: list[int], epochs: list[list[int]], key: int
) -> None:
    size = np.array(sizes)
    start, order = np.cumsum(size) - size, np.arange(size.sum()) * 10
    drawn, pieces = np.zeros_like(size), []
    for classes in (np.array(e, dtype=np.int64) % len(sizes) for e in epochs):
        pieces += draw(Rings(order, start, size, drawn, key), classes).tolist()
        drawn = drawn + np.bincount(classes, minlength=len(sizes))
    flat = np.array([c % len(sizes) for e in epochs for c in e], dtype=np.int64)
    assert pieces == draw(Rings(order, start, size, np.zeros_like(size), key), flat).tolist()
    for c in range(len(sizes)):
        mine = [i for i, k in zip(pieces, flat, strict=True) if k == c]
        counts = Counter(mine)
        assert set(mine) <= set(order[start[c] : start[c] + size[c]].tolist())
        assert not mine or max(counts.values()) == -(-len(mine) // sizes[c])


@settings(deadline=None, max_examples=60)
@given(
    words=st.lists(st.integers(0, 2**64 - 1), max_size=40),
    spread=st.sampled_from([0, 3, 59, 63]),
)
def test_words_are_ordered_as_by_a_stable_sort_also_where_they_tie(
    words: list[int], spread: int
) -> None:
    given_words = np.array(words, dtype=np.uint64) >> np.uint64(spread)
    expected = np.argsort(given_words, kind="stable")
    assert stable_order(given_words).tolist() == expected.tolist()


def test_every_order_of_a_ring_is_equally_likely() -> None:
    turns, size = 6000, np.array([3])
    rings = Rings(np.arange(3), np.array([0]), size, np.array([0]), key=7)
    drawn = draw(rings, np.zeros(3 * turns, dtype=np.int64)).reshape(turns, 3)
    orders = Counter(map(tuple, drawn.tolist()))
    assert len(orders) == 6
    assert chisquare(list(orders.values())).pvalue > 1e-3


def test_classes_of_equal_size_are_shuffled_independently() -> None:
    size = np.array([40, 40])
    rings = Rings(np.arange(80), np.array([0, 40]), size, np.zeros_like(size), key=7)
    first, second = draw(rings, np.repeat([0, 1], 40)).reshape(2, 40)
    assert (second - 40).tolist() != first.tolist()
