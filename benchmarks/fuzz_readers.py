"""What is fuzzed: for each reader of files from outside, valid inputs and how they are read.

A reader of another format is one more entry in READERS. An input is a folder's files by name; a reader may raise
UserError and nothing else, whatever they contain.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from jaxgpt.config import Model
from jaxgpt.data import manifest, token_files, tokenizers
from jaxgpt.evaluation import choice_files, task_files
from jaxgpt.interop import (
    huggingface,
    huggingface_export,
    huggingface_tokenizer,
    llmc,
    llmc_state,
    llmc_tokenizer,
    tensors,
)

Input = dict[str, bytes]
MODEL = Model(layers=2, heads=2, width=8, context=6, vocabulary_size=130)


@dataclass(frozen=True)
class Reader:
    name: str
    seeds: Callable[[], list[Input]]  # valid ones
    read: Callable[[Path], object]  # all of what is in this folder


def written(write: Callable[[Path], object]) -> Input:
    """The files that `write` leaves in a folder."""
    with tempfile.TemporaryDirectory() as name:
        write(Path(name))
        return {path.name: path.read_bytes() for path in sorted(Path(name).iterdir())}


def params(dtype: str = "float32"):
    generator = np.random.default_rng(0)
    return jax.tree.map(
        lambda tensor: generator.normal(size=tensors.shape(tensor, MODEL)).astype(tensors.DTYPES[dtype]),
        tensors.LAYOUT,
    )


def models() -> list[Input]:
    return [
        written(lambda folder: llmc.write_model(folder / "m.bin", params(), MODEL, "float32")),
        written(lambda folder: llmc.write_model(folder / "m.bin", params("bfloat16"), MODEL, "bfloat16")),
    ]


def states() -> list[Input]:
    tokens = np.arange(10, dtype=np.int32).reshape(2, 5)
    state = llmc_state.State(tokens, tokens, np.zeros((2, 5, 130), np.float32), 1.0, params())
    return [written(lambda folder: llmc_state.write(folder / "s.bin", state))]


def token_lists() -> list[Input]:
    tokens = [bytes([byte]) for byte in range(256)] + [b"the", b" and", b"<|endoftext|>"]
    many = [b"x"] * 50257
    few = written(lambda folder: llmc_tokenizer.write(folder / "t.bin", tokens, 258))
    return [*[few] * 60, written(lambda folder: llmc_tokenizer.write(folder / "t.bin", many, 50256, version=1))]


def folders() -> list[Input]:
    def export(dtype: str, shard_bytes: int) -> Input:
        made = written(lambda folder: huggingface_export.write(folder, params(dtype), MODEL, dtype, None, shard_bytes))
        return {name: content for name, content in made.items() if not name.startswith("generation")}  # never read

    return [export("float32", 1 << 30), export("bfloat16", 1 << 30), export("float16", 2000)]


def tokenizer_files() -> list[Input]:
    made = [tokenizers.make("bytes", ""), tokenizers.make("characters", "to be, or nöt\n")]
    texts = [huggingface_tokenizer.files_of(tokenizer, MODEL) for tokenizer in made]
    vocabulary = json.dumps({character: i for i, character in enumerate(huggingface_tokenizer.CHARACTER_OF)})
    return [
        *({name: text.encode() for name, text in files.items()} for files in texts),
        {"vocab.json": vocabulary.encode()},
    ]


def token_shards() -> list[Input]:
    tokens = np.arange(500, dtype=np.uint32)
    forms = (token_files.GPT2, token_files.LLAMA3)
    return [written(lambda folder, form=form: token_files.write(folder / "t.bin", tokens, form)) for form in forms]


def manifests() -> list[Input]:
    def prepared(folder: Path) -> None:
        for name in ("train_000000.bin", "val_000000.bin"):
            token_files.write(folder / name, np.arange(300, dtype=np.uint16), token_files.GPT2)
        shards = (
            manifest.describe(folder / "train_000000.bin", "train"),
            manifest.describe(folder / "val_000000.bin", "val"),
        )
        manifest.write(folder, manifest.Manifest("made up", {"name": "bytes"}, 300, None, 2, {"a": 1}, {}, shards))

    return [written(prepared)]


def choices() -> list[Input]:
    ids = [np.arange(1, 1 + length) for length in (3, 1, 5, 2)]
    examples = [choice_files.Example(ids[i % 4], tuple(ids), i % 4) for i in range(8)]
    return [written(lambda folder: choice_files.write(folder / "c.bin", examples))]


def task_lines() -> list[Input]:
    row = {"ctx": "A man sits down. He", "activity_label": "Sitting", "endings": ["sits", "stands", "sleeps", "sings"]}
    lines = [json.dumps({**row, "label": label, "ind": label}) for label in range(4)]
    return [{"hellaswag.jsonl": ("\n".join(lines) + "\n").encode()}]


READERS = [
    Reader("token file", token_shards, lambda folder: int(token_files.open(folder / "t.bin").sum())),
    Reader("manifest", manifests, manifest.verify),
    Reader("multiple-choice file", choices, lambda folder: choice_files.read(folder / "c.bin")),
    Reader(
        "multiple-choice lines",
        task_lines,
        lambda folder: task_files.questions("hellaswag", str(folder / "hellaswag.jsonl")),
    ),
    Reader("llm.c model", models, lambda folder: llmc.open_model(folder / "m.bin").load()),
    Reader("llm.c state", states, lambda folder: llmc_state.read(folder / "s.bin", MODEL)),
    Reader("llm.c tokenizer", token_lists, lambda folder: llmc_tokenizer.read(folder / "t.bin")),
    Reader("Hugging Face folder", folders, lambda folder: huggingface.open_folder(folder).load()),
    Reader(
        "Hugging Face tokenizer",
        tokenizer_files,
        lambda folder: huggingface_tokenizer.read(folder, Model(vocabulary_size=256)),
    ),
]
