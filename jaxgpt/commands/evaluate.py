"""`run.py evaluate`: the loss of a run's newest whole checkpoint, or its accuracy on a task."""

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxgpt.commands import configuration
from jaxgpt.data import corpora, corpus, fingerprint, loader
from jaxgpt.data.loader import Tokens
from jaxgpt.data.tokenizer_json import HuggingFace
from jaxgpt.errors import RunError, UserError
from jaxgpt.evaluation import multiple_choice, task_files
from jaxgpt.evaluation.scoring import bits_per_byte_of_one_nat, make_scorer, make_validation_loss, target_count
from jaxgpt.foreign_text import shown
from jaxgpt.interop import loading
from jaxgpt.kernels.choose import choose_attention
from jaxgpt.options import command_line, settings
from jaxgpt.parallel import mesh
from jaxgpt.runs import best, metrics_file
from jaxgpt.runs.checkpoints import Trained
from jaxgpt.terminal import say


@dataclass(frozen=True)
class Evaluate:
    """The loss and the bits per byte of a trained model, or its accuracy on a task."""

    run: str
    """The run's folder, such as runs/quickstart, or weights in another format, such as a Hugging Face folder."""
    task: str = ""
    """hellaswag, hellaswag_llmc, mmlu, arc_easy, arc_challenge, piqa, winogrande, openbookqa or lambada; empty computes
    the loss over the run's validation split."""
    data: str = ""
    """The task's file: JSON lines, CSV, Parquet, or llm.c's .bin; empty downloads it. Without a task, the text, or
    the folder of token files, to compute the loss of."""
    limit: int = 0
    """Take only this many examples, or batches of the loss, from the first; 0 takes all."""
    batch_size: int = 16
    """Number of sequences that each device takes at once."""
    shots: int = 0
    """Number of answered questions before each; for mmlu only."""
    devices: int = 0
    """How many devices; 0 takes all there are."""
    output: str = ""
    """Write the figures to this JSON file."""


def run(words: list[str]) -> int:
    """Prints the figures, adds them to the run's metrics.jsonl, and writes them to `--output`.

    UserError where an option is out of its bounds, or the run, the task or the data can't be read; RunError where the
    output can't be written.
    """
    options = command_line.read(Evaluate, words, "evaluate")
    task, data, limit, run = options.task, options.data, options.limit, Path(options.run)
    settings.check_own(options, ("batch_size",), ("limit", "shots", "devices"))
    if options.shots and not task:
        raise UserError(f"--shots {options.shots}: only a task has examples to show. Name it with --task")
    if task:
        task_files.check_name(task, data)
    model = loading.load(options.run, options.devices)
    is_run = loading.is_run(run)
    if not (is_run or task or data):
        raise UserError(
            f"--run {shown(run)}: weights that don't say on which text they were trained. Name one with --data"
        )
    started = time.perf_counter()
    if task:
        tokenizer, shape = model.tokenizer, model.config.model
        examples = multiple_choice.load(task, data, tokenizer, shape, limit=limit, shots=options.shots)
        result = multiple_choice.evaluate(examples, make_scorer(model.config, options.batch_size), model.params)
        line, found = result.line(), result._asdict()
    else:
        line, found = _loss(model, data, limit, options.batch_size)
    found = {"step": model.about["step"], **found}
    say(f"{line} ({time.perf_counter() - started:.1f} s)")
    if is_run and (task or not data):  # the loss over another text is no validation loss of the run
        message = metrics_file.add_evaluation(
            best.run_of(run), {key: value for key, value in found.items() if key != "tokens"}
        )
        if message:
            say(message, error=True)
    if options.output:
        written = json.dumps({"run": str(run), "data": data, **found}, indent=2) + "\n"
        try:
            Path(options.output).write_text(written, encoding="utf-8")
        except OSError as error:
            raise RunError(f"--output {options.output}: writing failed ({error.strerror})") from error
    return 0


def _loss(model: Trained, data: str, limit: int, batch_size: int) -> tuple[str, dict[str, Any]]:
    """Returns a line to print, and the figures, for the loss over a text.

    With `data` empty it is the run's validation split. Otherwise it is the validation split of the token files of that
    name, or all of the text `data`.
    """
    config, tokenizer = configuration.resolve(model.config, model.tokenizer), model.tokenizer
    if data and not corpus.find_token_files(data):
        tokens = tokenizer.encode(corpora.load(data))
        loader.check_vocabulary(tokens, config.model.vocabulary_size, f"--data {data}")
    else:
        tokens = _validation_split(model, data)
    length = config.training.sequence_length
    compute, _ = choose_attention(config.model, config.compute, length)
    sequences = batch_size * mesh.make(config.parallel).size
    training = dataclasses.replace(config.training, batch_size=sequences, evaluation_batches=limit)
    config = dataclasses.replace(config, compute=compute, training=training)
    loss = make_validation_loss(config, tokens, length)(model.params)
    bits = loss * bits_per_byte_of_one_nat(config, tokens, length, tokenizer)
    count = target_count(config, tokens, length)
    what = f"the loss of {data} is" if data else "validation loss"
    line = f"{what} {loss:.4f}, {bits:.4f} bits per byte, {count:,} tokens"
    return line, {"val_loss": loss, "val_bits_per_byte": bits, "tokens": count}


def _validation_split(model: Trained, name: str) -> Tokens:
    """Returns the validation split of the token files `name`, or without a name that of the text that was trained on.

    UserError where the text is no longer what the run was trained on, or its tokens are another tokenizer's.
    """
    config, known = model.config, model.about["text"]
    text = config.data.mixture or config.data.text
    ours = not config.data.mixture and text in corpora.NAMES
    if not (name or known or ours):
        raise UserError("--run: its checkpoint doesn't say on which text it was trained. Name one with --data")
    if name:
        options = dataclasses.replace(config.data, text=name, mixture="", tokenizer=model.tokenizer.name)  # type: ignore[arg-type]
        config = dataclasses.replace(config, data=options)
    elif not ours:  # a path, to be read as data: of use only where the checkpoint has its fingerprint
        say(f"text      {shown(text)}, as the run's config.toml names it")
    data, _ = configuration.complete(config, model.tokenizer if isinstance(model.tokenizer, HuggingFace) else None)
    where = f"--data {name}" if name else f"--data.text {shown(text)}"
    change = "" if name or not known else fingerprint.difference(known, data.fingerprint)
    if change:
        raise UserError(
            f"{where}: not the text that the run was trained on: {change}. Restore the text, or name one with --data"
        )
    if data.tokenizer.state() != model.tokenizer.state():
        raise UserError(f"{where}: its tokens are not of the tokenizer that the run was trained with")
    return data.validation
