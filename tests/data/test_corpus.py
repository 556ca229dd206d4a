"""Token files as what a run trains on: found by name, read across their borders, refused where they are damaged."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt.commands import cli
from jaxgpt.data import corpus, loader, manifest, token_files
from jaxgpt.data.token_files import Shards
from jaxgpt.errors import UserError


def write(folder: Path, name: str, tokens, form=token_files.GPT2) -> Path:
    folder.mkdir(exist_ok=True)
    token_files.write(folder / name, np.asarray(tokens), form)
    return folder / name


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), start=st.integers(0, 60), length=st.integers(0, 60))
def test_slices_go_across_files(tmp_path, lengths, start, length):
    ends = np.cumsum(lengths)
    whole = np.arange(ends[-1])
    parts = np.split(whole, ends[:-1])
    found = Shards([write(tmp_path, f"{i:03}.bin", part) for i, part in enumerate(parts)])
    assert len(found) == len(whole)
    assert found[start : start + length].tolist() == whole[start : start + length].tolist()
    assert found[:].tolist() == whole.tolist()


def test_batches_of_files_are_those_of_one_array(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 65536, 1000)
    paths = [write(tmp_path, f"{i}.bin", part) for i, part in enumerate(np.split(tokens, [1, 300, 700]))]
    options = {"step": 7, "micro_batches": 2, "batch_size": 3, "sequence_length": 32, "seed": 1}
    for one, other in zip(loader.batch_at(Shards(paths), **options), loader.batch_at(tokens, **options), strict=True):
        np.testing.assert_array_equal(one, other)
    batches = [
        list(loader.validation_batches(data, batch_size=2, sequence_length=16)) for data in (Shards(paths), tokens)
    ]
    np.testing.assert_array_equal(*batches)


def test_windows_beyond_32_bits(tmp_path):
    """Three sparse files of 2³¹ tokens: the places of their tokens, counted in bytes, need 33 bits and more."""
    paths = []
    for i in range(3):
        path = tmp_path / f"{i}.bin"
        path.write_bytes(token_files.header(token_files.GPT2, 1 << 31))
        with path.open("r+b") as file:
            file.truncate(1024 + (1 << 32))
            file.seek(1024 + (1 << 32) - 2)
            file.write(np.uint16(i + 1).tobytes())
        paths.append(path)
    found = Shards(paths)
    assert len(found) == 3 << 31
    assert found[(1 << 32) - 2 : (1 << 32) + 1].tolist() == [0, 2, 0]
    _, starts = loader.places(loader.Mixture((found,)), np.arange(1000), 1024, 0)
    assert len(set(starts)) == 1000
    assert starts.max() > 2.9 * (1 << 31)
    assert loader.batch_at(found, step=5, micro_batches=1, batch_size=4, sequence_length=8, seed=0).tokens.shape


def test_llm_cs_own_files_are_found_by_folder_and_by_pattern(tmp_path):
    folder = tmp_path / "fineweb10B"
    write(folder, "fineweb_val_000000.bin", [1, 2])
    write(folder, "fineweb_train_000001.bin", [3, 4])
    write(folder, "fineweb_train_000002.bin", [5])
    for name in (str(folder), f"{folder}/*.bin", f"{folder}/fineweb_train_*.bin"):
        found = corpus.find_token_files(name)
        assert found is not None
        assert (found.train[:].tolist(), found.validation[:].tolist()) == ([3, 4, 5], [1, 2])
    write(tmp_path / "tinyshakespeare", "tiny_shakespeare_val.bin", [1])
    write(tmp_path / "tinyshakespeare", "tiny_shakespeare_train.bin", [2])
    found = corpus.find_token_files(str(tmp_path / "tinyshakespeare"))
    assert found is not None
    assert (found.train[:].tolist(), found.validation[:].tolist()) == ([2], [1])


def test_what_is_no_token_set_is_left_to_others(tmp_path):
    (tmp_path / "a.txt").write_text("a text")
    assert corpus.find_token_files(str(tmp_path / "a.txt")) is None
    assert corpus.find_token_files("embedded") is None
    assert corpus.find_token_files("tinyshakespeare") is None


def test_mistakes_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXGPT_DATA", str(tmp_path))
    with pytest.raises(UserError, match=r"by: python run\.py prepare fineweb-edu-100B$"):
        corpus.find_token_files("fineweb-edu-100B")
    with pytest.raises(UserError, match="has no token files"):
        corpus.find_token_files(str(tmp_path))
    with pytest.raises(UserError, match="there are no such files"):
        corpus.find_token_files(f"{tmp_path}/*.bin")
    write(tmp_path, "a_train.bin", [1])
    with pytest.raises(UserError, match=r"for validation: those have _val_ in their names"):
        corpus.find_token_files(str(tmp_path))
    write(tmp_path, "b_train.bin", [1], token_files.LLAMA3)
    write(tmp_path, "b_val.bin", [1])
    with pytest.raises(UserError, match="uint16 and uint32"):
        corpus.find_token_files(str(tmp_path))
    (tmp_path / "progress.json").write_text("{}")
    with pytest.raises(UserError, match="not prepared to its end"):
        corpus.find_token_files(str(tmp_path))


@pytest.fixture
def prepared(work):
    assert cli.main(["prepare", "text.txt", "--output", "out", "--shard-tokens", "100", "--processes", "1"]) == 0
    return Path("out")


def test_a_prepared_folder_that_changed_is_refused_at_once(prepared):
    victim = sorted(prepared.glob("*train*"))[1]
    data = victim.read_bytes()
    victim.write_bytes(data[:-2])
    with pytest.raises(UserError, match=f"{victim} is damaged: its header promises"):
        corpus.find_token_files("out")
    token_files.write(victim, np.arange(3), token_files.GPT2)
    with pytest.raises(UserError, match=f"{victim} is not what was prepared: it has 3 tokens"):
        corpus.find_token_files("out")
    victim.unlink()
    with pytest.raises(UserError, match=f"{victim}: can't be read"):
        corpus.find_token_files("out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "not a manifest of format 1"),
        ({"shards": {}}, "no list of shards"),
        ({"shards": [3]}, "a shard in it is 3"),
        ({"shards": []}, "names no files to train on"),
        ({"name": 3}, "name is 3, and should be of type str"),
        ({"vocabulary_size": -1}, "vocabulary_size is -1"),
        ({"end_of_text": True}, "end_of_text is True"),
    ],
)
def test_a_damaged_manifest_is_refused(prepared, change, message):
    path = prepared / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        corpus.find_token_files("out")


@given(data=st.one_of(st.binary(max_size=40), st.text(max_size=40).map(str.encode), st.just(b"[" * 100_000)))
def test_a_manifest_may_be_anything(tmp_path, data):
    (tmp_path / "manifest.json").write_bytes(data)
    with pytest.raises(UserError, match=r"manifest\.json"):
        corpus.find_token_files(str(tmp_path))


def change(folder: Path, **fields) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_manifest_does_not_lead_out_of_its_folder(prepared, tmp_path):
    for victim in (sorted(prepared.glob("*train*"))[0], prepared / "manifest.json"):
        kept = tmp_path / "elsewhere"
        victim.rename(kept)
        victim.symlink_to(kept)
        with pytest.raises(UserError, match="leads out of out by a link"):
            corpus.find_token_files("out")
        victim.unlink()
        kept.rename(victim)
    assert corpus.find_token_files("out") is not None


def test_what_a_manifest_says_is_compared_with_what_is_there(prepared):
    whole = (prepared / "manifest.json").read_text()
    entries = json.loads(whole)["shards"]
    for fields, message in (
        ({"shards": [*entries, entries[0]]}, "names one file twice"),
        ({"shards": [entries[0] | {"tokens": 10**18}]}, "is not what was prepared"),
        ({"documents": 10**30}, "a number of 31 digits"),
        ({"empty_rows": "many"}, "empty_rows is 'many'"),
        ({"settings": {"x": [[[[1]]]] * 3}, "name": "\x1b[2J"}, ""),
        ({"versions": [{}]}, "versions is a list of 1 values"),
    ):
        (prepared / "manifest.json").write_text(whole)
        change(prepared, **fields)
        if message:
            with pytest.raises(UserError, match=message):
                corpus.find_token_files("out")
        else:
            assert corpus.find_token_files("out") is not None


def test_a_vocabulary_that_is_not_the_tokenizers_is_refused(prepared, fails):
    change(prepared, vocabulary_size=7)
    assert "it says 7 tokens, and its tokenizer gpt2 has 50,257" in fails(
        "--config", "quickstart", "--data.text", "out"
    )


def test_a_manifest_of_before_rows_were_counted_is_read(prepared):
    path = prepared / "manifest.json"
    fields = json.loads(path.read_text())
    del fields["empty_rows"], fields["bad_rows"]
    path.write_text(json.dumps(fields))
    assert manifest.read(prepared).empty_rows == 0


def test_nano_gpts_files_are_known_and_the_line_that_is_told_mends_them(work, fails):
    tokens = np.arange(300, dtype="<u2")
    tokens.tofile("train.bin")
    tokens[:50].tofile("val.bin")
    assert "train.bin has no header, as nanoGPT's" in fails("--config", "quickstart", "--data.text", "train.bin")
    for name in ("train.bin", "val.bin"):
        with pytest.raises(UserError, match=f"{name} has no header") as error:
            token_files.tokens_of(name)
        line = str(error.value).split("python -c '")[1].split("'; or")[0]
        subprocess.run([sys.executable, "-c", line], check=True)
        Path(name).unlink()
    found = corpus.find_token_files(".")
    assert found is not None
    assert found.train[:].tolist() == tokens.tolist()
    assert found.validation[:].tolist() == tokens[:50].tolist()
