"""`run.py convert`: from every format into every other, whole or not at all."""

import contextlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jaxgpt import writing
from jaxgpt.commands import cli
from jaxgpt.data import tokenizers
from jaxgpt.errors import RunError, UserError
from jaxgpt.interop import detect_format, llmc, runs
from jaxgpt.options import settings
from jaxgpt.options.config import Model
from jaxgpt.runs import resuming
from jaxgpt.runs.folder import RunFolder
from tests.interop.weights import assert_same_bits, random_params

MODEL = Model(layers=2, heads=2, width=8, context=8, vocabulary_size=256)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, with runs/a in it, which nobody trained."""
    monkeypatch.chdir(tmp_path)
    with writing.new_folder(Path("runs/a")) as folder:
        runs.write(folder, random_params(MODEL), MODEL, "float32", tokenizers.Bytes(), run=Path("runs/a"), origin="x")
    return tmp_path


@pytest.fixture
def convert(here, capsys):
    def run(*words: str) -> str:
        assert cli.main(["convert", *words]) == 0
        return capsys.readouterr().out

    return run


def weights(name: str):
    return detect_format.open_weights(name).load()


def names() -> set[str]:
    return {path.as_posix() for path in Path().glob("*")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_the_way_round_changes_no_bit(convert, dtype):
    """The way is: run, Hugging Face, llm.c, run, llm.c, Hugging Face, and back."""
    expected = random_params(MODEL, dtype)
    said = convert("runs/a", "hf", "--dtype", dtype)
    assert ("float32 is rounded to the nearest bfloat16" in said) == (dtype == "bfloat16")
    assert "reading   runs/a/checkpoints/0: a run's checkpoint, float32, GPT-2, 3,872 parameters: 2 layers" in said
    assert f"writing   hf: a Hugging Face folder, {dtype}\n" in said
    assert "has no end-of-text token, and so no llm.c tokenizer file" in convert("hf", "m.bin")
    convert("m.bin", "runs/b", "--tokenizer", "bytes")
    convert("runs/b/checkpoints/0", "n.bin", "--to", "llmc")
    assert Path("n.bin").read_bytes() == Path("m.bin").read_bytes()
    convert("n.bin", "hf2", "--to", "huggingface", "--tokenizer", "bytes", "--shard-gib", "0.000001")
    assert len(list(Path("hf2").glob("*.safetensors"))) > 1
    convert("hf2", "runs/c")
    for name in ("hf", "m.bin", "runs/b", "hf2", "runs/c"):
        source = detect_format.open_weights(name)
        assert (source.model, source.dtype) == (MODEL, dtype)
        assert_same_bits(source.load(), expected)
    assert isinstance(detect_format.open_weights("runs/c").tokenizer, tokenizers.Bytes)
    assert names() == {"runs", "hf", "hf2", "m.bin", "n.bin"}


def test_a_converted_run_generates_and_is_not_resumed(convert, capsys):
    convert("runs/a", "hf")
    assert "use it    python run.py generate runs/b" in convert("hf", "runs/b")
    assert cli.main(["generate", "--run", "runs/b", "--tokens", "2", "--prompt", "ab"]) == 0
    assert capsys.readouterr().out.startswith("ab")
    config = settings.read(Path("runs/b/config.toml"))
    with contextlib.closing(RunFolder(replace(config, run=replace(config.run, resume="always")))) as folder:
        nothing: Any = None  # it is refused before the text is looked at
        with pytest.raises(UserError, match="these weights were converted from hf, and there is no run to go on with"):
            resuming.find(folder, nothing)


def test_gpt2s_tokenizer_goes_along(convert):
    """It is written to llm.c's tokenizer file, and into the run's folder."""
    model = Model(layers=1, heads=1, width=2, context=4, vocabulary_size=50257)
    llmc.write_model(Path("m.bin"), random_params(model), model, "float32")
    said = convert("m.bin", "runs/g")
    assert "its tokenizer is taken to be GPT-2's, since it has 50,257 tokens" in said
    convert("runs/g", "n.bin")
    assert Path("n.bin").read_bytes() == Path("m.bin").read_bytes()
    gpt2 = tokenizers.make("gpt2", "")
    assert llmc.read_tokenizer(Path("n_tokenizer.bin")) == (tuple(gpt2.tokens), 50256)
    assert "tokenizer gpt2" in convert("n.bin", "o.bin", "--tokenizer", "n_tokenizer.bin")


# What is there already


def test_nothing_is_replaced_without_being_told(convert, fails):
    convert("runs/a", "hf")
    convert("runs/a", "m.bin")
    before = [path.stat().st_mtime_ns for path in (Path("hf"), Path("m.bin"))]
    for target in ("hf", "m.bin"):
        message = f"{target} exists and is left as it is. Give another name, or replace it with --overwrite"
        assert message in fails("convert", "runs/a", target)
    assert [path.stat().st_mtime_ns for path in (Path("hf"), Path("m.bin"))] == before
    convert("runs/a", "hf", "--overwrite", "--dtype", "float16")
    convert("runs/a", "m.bin", "--overwrite", "--dtype", "bfloat16")
    assert detect_format.open_weights("hf").dtype == "float16"
    assert detect_format.open_weights("m.bin").dtype == "bfloat16"
    convert("hf", "hf", "--to", "huggingface", "--overwrite", "--dtype", "float32")
    assert detect_format.open_weights("hf").dtype == "float32"
    assert names() == {"runs", "hf", "m.bin"}


def test_only_a_models_folder_is_replaced(here, fails):
    Path("letters").mkdir()
    Path("letters/to_her.txt").write_text("Dear")
    assert "letters is a folder without a model" in fails("convert", "runs/a", "letters", "--overwrite")
    Path("link").symlink_to("runs")
    assert "link is a link, and is not replaced" in fails("convert", "runs/a", "link", "--overwrite")
    Path("file").write_text("")
    assert "file is a file, where a folder" in fails("convert", "runs/a", "file", "--overwrite")
    assert "lie one in the other" in fails("convert", "runs/a", "runs/a", "--overwrite", "--to", "llmc")
    assert Path("letters/to_her.txt").read_text() == "Dear"
    assert names() == {"runs", "letters", "link", "file"}


@pytest.mark.parametrize("target", ["hf", "m.bin"])
def test_what_fails_halfway_leaves_what_was_there(convert, monkeypatch, target):
    convert("runs/a", target)
    before = weights(target)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jaxgpt.interop.tensors.cast", full)
    with pytest.raises(RunError, match=r"writing failed .No space left on device"):
        overwrite(target)
    assert_same_bits(weights(target), before)
    assert names() == {"runs", target}


def overwrite(target: str) -> None:
    from jaxgpt.commands import convert

    convert.run(["runs/a", target, "--overwrite"])


# What can't be


def test_what_cannot_be_converted(convert, fails):
    convert("runs/a", "m.bin")
    assert "m.bin doesn't say with which tokenizer it was trained: name it by --tokenizer" in fails(
        "convert", "m.bin", "runs/b"
    )
    assert "--tokenizer gpt2 has 50,257 tokens, and m.bin has 256" in fails(
        "convert", "m.bin", "runs/b", "--tokenizer", "gpt2"
    )
    assert "--dtype float16: an llm.c model file can't hold it" in fails(
        "convert", "runs/a", "n.bin", "--dtype", "float16"
    )
    assert "runs/nix: there is no such file or folder. In runs there are: a" in fails("convert", "runs/nix", "x")
    Path("empty").mkdir()
    assert "empty: a folder without weights that can be read" in fails("convert", "empty", "x")
    assert names() == {"runs", "m.bin", "empty"}


TORCH = b"PK\x03\x04\0\0\0\0" + b"archive/data.pkl"
PICKLE = b"\x80\x04cos\nsystem\n(S'touch executed'\ntR."


@pytest.mark.parametrize("content", [TORCH, PICKLE, b""])
@pytest.mark.parametrize("name", ["ckpt.pt", "model.pth", "weights.pkl", "last.ckpt", "pytorch_model.bin", "model"])
def test_pickles_are_named_and_never_opened(here, fails, name, content):
    """A pickle is recognised by its name, and by its first bytes whatever its name is."""
    Path("out").mkdir()
    Path("out", name).write_bytes(content)
    message = fails("convert", f"out/{name}", "x")
    if content or ("." in name and name != "pytorch_model.bin"):
        assert f"out/{name}: a pickle, which can run code and is not read" in message
        assert 'docs/formats.md has the lines, under "From a pickle"' in message
    assert ("as nanoGPT writes its checkpoints" in message) == (name == "ckpt.pt")
    folder = fails("convert", "out", "x")
    assert ("is a pickle" in folder or "a pickle, which" in folder) == (name not in ("model", "pytorch_model.bin"))
    assert not Path("executed").exists()


def test_other_files_that_are_no_weights(here, fails):
    os.mkfifo("pipe.bin")
    assert "pipe.bin: a pipe, where a file is expected" in fails("convert", "pipe.bin", "x")
    Path("zero.bin").symlink_to("/dev/zero")
    assert "zero.bin: a special file, where a file is expected" in fails("convert", "zero.bin", "x")
    Path("m.gguf").write_bytes(b"GGUF")
    assert "m.gguf: the version at byte 4 has 4 bytes, and 0 follow" in fails("convert", "m.gguf", "x")
    Path("m.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 497772544\n")
    assert "m.bin: a git-lfs pointer in the place of the file" in fails("convert", "m.bin", "x")
    assert r"no\x1b[2J such: there is no such file" in fails("convert", "no\x1b[2J such", "x")


def test_a_damaged_checkpoint(convert, fails):
    (Path("runs/a/checkpoints/0/about/metadata")).write_text(json.dumps({}))
    assert "this checkpoint is not whole" in fails("convert", "runs/a", "hf")
    assert "this checkpoint is not whole" in fails("convert", "runs/a/checkpoints/0", "hf")
