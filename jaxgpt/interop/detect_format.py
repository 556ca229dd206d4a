"""Opens the weights that a user names: finds out their format, and the tokenizer that belongs to them."""

import dataclasses
import os
import re
from pathlib import Path

from jaxgpt import files
from jaxgpt.data import hub, tokenizers
from jaxgpt.data.tokenizers import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import quoted, shown
from jaxgpt.interop import (
    gguf,
    gguf_header,
    gguf_tokenizer,
    huggingface,
    huggingface_chat,
    huggingface_tokenizer,
    llama2c,
    llmc,
    peft,
    runs,
    safetensors_files,
)
from jaxgpt.interop.tensors import WeightSource
from jaxgpt.runs import best, checkpoints

GPT2_VOCABULARY = 50257
# Files that can run code, by their names and, whatever their names are, by their first bytes.
PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".ckpt")
ZIP, PROTOCOLS = b"PK\x03\x04", (b"\x02", b"\x03", b"\x04", b"\x05")
OTHERS = {".h5": "TensorFlow's format", ".msgpack": "Flax's format", ".onnx": "ONNX"}
TOKENIZERS = (
    "a tokenizer.json, a folder that has one or a run's, Llama 3's tokenizer.model, a GGUF file, or a llama2.c file"
)
HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*(?:/[\w.-]+)?)(?:@([\w./-]+))?")  # NAME, OWNER/NAME, and @REVISION
_WEIGHTS = [huggingface.CONFIG, safetensors_files.WEIGHTS, safetensors_files.INDEX]
HUB_FILES = [*_WEIGHTS, *huggingface_tokenizer.FILES, huggingface_chat.FILE]


def open_weights(name: str) -> WeightSource:
    """Opens weights: a run's folder or checkpoint, a Hugging Face folder, a model file, or a model of the hub.

    Model files are llm.c's, llama2.c's, and llama.cpp's (GGUF).
    UserError where there are none that can be read.
    """
    source = _open(name)
    unnamed = source.tokenizer is None and not source.unreadable_tokenizer
    if unnamed and source.model.vocabulary_size == GPT2_VOCABULARY:
        note = f"its tokenizer is taken to be GPT-2's, since it has {GPT2_VOCABULARY:,} tokens"
        return dataclasses.replace(source, tokenizer=tokenizers.make("gpt2", ""), notes=(note, *source.notes))
    return source


def _open(name: str) -> WeightSource:
    try:
        path = best.checkpoint_of(Path(name)) or Path(name)
        if path.is_dir():
            return _open_folder(path)
        if path.exists():
            return _open_file(path)
    except PermissionError as error:
        raise UserError(f"{shown(name)}: can't be read ({error.strerror})") from None
    except ValueError:  # a zero byte
        raise UserError(f"{quoted(name)} is no path") from None
    first = path.parts[0] if path.parts else ""
    if HUB_NAME.fullmatch(name) and not (len(path.parts) > 1 and os.path.exists(first)):
        return huggingface.open_folder(fetch(name))
    beside = sorted(p.name for p in path.parent.glob("*") if not p.name.startswith("."))[:20]
    hint = f". In {shown(path.parent)} there are: {', '.join(shown(other, 60) for other in beside)}" if beside else ""
    raise UserError(f"{shown(name)}: there is no such file or folder{hint}")


def open_adapters(name: str, base: str = "") -> WeightSource:
    """Opens adapters by themselves, PEFT's or a run's, beside the `base` in place of the one that PEFT's name.

    UserError as `open_weights` raises it.
    """
    if base and (Path(name) / peft.CONFIG).exists() and not (Path(name) / "config.toml").is_file():
        return peft.open_folder(Path(name), lambda _: open_weights(base))
    return open_weights(name)


def _open_file(path: Path) -> WeightSource:
    if path.suffix in (".safetensors", ".json", ".toml"):
        raise UserError(f"{shown(path)}: give the folder that it is in, {shown(path.parent)}")
    if path.suffix in OTHERS:
        raise UserError(
            f"{shown(path)}: {OTHERS[path.suffix]} is not read: load it with transformers and save it again"
        )
    with files.open_file(path) as file:
        beginning = file.read(4)
    if path.suffix in PICKLES or beginning == ZIP or (beginning[:1] == b"\x80" and beginning[1:2] in PROTOCOLS):
        raise _pickle(path)
    if path.suffix == ".gguf" or beginning == gguf_header.MAGIC:
        return gguf.open_model(path)
    llama2c.refuse_newer(path, beginning)
    if not llmc.is_model(beginning) and llama2c.is_model(path):
        return llama2c.open_model(path)
    return llmc.open_model(path)


def _open_folder(path: Path) -> WeightSource:
    if (path / "config.toml").is_file():
        return runs.open_checkpoint(path, open_weights, newest=True)
    if (path / peft.CONFIG).exists():  # PEFT's folder may have its base's config.json too
        return peft.open_folder(path, open_weights)
    if (path / huggingface.CONFIG).exists():
        return huggingface.open_folder(path)
    if (path / "params").is_dir() and path.name.isdecimal():
        return runs.open_checkpoint(path, open_weights, newest=False)
    inside = sorted(path.iterdir())
    if of_llamacpp := [file for file in inside if file.suffix == ".gguf"]:
        raise UserError(f"{shown(path)}: a folder of GGUF files: give the file itself, such as {shown(of_llamacpp[0])}")
    pickled = [file for file in inside if file.suffix in PICKLES]
    if pickled:
        raise _pickle(pickled[0])
    raise UserError(
        f"{shown(path)}: a folder without weights that can be read. A run's folder has config.toml, a Hugging Face "
        "folder config.json, PEFT's adapter_config.json, a checkpoint params/"
    )


def _pickle(path: Path) -> UserError:
    of_nanogpt = ", as nanoGPT writes its checkpoints" if path.name == "ckpt.pt" else ""
    return UserError(
        f"{shown(path)}: a pickle, which can run code and is not read{of_nanogpt}. Make safetensors of it where it was "
        'trained: docs/formats.md has the lines, under "From a pickle"'
    )


def fetch(name: str) -> Path:
    """Downloads the files of a model of the hub, unless they are in its cache, and returns their folder there.

    They are config.json, safetensors and tokenizer files, never a pickle. UserError where the extra `hub` is missing,
    or the hub has no such model or can't be reached.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(
            f"{name}: there is no such file or folder, and to look for it on the Hugging Face hub the package "
            "huggingface-hub is needed: make env EXTRAS=hub"
        ) from None
    match = HUB_NAME.fullmatch(name)
    assert match, name
    repository, revision = match.groups()

    def download(names: list[str]) -> Path:
        try:
            return Path(snapshot_download(repository, revision=revision, allow_patterns=names))
        except Exception as error:  # of many types: the package's, httpx's, the operating system's
            reason = hub.first_line(error)
        raise UserError(
            f"{name}: there is no such file or folder here, and from the Hugging Face hub it can't be had ({reason})"
        )

    folder = download(HUB_FILES)
    if (folder / safetensors_files.WEIGHTS).exists():
        return folder
    if not (folder / safetensors_files.INDEX).exists():
        raise UserError(
            f"{name}: on the Hugging Face hub this model has no safetensors. Pickles (.bin) can run code and are not "
            "read: load it with transformers and save it again, which writes safetensors"
        )
    index = files.read_json(folder / safetensors_files.INDEX, within=huggingface_tokenizer.root(folder))
    return download([*HUB_FILES, *safetensors_files.shard_names(index, folder)])


def tokenizer_of(path: Path) -> Tokenizer | None:
    """Returns the tokenizer of one of TOKENIZERS; None for a path of something else. UserError for a damaged one."""
    if os.path.isdir(path / "checkpoints"):  # False too for a name that is too long
        return checkpoints.tokenizer_of(checkpoints.find(path / "checkpoints", ("about",)))
    if os.path.isdir(path) or path.suffix == ".json":
        return huggingface_tokenizer.read_file(path)
    if not files.is_file(path):
        return None
    with files.open_file(path) as file:
        beginning = file.read(4)
    if huggingface_tokenizer.is_llama3(path):
        return huggingface_tokenizer.read_file(path)
    if beginning == gguf_header.MAGIC:
        return gguf_tokenizer.read_file(path)
    if llama2c.is_tokenizer(path):
        return llama2c.read_tokenizer(path)
    beside = path.with_name(llama2c.TOKENIZER)
    if not llmc.is_model(beginning) and llama2c.is_model(path) and files.is_file(beside):
        return llama2c.read_tokenizer(beside)
    return None


def with_tokenizer(source: WeightSource, name: str) -> WeightSource:
    """Returns the same weights with the tokenizer that the user names; without a name they keep theirs.

    Names are "gpt2", "bytes", or the path of one of TOKENIZERS, or of an llm.c tokenizer file. UserError where there is
    no such tokenizer, it can't be read, or it has more tokens than the model.
    """
    if not name:
        return source
    path = Path(name)
    if name in ("gpt2", "bytes"):
        tokenizer = tokenizers.make(name, "")
    elif found := tokenizer_of(path):
        tokenizer = found
    elif path.exists():
        tokenizer, (tokens, _) = tokenizers.make("gpt2", ""), llmc.read_tokenizer(path)
        if tuple(tokenizer.tokens) != tokens:
            raise UserError(
                f"--tokenizer {shown(name)}: its {len(tokens):,} tokens are not GPT-2's, which are all it may have"
            )
    else:
        raise UserError(f"--tokenizer {shown(name)}: give gpt2, bytes, or the path of {TOKENIZERS}, or llm.c's")
    if tokenizer.vocabulary_size > source.model.vocabulary_size:
        raise UserError(
            f"--tokenizer {shown(name)} has {tokenizer.vocabulary_size:,} tokens, and {shown(source.where)} has "
            f"{source.model.vocabulary_size:,}"
        )
    return dataclasses.replace(source, tokenizer=tokenizer)
