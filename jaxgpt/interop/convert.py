"""`run.py convert`: weights from any format into any other."""

import time
from pathlib import Path
from typing import Literal

from rich.console import Console

from jaxgpt import writing
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import shown
from jaxgpt.interop import (
    huggingface_export,
    huggingface_tokenizer,
    llmc,
    llmc_tokenizer,
    opening,
    runs,
    tensors,
)
from jaxgpt.interop.source import Source
from jaxgpt.models import gpt2
from jaxgpt.terminal import say

Format = Literal["auto", "huggingface", "llmc", "run"]
NAMES = {"huggingface": "a Hugging Face folder", "llmc": "an llm.c model file", "run": "a run's folder"}


def convert(
    name: str, to: Path, *, form: Format, dtype: str, tokenizer: str, shard_bytes: int, overwrite: bool
) -> None:
    """Reads, writes, and prints what is read and written. What is at `to` is there whole or as it was before.

    UserError for weights that can't be read, a target that exists, and what the target's format can't hold.
    """
    began = time.perf_counter()
    writing.check_free(to, overwrite=overwrite)
    _check_apart(name, to)
    source = opening.with_tokenizer(opening.open_weights(name), tokenizer)
    form = _form(form, to, source)
    dtype = _dtype(dtype, form, source)
    _say("reading", f"{source.where}: {describe(source)}")
    for note in source.notes:
        _say("note", note)
    if form == "huggingface" and source.tokenizer and not huggingface_tokenizer.can_express(source.tokenizer):
        _say("note", f"there are no tokenizer files for {source.tokenizer.name}: take its makers' own")
    if tensors.DTYPES[dtype].itemsize < tensors.DTYPES[source.dtype].itemsize or {dtype, source.dtype} == HALVES:
        _say("note", f"{source.dtype} is rounded to the nearest {dtype}")
    with Console(stderr=True).status("reading"):  # on a terminal only
        params = source.load()
    _say("writing", f"{to}: {NAMES[form]}, {dtype}")
    with Console(stderr=True).status("writing"):
        if form == "llmc":
            written = _write_llmc(to, source, params, dtype, overwrite)
        else:
            with writing.new_folder(to, overwrite=overwrite) as folder:
                if form == "huggingface":
                    huggingface_export.write(folder, params, source.model, dtype, source.tokenizer, shard_bytes)
                else:
                    runs.write(folder, params, source.model, dtype, source.tokenizer, run=to, origin=source.where)
            written = [path for path in to.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in written)
    _say("done", f"{len(written)} files, {size:,} bytes, in {time.perf_counter() - began:.1f} s")
    _say("use it", USES[form].format(to=to))


HALVES = {"float16", "bfloat16"}
USES = {
    "huggingface": 'transformers.pipeline("text-generation", "{to}"), or python run.py --init-from {to}',
    "llmc": "python run.py --init-from {to}, or with llm.c's own programs",
    "run": "python run.py generate --run {to}, or python run.py --init-from {to}",
}


def describe(source: Source) -> str:
    model = source.model
    return (
        f"{source.kind}, {source.dtype}, {gpt2.parameter_count(model):,} parameters: {model.layers} layers, "
        f"{model.heads} heads, width {model.width}, context {model.context}, vocabulary {model.vocabulary_size:,}"
        + (f", tokenizer {source.tokenizer.name}" if source.tokenizer else "")
    )


def _check_apart(name: str, to: Path) -> None:
    """Raises a UserError where a run would be replaced by its own weights: it has more than those."""
    try:
        read, written = Path(name).resolve(), to.resolve()
    except (OSError, ValueError, RuntimeError):  # which opening it tells
        return
    of_run = any((folder / "config.toml").is_file() for folder in (read, *read.parents[:2]))
    if of_run and (read.is_relative_to(written) or written.is_relative_to(read)):
        raise UserError(f"{shown(to)} and what is to be read, {shown(name)}, lie one in the other. Give another name")


def _form(form: Format, to: Path, source: Source) -> Format:
    if form != "auto":
        return form
    if to.suffix == ".bin":
        return "llmc"
    return "huggingface" if source.kind in ("a run's checkpoint", "a checkpoint") else "run"


def _dtype(dtype: str, form: Format, source: Source) -> str:
    if dtype == "float16" and form != "huggingface":
        raise UserError(f"--dtype float16: {NAMES[form]} can't hold it; take float32 or bfloat16")
    if dtype != "auto":
        return dtype
    return "float32" if source.dtype == "float16" and form != "huggingface" else source.dtype


def _write_llmc(to: Path, source: Source, params: gpt2.Params, dtype: str, overwrite: bool) -> list[Path]:
    """The model file, and beside it the tokenizer's where the format can hold it."""
    written = [to]
    tokenizer = source.tokenizer
    beside = to.with_name(f"{to.stem}_tokenizer.bin")
    if tokenizer and tokenizer.end_of_text is not None:
        if all(1 <= len(token) <= llmc_tokenizer.LONGEST for token in tokenizer.tokens):
            with writing.new_file(beside, overwrite=overwrite) as path:
                llmc_tokenizer.write(path, tokenizer.tokens, tokenizer.end_of_text)
            written.append(beside)
        else:
            _say(
                "note", f"the tokenizer has tokens of 0 or over {llmc_tokenizer.LONGEST} bytes: no llm.c tokenizer file"
            )
    elif tokenizer:
        _say("note", f"the tokenizer {tokenizer.name} has no end-of-text token, and so no llm.c tokenizer file")
    with writing.new_file(to, overwrite=overwrite) as path:
        llmc.write_model(path, params, source.model, dtype)
    return written


def _say(word: str, text: str) -> None:
    say(f"{word:<9} {text}", flush=True)
