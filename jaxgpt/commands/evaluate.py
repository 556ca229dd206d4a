"""`run.py evaluate`: the loss of a run's newest whole checkpoint, or what it reaches on tasks."""

import contextlib
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from rich.console import Console
from rich.progress import Progress

from jaxgpt import writing
from jaxgpt.commands import configuration
from jaxgpt.data import corpora, corpus, fingerprint, loader
from jaxgpt.data.loader import Tokens
from jaxgpt.data.tokenizer_json import HuggingFace
from jaxgpt.errors import UserError
from jaxgpt.evaluation import registry
from jaxgpt.evaluation.interface import Engine, Options, Result, Subject, drawer
from jaxgpt.evaluation.scoring import bits_per_byte_of_one_nat, make_scorer, make_validation_loss, target_count
from jaxgpt.foreign_text import shown
from jaxgpt.interop import loading
from jaxgpt.kernels.choose import anew, choose_attention
from jaxgpt.options import checks, command_line, settings
from jaxgpt.options.config import Sampling
from jaxgpt.parallel import mesh
from jaxgpt.runs import best, metrics_file
from jaxgpt.runs.checkpoints import Trained
from jaxgpt.terminal import say
from jaxgpt.training.state import layout_of


@dataclass(frozen=True)
class Evaluate:
    """Measures the loss and the bits per byte of a trained model, or its scores on tasks."""

    run: str
    """Folder of a run, such as runs/quickstart, or weights in another format, such as a Hugging Face folder."""
    tasks: Annotated[str, tyro.conf.arg(aliases=("--task",))] = ""
    """Tasks to score the model on, as TASK=FILE, separated by commas: hellaswag, hellaswag_llmc, mmlu, arc_easy,
    arc_challenge, piqa, winogrande, openbookqa, lambada, gsm8k, ifeval, core (=FOLDER), or a file that describes a
    task, .toml or .json. Empty computes the loss over the run's validation split."""
    data: str = ""
    """File of a single task: JSON lines, CSV, Parquet, or llm.c's .bin; a multiple-choice task without one is
    downloaded. Without a task: the text, or the folder of token files, whose loss is computed."""
    limit: int = 0
    """Number of examples, or of the loss's batches, from the first; 0 takes all."""
    batch_size: int = 16
    """Number of sequences that each device scores at once, and of answers that are drawn side by side."""
    shots: int = 0
    """Number of answered questions shown before each question: for mmlu, gsm8k and described tasks; 0 shows as many as
    the description says."""
    examples: str = ""
    """File of the questions shown before each; empty takes the task's own file, and shows no question before
    itself."""
    shots_seed: int = 0
    """Random seed of the questions shown before each; 0 shows the first ones of the file."""
    tokens: int = 0
    """Largest number of tokens in a drawn answer; 0 takes the task's."""
    temperature: float = 0.0
    """Temperature of drawn answers; 0 takes the likeliest tokens."""
    top_k: int = 0
    """Number of likeliest tokens to draw among; 0 for all."""
    top_p: float = 1.0
    """Total probability of the likeliest tokens to draw among; 1 for all."""
    samples: int = 1
    """Number of answers to draw for each question."""
    seed: int = 0
    """Random seed of the first answer; each further one takes the next number."""
    devices: int = 0
    """Number of devices; 0 takes all there are."""
    output: str = ""
    """Write the figures to this JSON file."""


OF_DRAWN = ("examples", "shots_seed", "tokens", "temperature", "top_k", "top_p", "samples", "seed")


def run(words: list[str]) -> int:
    """Prints the figures, adds them to the run's metrics.jsonl, and writes them to `--output`.

    UserError where an option is out of its bounds, or the run, the task or the data can't be read; RunError where the
    output can't be written.
    """
    options = command_line.read(Evaluate, words, "evaluate")
    asked, how = _asked(options)
    model = loading.load(options.run, options.devices)
    is_run, step = loading.is_run(Path(options.run)), {"step": model.about["step"]}
    if not (is_run or asked or options.data):
        raise UserError(
            f"--run {shown(options.run)}: weights that don't say on which text they were trained. Name one with --data"
        )
    found = []
    for result, seconds in _on_tasks(model, asked, how, options) if asked else _loss(model, options):
        say(f"{result.line()} ({seconds:.1f} s)", flush=True)
        found.append(step | result._asdict())
    if is_run and (asked or not options.data):  # the loss over another text is no validation loss of the run
        for figures in found:
            kept = {key: value for key, value in figures.items() if key != "tokens"}
            if message := metrics_file.add_evaluation(best.run_of(Path(options.run)), kept):
                say(message, error=True)
                break
    if options.output:
        _write(options, found)
    return 0


def _asked(options: Evaluate) -> tuple[list[tuple[str, str]], Options]:
    """Returns the tasks that are asked for, with their files, and how they are asked.

    UserError for options that are out of their bounds, or don't go together.
    """
    not_negative = ("limit", "shots", "shots_seed", "devices", "tokens", "temperature", "top_k", "seed")
    checks.check_own(options, ("batch_size", "samples"), not_negative)
    sampling = Sampling(options.tokens, options.temperature, options.top_k, options.top_p)
    checks.check_sampling(sampling, "")
    asked = registry.parsed(options.tasks)
    if not asked and options.shots:
        raise UserError(f"--shots {options.shots}: only a task has examples to show. Name it with --tasks")
    if asked and options.data:
        if len(asked) > 1 or asked[0][1]:
            raise UserError(f"--data {shown(options.data)}: name each task's file behind its name: TASK=FILE,TASK=FILE")
        asked = [(asked[0][0], options.data)]
    for name, path in asked:
        registry.check_name(name, path)
    if options.samples > 1 and not options.temperature:
        raise UserError(f"--samples {options.samples}: of temperature 0 all would be the same: give --temperature too")
    if not asked:
        _refuse_drawing(options)
    how = (options.limit, options.shots, options.examples, options.shots_seed, sampling, options.samples, options.seed)
    return asked, Options(*how)


def _refuse_drawing(options: Evaluate) -> None:
    """Raises a UserError for an option that is of drawn answers alone."""
    defaults = {field.name: field.default for field in dataclasses.fields(Evaluate)}
    given = [settings.option("", key) for key in OF_DRAWN if getattr(options, key) != defaults[key]]
    if given:
        raise UserError(
            f"{', '.join(given)}: for tasks whose answers are drawn, and there is none of them: leave it away"
        )


def _on_tasks(
    model: Trained, asked: list[tuple[str, str]], how: Options, options: Evaluate
) -> Iterator[tuple[Result, float]]:
    """Yields each result, and the seconds it took. All tasks are read before the first is asked."""
    config = model.config
    subject = Subject(model.tokenizer, config.model, model.about.get("template") or {})
    tasks = [registry.load(name, path, subject, how) for name, path in asked]
    if not any(task.draws for task in tasks):
        _refuse_drawing(options)
    scorer = make_scorer(config, options.batch_size)
    devices = layout_of(config).mesh.devices.flat
    everywhere = functools.cache(lambda: [jax.device_put(model.params, device) for device in devices])
    with _shown_progress() as told:
        draw = drawer(everywhere, subject, config.compute, options.batch_size, told)
        yield from registry.timed(tasks, Engine(scorer, model.params, draw))


@contextlib.contextmanager
def _shown_progress() -> Iterator[Callable[[int, int], None]]:
    """Yields a function that shows on a terminal how many answers there are, of how many, until all are there."""
    hidden = not sys.stderr.isatty()
    bar = Progress(console=Console(stderr=True), transient=True, redirect_stdout=False, disable=hidden)
    answers = bar.add_task("answers")

    def told(ended: int, count: int) -> None:
        if ended < count:
            bar.start()
            bar.update(answers, completed=ended, total=count)
        else:
            bar.stop()

    try:
        yield told
    finally:
        bar.stop()


def _write(options: Evaluate, found: list[dict[str, Any]]) -> None:
    """Writes the figures: those of a single result themselves, and otherwise a list of them."""
    figures = found[0] if len(found) == 1 else {"results": found}
    written = json.dumps({"run": options.run, "data": options.data, **figures}, indent=2) + "\n"
    writing.write_output(options.output, written.encode())


class Loss:
    """The loss over a text, as a result."""

    def __init__(self, text: str, figures: dict[str, Any]):
        self._text, self._figures = text, figures

    def line(self) -> str:
        what = f"the loss of {self._text} is" if self._text else "validation loss"
        loss, bits, tokens = self._figures.values()
        return f"{what} {loss:.4f}, {bits:.4f} bits per byte, {tokens:,} tokens"

    def _asdict(self) -> dict[str, Any]:
        return self._figures


def _loss(model: Trained, options: Evaluate) -> Iterator[tuple[Loss, float]]:
    """Yields the loss over a text, and the seconds it took.

    With `--data` empty it is the run's validation split. Otherwise it is the validation split of the token files of
    that name, or all of the text of that name.
    """
    started, data = time.perf_counter(), options.data
    config, tokenizer = configuration.resolve(model.config, model.tokenizer), model.tokenizer
    if data and not corpus.find_token_files(data):
        tokens = tokenizer.encode(corpora.load(data))
        loader.check_vocabulary(tokens, config.model.vocabulary_size, f"--data {data}")
    else:
        tokens = _validation_split(model, data)
    length = config.training.sequence_length
    compute, _ = choose_attention(config.model, anew(config.compute), length)
    sequences = options.batch_size * mesh.make(config.parallel).size
    training = {"batch_size": sequences, "evaluation_batches": options.limit}
    config = settings.changed(config, compute=compute, training=training)
    loss = make_validation_loss(config, tokens, length)(model.params)
    bits = loss * bits_per_byte_of_one_nat(config, tokens, length, tokenizer)
    count = target_count(config, tokens, length)
    yield Loss(data, {"val_loss": loss, "val_bits_per_byte": bits, "tokens": count}), time.perf_counter() - started


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
        config = settings.changed(config, data={"text": name, "mixture": "", "tokenizer": model.tokenizer.name})
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
