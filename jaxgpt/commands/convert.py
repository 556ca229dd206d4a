"""`run.py convert`: weights from any format into any other."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from jaxgpt import writing
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import shown
from jaxgpt.interop import (
    bases,
    detect_format,
    gpt2_tables,
    huggingface,
    huggingface_tokenizer,
    llmc,
    peft,
    runs,
    tensors,
)
from jaxgpt.interop.tensors import WeightSource
from jaxgpt.models import family
from jaxgpt.models.blocks import Params
from jaxgpt.options import checks, command_line
from jaxgpt.terminal import command, say

Format = Literal["auto", "huggingface", "peft", "llmc", "run"]
NAMES = {
    "huggingface": "a Hugging Face folder",
    "peft": "PEFT's folder of adapters",
    "llmc": "an llm.c model file",
    "run": "a run's folder",
}


@dataclass(frozen=True)
class Convert:
    """Reads weights of one format and writes another. docs/formats.md tells what is read and written."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FROM")]
    """Weights to read: a run's folder, a checkpoint, a Hugging Face folder, the name of a model on its hub, or a file
    of llm.c, llama2.c or llama.cpp (GGUF)."""
    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TO")]
    """File or folder to write."""
    to: Format = "auto"
    """Format to write; auto takes llm.c's where TO ends with .bin, else a Hugging Face folder if FROM is a run, and a
    run's folder for anything else."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the numbers written; auto keeps the type that they have."""
    merge: bool = False
    """Merge adapters (LoRA) into their base also where TO is a run's folder. A Hugging Face folder and an llm.c file
    always have them merged; --to peft writes the adapters alone."""
    tokenizer: str = ""
    """Tokenizer of weights that don't name theirs: gpt2, bytes, or the path of a tokenizer.json, of Llama 3's
    tokenizer.model, of a GGUF file, or of a tokenizer file of llm.c or llama2.c."""
    shard_gib: float = 5.0
    """Largest size of a file of a Hugging Face model, in GiB."""
    overwrite: bool = False
    """Replace what is at TO."""


def run(words: list[str]) -> int:
    """Converts weights, and prints what is read and written. At the target is all of it, or what was there before.

    UserError where the weights can't be read, the target exists, or the target's format can't hold the weights.
    """
    options = command_line.read(Convert, words, "convert")
    checks.check_number(options.shard_gib, "", "shard_gib", positive=True)
    name, to, overwrite = options.source, Path(options.target), options.overwrite
    began = time.perf_counter()
    writing.check_free(to, overwrite=overwrite)
    _check_apart(name, to)
    source = detect_format.with_tokenizer(detect_format.open_weights(name), options.tokenizer)
    form = _form(options.to, to, source)
    if form == "peft" and not source.adapters:
        raise UserError(f"--to peft: {shown(source.where)} has whole weights, and no adapters that could be written")
    alone = source.adapters if form == "peft" or (form == "run" and not options.merge) else None
    if form == "llmc":
        gpt2_tables.check(source.model)
    elif form == "huggingface":
        huggingface.check(source.model)
    if form == "run" and source.unreadable_tokenizer and source.tokenizer is None:
        raise UserError(f"{shown(source.where)}: {source.notes[0]}. Name another by --tokenizer")
    dtype = _dtype(options.dtype, form, source) if not alone or options.dtype != "auto" else "float32"
    _say("reading", f"{source.where}: {describe(source)}")
    for note in source.notes:
        _say("note", note)
    if form == "huggingface" and source.tokenizer and not huggingface_tokenizer.can_express(source.tokenizer):
        _say("note", f"there are no tokenizer files for {source.tokenizer.name}: take its makers' own")
    if tensors.DTYPES[dtype].itemsize < tensors.DTYPES[source.dtype].itemsize or {dtype, source.dtype} == HALVES:
        _say("note", f"{source.dtype} is rounded to the nearest {dtype}")
    with Console(stderr=True).status("reading"):  # on a terminal only
        if form == "huggingface" and source.readers:
            params = source.readers()  # of arrays that are read when they are written
        else:
            params = alone.load() if alone else source.load()
        if alone and not alone.fingerprint:
            alone = bases.known(alone, detect_format.open_weights)
    _say("writing", f"{to}: {NAMES[form]}, {dtype}")
    with Console(stderr=True).status("writing"):
        if form == "llmc":
            written = _write_llmc(to, source, params, dtype, overwrite)
        else:
            with writing.new_folder(to, overwrite=overwrite) as folder:
                if form == "huggingface":
                    shard_bytes = int(min(options.shard_gib, 2.0**30) * 2**30)
                    huggingface.write_folder(
                        folder, params, source.model, dtype, source.tokenizer, shard_bytes, source.template
                    )
                elif form == "peft":
                    assert alone is not None
                    peft.write_folder(folder, params, source.model, alone, dtype)
                else:
                    of_run = {"run": to, "origin": source.where, "template": source.template, "adapters": alone}
                    runs.write(folder, params, source.model, dtype, source.tokenizer, **of_run)
            written = [path for path in to.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in written)
    _say("done", f"{len(written)} files, {size:,} bytes, in {time.perf_counter() - began:.1f} s")
    _say("use it", _use(form, to))
    return 0


HALVES = {"float16", "bfloat16"}


def _use(form: Format, to: Path) -> str:
    """Returns what can be done with the weights."""
    begin = command("--init-from", to)
    if form == "huggingface":
        return f'transformers.pipeline("text-generation", {json.dumps(str(to))}), or {begin}'
    if form == "peft":
        return f"peft.PeftModel.from_pretrained(model, {json.dumps(str(to))})"
    return f"{begin}, or with llm.c's own programs" if form == "llmc" else f"{command('generate', to)}, or {begin}"


def describe(source: WeightSource) -> str:
    tokenizer = f", tokenizer {source.tokenizer.name}" if source.tokenizer else ""
    rank = f", adapters of rank {source.adapters.options.rank}" if source.adapters else ""
    return f"{source.kind}{rank}, {source.dtype}, {family(source.model).describe(source.model)}{tokenizer}"


def _check_apart(name: str, to: Path) -> None:
    """Raises a UserError where a run would be replaced by its own weights: it has more than those."""
    try:
        read, written = Path(name).resolve(), to.resolve()
    except (OSError, ValueError, RuntimeError):  # reported when the weights are opened
        return
    of_run = any((folder / "config.toml").is_file() for folder in (read, *read.parents[:2]))
    if of_run and (read.is_relative_to(written) or written.is_relative_to(read)):
        raise UserError(f"{shown(to)} and what is to be read, {shown(name)}, lie one in the other. Give another name")


def _form(form: Format, to: Path, source: WeightSource) -> Format:
    if form != "auto":
        return form
    if to.suffix == ".bin":
        return "llmc"
    return "huggingface" if source.kind in ("a run's checkpoint", "a checkpoint") else "run"


def _dtype(dtype: str, form: Format, source: WeightSource) -> str:
    if dtype == "float16" and form != "huggingface":
        raise UserError(f"--dtype float16: {NAMES[form]} can't hold it; take float32 or bfloat16")
    if dtype != "auto":
        return dtype
    return "float32" if source.dtype == "float16" and form != "huggingface" else source.dtype


def _write_llmc(to: Path, source: WeightSource, params: Params, dtype: str, overwrite: bool) -> list[Path]:
    """Writes the model file, and beside it the tokenizer's where the format can hold it. Returns their paths."""
    written, tokenizer, longest = [to], source.tokenizer, llmc.LONGEST_TOKEN
    beside = to.with_name(f"{to.stem}_tokenizer.bin")
    if tokenizer and tokenizer.end_of_text is not None:
        if all(1 <= len(token) <= longest for token in tokenizer.tokens):
            with writing.new_file(beside, overwrite=overwrite) as path:
                llmc.write_tokenizer(path, tokenizer.tokens, tokenizer.end_of_text)
            written.append(beside)
        else:
            _say("note", f"the tokenizer has tokens of 0 or over {longest} bytes: no llm.c tokenizer file")
    elif tokenizer:
        _say("note", f"the tokenizer {tokenizer.name} has no end-of-text token, and so no llm.c tokenizer file")
    with writing.new_file(to, overwrite=overwrite) as path:
        llmc.write_model(path, params, source.model, dtype)
    return written


def _say(word: str, text: str) -> None:
    say(f"{word:<9} {text}", flush=True)
