"""Every reader on files that are wrong: it reads them or says UserError, soon and in little memory.

`python -m benchmarks.fuzz` tries more of the same.
"""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import fuzz
from benchmarks.fuzz_readers import Reader
from benchmarks.mutations import mutate
from jaxgpt.errors import UserError

SEEDS = {reader.name: reader.seeds() for reader in fuzz.READERS}
SMALL = {name: [seed for seed in seeds if sum(map(len, seed.values())) < 50_000] for name, seeds in SEEDS.items()}
READERS = pytest.mark.parametrize("reader", fuzz.READERS, ids=lambda reader: reader.name)


@pytest.fixture(scope="module")
def trial():
    with fuzz.trial() as result:
        yield result


@READERS
def test_valid_files_are_read(trial, reader):
    for seed in [SMALL[reader.name][0], SMALL[reader.name][-1]]:
        assert trial.try_one(reader, seed) == "read"


@READERS
@settings(max_examples=20)
@given(st.integers(0, 2**32))
def test_mutated_files(trial, reader, number):
    choose = random.Random(number)
    assert trial.try_one(reader, mutate(choose.choice(SMALL[reader.name]), choose)) in ("read", "refused")


@READERS
@settings(max_examples=20)
@given(st.data())
def test_bytes_in_the_place_of_a_file(trial, reader, data):
    seed = SEEDS[reader.name][0]
    changed = {data.draw(st.sampled_from(sorted(seed))): data.draw(st.binary(max_size=3000))}
    assert trial.try_one(reader, seed | changed) in ("read", "refused")


def for_ever() -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("reads", "ended"),
    [
        (lambda _: 1, "read"),
        (lambda _: (_ for _ in ()).throw(UserError("no")), "refused"),
        (lambda _: {}["key"], "KeyError: 'key'"),
        (lambda _: bytearray(fuzz.CONSTANT + 2000), "bytes allocated for 3"),
        (lambda _: for_ever(), "Hang: too long"),
    ],
)
def test_what_the_fuzzer_calls_a_failure(trial, monkeypatch, reads, ended):
    monkeypatch.setattr(fuzz, "LIMIT_SECONDS", 0.1)

    def run(folder):
        next(iter([reads(folder)]))

    assert ended in trial.try_one(Reader("made up", list, run), {"x": b"abc"})
