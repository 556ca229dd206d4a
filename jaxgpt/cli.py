"""The commands, each with a --help of its own.
Where none is named a run is trained. --version, or -V, prints the versions of jaxgpt, Python, JAX and what else numbers
depend on.

    python run.py [--config NAME] [options]     train
    python run.py prepare SOURCE                make token files of text of any size, or of a data set by name
    python run.py generate --run runs/NAME      draw text from a trained model
    python run.py serve --run runs/NAME         answer requests as OpenAI's completions API does
    python run.py evaluate --run runs/NAME      its loss, or its accuracy on HellaSwag, MMLU and others
    python run.py report runs/A runs/B          a page that shows how runs are doing; --live serves it
    python run.py convert FROM TO               weights between runs, Hugging Face's folders and llm.c's files
    python run.py verify --model M --state S    compare the forward and backward with what llm.c wrote down
    python run.py gradcheck                     compare every hand-written gradient with jax.grad
    python run.py bench                         measure a training step beside jax.grad's and PyTorch's
"""

import errno
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxgpt import command_line, environment, out_of_memory, settings, terminal
from jaxgpt.config import Config, Sampling
from jaxgpt.errors import Interrupted, JaxgptError, UserError
from jaxgpt.foreign_text import shown

DEFAULT_CONFIG = "quickstart"
WITHOUT_JAX = ("prepare", "report")
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status, as docs/resuming.md lists them."""
    terminal.prepare()
    try:
        try:
            with out_of_memory.told():
                return _command(list(sys.argv[1:] if arguments is None else arguments))
        except JaxgptError as error:
            terminal.say(str(error) if isinstance(error, Interrupted) else f"error: {error}", error=True)
            return error.status
        finally:
            sys.stdout.flush()  # here, where it can be said that it fails
    except OSError as error:
        if error.errno != errno.EPIPE:  # of a broken pipe nobody need hear: `head` has read enough
            terminal.say(f"error: {_of_system(error)}", error=True)
        terminal.discard(sys.stdout)
        return 1
    except KeyboardInterrupt:  # where no training step would be lost
        terminal.say(f"\n{terminal.INTERRUPTED}", error=True)
        if arguments is None:
            terminal.end(Interrupted.status)
        return Interrupted.status


def _of_system(error: OSError) -> str:
    """Returns what the system has refused: to write what is printed, which has no name, or a file."""
    reason = error.strerror or str(error) or type(error).__name__
    if error.filename is None:
        return f"the output can't be written: {reason}" if error.errno in UNWRITABLE else reason
    return f"{shown(os.fsdecode(error.filename))}: {reason}"


def _command(words: list[str]) -> int:
    """Runs the command that the words name. UserError where there is none."""
    for word in words:
        terminal.check_typed(word)
    command = "train" if not words or words[0].startswith("-") else words.pop(0)
    if "--version" in words or words[:1] == ["-V"]:
        return version()
    if command not in COMMANDS:
        is_config = command in settings.config_names()
        near = f"; did you mean --config {command}?" if is_config else settings.nearest(command, COMMANDS)
        raise UserError(
            f"{command}: there is no such command{near} There are: {', '.join(COMMANDS)}; see python run.py --help"
        )
    environment.check()
    if command not in WITHOUT_JAX and command_line.OF_ALL.isdisjoint(words):
        out_of_memory.check_limit()
        _spare_processor_info()
    return COMMANDS[command](words)


def _spare_processor_info() -> None:
    """Switches off the part of XLA that fails where Linux doesn't say what the processor is, as without /proc."""
    if sys.platform == "linux" and not os.access("/proc/cpuinfo", os.R_OK):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_experimental_ynn_fusion_type="


def version() -> int:
    """Prints what a run writes to its config.toml of the versions that it is trained with."""
    for name, number in settings.versions().items():
        terminal.say(f"{name} {number}")
    return 0


@dataclass(frozen=True)
class Train:
    """--config, beside all options of the configuration."""

    config: str = DEFAULT_CONFIG
    """Take the defaults of all other options from configs/CONFIG.toml, or from the path of a .toml file."""
    options: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


def train(words: list[str]) -> int:
    """Trains a model."""
    name, rest = command_line.take(command_line.written_out(words), "--config")
    path = settings.find_config(name or DEFAULT_CONFIG)
    description = f"{__doc__}\nConfigs: {', '.join(settings.config_names())}"
    defaults = Train(name or DEFAULT_CONFIG, settings.read_defaults(path))
    config = command_line.read(Train, rest, "", default=defaults, description=description).options
    if not config.run.name:
        config = replace(config, run=replace(config.run, name=path.stem))
    settings.check_processes(config.parallel)
    with terminal.ending_at_once():  # here: importing JAX and Orbax takes a second that --help doesn't wait
        from jaxgpt.parallel import processes
        from jaxgpt.training import loop

    with (
        processes.together(config.parallel),
        out_of_memory.told(),
    ):  # before JAX looks at its devices, as it does to read weights
        if config.training.init_from:
            from jaxgpt.interop import initial

            config = initial.with_shape(config, command_line.named(rest) | (settings.keys(path) if name else set()))
        settings.check(config)
        loop.train(config)
    return 0


@dataclass(frozen=True)
class Generate:
    """Draws text from a trained model."""

    run: str
    """The run's folder, such as runs/quickstart."""
    prompt: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="STR")] = ()
    """What the text begins with; given several times, one text for each. Without it, a line break."""
    prompts: str = ""
    """A UTF-8 file with a prompt on each line."""
    samples: int = 1
    """How many texts to draw for each prompt; all are drawn side by side."""
    seed: int = 0
    """Of the first sample; the next one has the next."""
    chat: bool = False
    """Read lines from the terminal, or from a pipe, and go on with each, one text from the first line to the last."""
    special: bool = False
    """Take special tokens that a prompt spells out, such as <|endoftext|>, for the tokens and not for characters."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)


def generate(words: list[str]) -> int:
    """Draws text from a trained model, to the terminal as it comes."""
    options = command_line.read(Generate, words, "generate")
    from jaxgpt.generation import command

    if options.chat and (options.prompt or options.prompts or options.samples != 1):
        raise UserError("--chat takes its prompts from what is typed: leave away --prompt, --prompts and --samples")
    command.check(options.samples, options.seed, options.sampling)
    prompts = [*options.prompt, *(command.prompts_in(Path(options.prompts)) if options.prompts else [])]
    loaded = command.load(Path(options.run))
    if options.chat:
        from jaxgpt.generation import chat

        chat.chat(loaded, options.sampling, options.seed, special=options.special)
    else:
        command.generate(
            loaded, prompts or ["\n"], options.samples, options.seed, options.sampling, special=options.special
        )
    return 0


def serve(words: list[str]) -> int:
    """Answers requests until it is told to end."""
    from jaxgpt.generation import serving

    return serving.serve(command_line.read(serving.Serve, words, "serve"))


@dataclass(frozen=True)
class Evaluate:
    """The loss and the bits per byte of a trained model, or its accuracy on a task."""

    run: str
    """The run's folder, such as runs/quickstart."""
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


def evaluate(words: list[str]) -> int:
    """Prints the figures and adds them to the run's metrics.jsonl."""
    options = command_line.read(Evaluate, words, "evaluate")
    from jaxgpt.evaluation import command

    command.evaluate(
        Path(options.run),
        options.task,
        options.data,
        limit=options.limit,
        batch_size=options.batch_size,
        shots=options.shots,
        devices=options.devices,
        output=Path(options.output) if options.output else None,
    )
    return 0


@dataclass(frozen=True)
class Gradcheck:
    """Compares every hand-written gradient, layer by layer and of the whole model, with jax.grad."""

    config: str = ""
    """Take the shapes from configs/CONFIG.toml; empty checks a small model of odd sizes."""
    dtype: Literal["float64", "float32", "bfloat16"] = "float64"
    """What the hand-written gradients are computed in; jax.grad is always computed in float64."""
    chart: str = ""
    """Draw the errors beside their tolerances to this PNG file."""


def gradcheck(words: list[str]) -> int:
    """Prints one row per tensor; 1 if a gradient is outside its tolerance."""
    options = command_line.read(Gradcheck, words, "gradcheck")
    from jaxgpt import gradcheck_report

    chart = Path(options.chart) if options.chart else None
    return gradcheck_report.report(options.config or None, options.dtype, chart)


@dataclass(frozen=True)
class Convert:
    """Reads weights of one format and writes another. docs/formats.md tells what is read and written."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FROM")]
    """A run's folder, a checkpoint, a Hugging Face folder, the name of a model on its hub, or an llm.c model file."""
    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TO")]
    """What to write."""
    to: Literal["auto", "huggingface", "llmc", "run"] = "auto"
    """In which format; auto writes llm.c's where TO ends with .bin, else a Hugging Face folder from a run of ours, and
    a run's folder from anything else."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the numbers written; auto keeps what they are."""
    tokenizer: str = ""
    """For weights that don't say which is theirs: gpt2, bytes, or the path of a tokenizer.json or an llm.c tokenizer
    file."""
    shard_gib: float = 5.0
    """A Hugging Face model is written in files of at most so many GiB."""
    overwrite: bool = False
    """Replace what is at TO."""


def convert(words: list[str]) -> int:
    """Converts weights, and prints what was read and written."""
    options = command_line.read(Convert, words, "convert")
    settings.check_number(options.shard_gib, "", "shard_gib", positive=True)
    from jaxgpt.interop.convert import convert as run

    run(
        options.source,
        Path(options.target),
        form=options.to,
        dtype=options.dtype,
        tokenizer=options.tokenizer,
        shard_bytes=int(min(options.shard_gib, 2.0**30) * 2**30),
        overwrite=options.overwrite,
    )
    return 0


@dataclass(frozen=True)
class Verify:
    """Compares logits, loss and every gradient with llm.c's, on a batch that it has written down."""

    model: str
    """An llm.c model file in float32, such as gpt2_124M.bin."""
    state: str
    """The debug state that belongs to it, such as gpt2_124M_debug_state.bin."""


def verify(words: list[str]) -> int:
    """Prints one row per tensor; 1 if one is outside its bounds."""
    options = command_line.read(Verify, words, "verify")
    from jaxgpt.interop.verify import verify as run

    return run(Path(options.model), Path(options.state))


def prepare(words: list[str]) -> int:
    """Makes token files of text."""
    from jaxgpt.data import command

    return command.run(words)


def report(words: list[str]) -> int:
    """Writes or serves a page that shows how runs are doing."""
    from jaxgpt.reports import command

    return command.run(words)


def bench(words: list[str]) -> int:
    """Measures a training step beside others'."""
    from jaxgpt import bench_command

    return bench_command.run(words)


COMMANDS = {
    "train": train,
    "prepare": prepare,
    "generate": generate,
    "serve": serve,
    "evaluate": evaluate,
    "report": report,
    "convert": convert,
    "verify": verify,
    "gradcheck": gradcheck,
    "bench": bench,
}
