"""Whether a text is the same, and if not, where it begins to differ."""

import itertools
import json
import re

import numpy as np
import pytest

from jaxgpt.training import fingerprint

CONTENT = np.random.default_rng(0).bytes(3_000_000)
BEFORE = json.loads(json.dumps(fingerprint.of(CONTENT)))  # as a checkpoint gives it back


def test_the_same_is_the_same():
    assert fingerprint.difference(BEFORE, fingerprint.of(bytes(CONTENT))) == ""


@pytest.mark.parametrize("place", [0, 1, 4095, 4096, 262_143, 262_144, 1_234_567, 2_999_999])
def test_a_flipped_bit_lies_between_the_offsets_that_are_named(place):
    """Which are 4 KiB apart, or a 32nd of what lies before."""
    changed = bytearray(CONTENT)
    changed[place] ^= 1
    message = fingerprint.difference(BEFORE, fingerprint.of(bytes(changed)))
    matched = re.fullmatch(r"it differs between the byte offsets (\d+) and (\d+)", message)
    assert matched
    start, end = map(int, matched.groups())
    assert start <= place < end
    assert end - start <= max(4096, place / 32)


@pytest.mark.parametrize("size", [0, 1, 4096, 5000, 2_999_999])
def test_a_text_that_was_cut_off(size):
    message = fingerprint.difference(BEFORE, fingerprint.of(CONTENT[:size]))
    assert message == f"it ends at byte offset {size}, and had 3000000 bytes"


def test_a_text_that_grew():
    message = fingerprint.difference(BEFORE, fingerprint.of(CONTENT + b"x"))
    assert message == "it goes on after byte offset 3000000, where it ended"


def test_few_hashes_for_a_large_file():
    """A thousand or so for 20 GB, of which none is read here."""
    pieces = list(fingerprint._pieces(20_000_000_000))
    assert len(pieces) < 2000
    assert pieces[0][0] == 0
    assert pieces[-1][1] == 20_000_000_000
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(pieces))
