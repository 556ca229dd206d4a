"""Fingerprints tell whether two texts are the same, and if not, where they begin to differ."""

import itertools
import json
import re

import numpy as np
import pytest

from jaxgpt.data import fingerprint

CONTENT = np.random.default_rng(0).bytes(3_000_000)
BEFORE = json.loads(json.dumps(fingerprint.of(CONTENT)))  # as a checkpoint gives it back


def test_the_same_is_the_same():
    assert fingerprint.difference(BEFORE, fingerprint.of(bytes(CONTENT))) == ""


@pytest.mark.parametrize("place", [0, 1, 4095, 4096, 262_143, 262_144, 1_234_567, 2_999_999])
def test_a_flipped_bit_lies_between_the_offsets_that_are_named(place):
    """The offsets are 4 KiB apart, or a 32nd of the bytes before the flipped one."""
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
    """There are a thousand or so for 20 GB, none of which is read here."""
    pieces = list(fingerprint._pieces(20_000_000_000))
    assert len(pieces) < 2000
    assert pieces[0][0] == 0
    assert pieces[-1][1] == 20_000_000_000
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(pieces))


@pytest.fixture(params=[True, False], ids=["read whole", "sampled"])
def files(tmp_path, monkeypatch, request):
    """Two files, and a function that changes a byte of one and tells what differs."""
    if not request.param:
        monkeypatch.setattr(fingerprint, "READ_WHOLE", 1)
    paths = [tmp_path / "a.bin", tmp_path / "b.bin"]
    for path in paths:
        path.write_bytes(CONTENT)
    before = json.loads(json.dumps(fingerprint.of_files(paths, {"a.bin": "1", "b.bin": "2"})))

    def difference(content=None, sums=None) -> str:
        if content is not None:
            paths[1].write_bytes(content)
        return fingerprint.difference(before, fingerprint.of_files(paths, sums or {"a.bin": "1", "b.bin": "2"}))

    difference.whole = request.param
    return difference


@pytest.mark.parametrize("place", [0, 4095, 2_995_904, 2_999_999])
def test_a_changed_file_is_named_and_where(files, place):
    assert files() == ""
    changed = bytearray(CONTENT)
    changed[place] ^= 1
    message = files(bytes(changed))
    matched = re.fullmatch(r"the file b\.bin: it differs between the byte offsets (\d+) and (\d+)", message)
    assert matched
    assert int(matched[1]) <= place < int(matched[2])


def test_files_that_were_cut_off_or_prepared_anew(files):
    changed = "the file b.bin: its SHA-256 in the manifest is another"  # which tells nothing where all was read
    assert files(sums={"a.bin": "1", "b.bin": "3"}) == ("" if files.whole else changed)
    assert files(CONTENT[:-1]).startswith("the file b.bin: it ends at byte offset 2999999")


def test_other_data_of_any_kind(files, tmp_path):
    (tmp_path / "c.bin").write_bytes(CONTENT)
    both = fingerprint.of_files([tmp_path / "a.bin", tmp_path / "c.bin"], {})
    only = fingerprint.of_files([tmp_path / "a.bin"], {})
    assert fingerprint.difference(both, only) == "the file c.bin is missing"
    assert fingerprint.difference(only, both) == "the file c.bin is new"
    assert fingerprint.difference(BEFORE, only) == "it is of another kind"
    mixed = {"quotas": [1, 2], "sources": [BEFORE, both]}
    assert fingerprint.difference(mixed, mixed | {"quotas": [2, 1]}).startswith("the shares of 65,536 sequences were")
    other = {"quotas": [1, 2], "sources": [BEFORE, only]}
    assert fingerprint.difference(mixed, other) == "source 2: the file c.bin is missing"
