"""From what a user names to the weights that are there: which format it is, and which tokenizer belongs to them."""

import dataclasses
import os
from pathlib import Path

from jaxgpt.data import tokenizers
from jaxgpt.errors import UserError
from jaxgpt.interop import hub, huggingface, llmc, llmc_tokenizer, runs
from jaxgpt.interop.source import Source

GPT2_VOCABULARY = 50257


def open_weights(name: str) -> Source:
    """The weights of a run's folder, a checkpoint, a Hugging Face folder, an llm.c model file or a model of the hub.

    UserError where there are none that can be read.
    """
    source = _open(name)
    if source.tokenizer is None and not source.notes and source.model.vocabulary_size == GPT2_VOCABULARY:
        note = f"its tokenizer is taken to be GPT-2's, since it has {GPT2_VOCABULARY:,} tokens"
        return dataclasses.replace(source, tokenizer=tokenizers.make("gpt2", ""), notes=(note,))
    return source


def _open(name: str) -> Source:
    path = Path(name)
    try:
        if path.is_file():
            return _open_file(path)
        if path.is_dir():
            return _open_folder(path)
    except PermissionError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from None
    except ValueError:  # a zero byte
        raise UserError(f"{name!r} is no path") from None
    first = path.parts[0] if path.parts else ""
    if hub.NAME.fullmatch(name) and not (len(path.parts) > 1 and os.path.exists(first)):
        return huggingface.open_folder(hub.fetch(name))
    raise UserError(f"{name}: there is no such file or folder{_beside(path)}")


def _open_file(path: Path) -> Source:
    if path.suffix in (".safetensors", ".json"):
        raise UserError(f"{path}: give the folder that it is in, {path.parent}")
    if path.suffix in (".pt", ".pth", ".pkl", ".ckpt"):
        raise UserError(f"{path}: a pickle, which can run code and is not read")
    return llmc.open_model(path)


def _open_folder(path: Path) -> Source:
    if (path / "config.toml").is_file():
        return runs.open_run(path)
    if (path / huggingface.CONFIG).exists():
        return huggingface.open_folder(path)
    if (path / "params").is_dir() and path.name.isdecimal():
        return runs.open_checkpoint(path)
    raise UserError(
        f"{path}: a folder without weights that can be read. A run's folder has config.toml, a Hugging Face folder "
        f"config.json, a checkpoint params/"
    )


def _beside(path: Path) -> str:
    names = sorted(p.name for p in path.parent.glob("*") if not p.name.startswith("."))[:20]
    return f". In {path.parent} there are: {', '.join(names)}" if names else ""


def with_tokenizer(source: Source, name: str) -> Source:
    """The same weights with the tokenizer that the user names: "gpt2", "bytes", or the path of an llm.c tokenizer file.

    UserError where it doesn't fit.
    """
    if not name:
        return source
    if Path(name).is_file():
        tokenizer = _same_tokens(name, llmc_tokenizer.read(Path(name)))
    elif name in ("gpt2", "bytes"):
        tokenizer = tokenizers.make(name, "")
    else:
        raise UserError(f"--tokenizer {name}: give gpt2, bytes or the path of an llm.c tokenizer file")
    if tokenizer.vocabulary_size > source.model.vocabulary_size:
        raise UserError(
            f"--tokenizer {name} has {tokenizer.vocabulary_size:,} tokens, and {source.where} has "
            f"{source.model.vocabulary_size:,}"
        )
    return dataclasses.replace(source, tokenizer=tokenizer)


def _same_tokens(name: str, found: llmc_tokenizer.Tokens) -> tokenizers.Tokenizer:
    gpt2 = tokenizers.make("gpt2", "")
    if tuple(gpt2.tokens) != found.tokens:
        raise UserError(
            f"--tokenizer {name}: its {len(found.tokens):,} tokens are not GPT-2's, which are all it may have"
        )
    return gpt2
