"""The permutation that takes no memory."""

from collections import Counter

import numpy as np
import pytest

from jaxgpt.data import permutation


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 9, 63, 64, 65, 1000, 65_536, 100_003])
def test_every_number_has_its_place(count):
    for seed in range(3):
        found = permutation.permuted(np.arange(count), count, permutation.keys(seed))
        assert sorted(found.tolist()) == list(range(count))


def test_a_place_does_not_depend_on_what_else_is_asked_for():
    keys = permutation.keys(1, 2)
    whole = permutation.permuted(np.arange(1000), 1000, keys)
    assert permutation.permuted(np.array([17, 3, 999]), 1000, keys).tolist() == whole[[17, 3, 999]].tolist()


def test_billions_take_no_memory():
    count = 10**11
    places = np.array([0, 1, 2, count // 2, count - 1])
    found = permutation.permuted(places, count, permutation.keys(0))
    assert len(set(found.tolist())) == 5
    assert 0 <= found.min() <= found.max() < count


def test_all_orders_of_four_come_up_equally_often():
    """Chi-squared of 24 orders in 4,800 draws: 23 degrees of freedom, beyond 59 with a probability of 5 in 100,000."""
    draws = [tuple(permutation.permuted(np.arange(4), 4, permutation.keys(i)).tolist()) for i in range(4_800)]
    counts = Counter(draws)
    assert len(counts) == 24
    assert sum((n - 200) ** 2 / 200 for n in counts.values()) < 59


def test_neighbours_are_torn_apart_and_no_place_is_preferred():
    """Of 10⁵ windows: no correlation with the place, nor between neighbours (five standard deviations)."""
    count = 100_000
    found = permutation.permuted(np.arange(count), count, permutation.keys(5))
    assert abs(np.corrcoef(found, np.arange(count))[0, 1]) < 5 / count**0.5
    assert abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < 5 / count**0.5
    assert 0.5 < np.sum(found == np.arange(count)) + 0.6 < 12  # a random one has 1 fixed point on average
