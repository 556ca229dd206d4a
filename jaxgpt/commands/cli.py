"""The command line: which command its words name, and training, whose options are a run's configuration."""

import errno
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from jaxgpt import environment, errors, terminal
from jaxgpt.errors import Interrupted, JaxgptError, UserError
from jaxgpt.foreign_text import shown
from jaxgpt.options import checks, command_line, fit, help_page, settings
from jaxgpt.options.command_line import nearest
from jaxgpt.options.config import Config

if TYPE_CHECKING:
    from jaxgpt.commands.train import Observer

DEFAULT_CONFIG = "quickstart"
TUNING = "finetune"  # the config that trains no model from random weights
DESCRIPTION = """\
Trains a model. The other commands, each with a page of its own, as in python run.py prepare --help:

    prepare SOURCE              make token files from text of any size
    generate runs/NAME          draw text from a trained model, or chat with it
    serve runs/NAME             serve a model with OpenAI's API, and a page to chat
    evaluate runs/NAME          measure a model's loss, or its accuracy on tasks
    report runs/A runs/B        make a page that shows how runs are doing
    convert FROM TO             convert weights between runs and other programs' formats
    verify --model M --state S  compare the gradients with llm.c's own
    gradcheck                   compare every hand-written gradient with jax.grad

--version, or -V, prints the versions of the program and of its libraries.
"""
EXAMPLES = """\
Examples:

    python run.py                                             a small model of English, in minutes
    python run.py --data.text book.txt --training.steps 3000  the same, on your own text
    python run.py --config gpt2_124m --data.text data/books --compute.dtype bfloat16
"""
COMMON = (
    "data.text", "data.tokenizer", "model.layers", "model.heads", "model.width", "model.context", "training.steps",
    "training.batch-size", "training.micro-batches", "training.sequence-length", "training.init-from",
    "training.evaluate-every", "optimizer.learning-rate", "compute.dtype", "lora.rank", "parallel.zero", "run.name",
    "run.resume", "checkpoint.every-minutes", "sampling.temperature",
)  # fmt: skip
WITHOUT_JAX = ("prepare", "report")
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


def start() -> int:
    """Runs the command of this process's command line, as `run.py` and the installed `jaxgpt` do."""
    environment.restart_with_allocator()
    return main()


def main(arguments: Sequence[str] | None = None, observers: Sequence["Observer"] = ()) -> int:
    """Runs a command and returns its exit status, as docs/resuming.md lists them.

    The words are by default this process's own. The observers are called with a run's metrics, as `train.train` says.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    return run(lambda words: _command(words, observers), words, of_process=arguments is None)


def run(command: Callable[[list[str]], int], words: list[str], *, of_process: bool = False) -> int:
    """Runs a command with these words; returns its exit status, or that of the error that it ended with.

    With `of_process`, Ctrl-C ends the process.
    """
    terminal.prepare()
    try:
        try:
            with errors.out_of_memory_told(), environment.told():
                for word in words:
                    terminal.check_typed(word)
                environment.check()
                return command(words)
        except JaxgptError as error:
            terminal.say(str(error) if isinstance(error, Interrupted) else f"error: {error}", error=True)
            return error.status
        finally:
            sys.stdout.flush()  # here, where a failure can be reported
    except OSError as error:
        if error.errno != errno.EPIPE:  # a broken pipe isn't reported: `head` has read enough
            terminal.say(f"error: {_of_system(error)}", error=True)
        terminal.discard(sys.stdout)
        return 1
    except KeyboardInterrupt:  # outside of training steps, so that none is lost
        terminal.say(f"\n{terminal.INTERRUPTED}", error=True)
        if of_process:
            terminal.end(Interrupted.status)
        return Interrupted.status


def _of_system(error: OSError) -> str:
    """Returns the message about what the system has refused: to write the output, which has no name, or a file."""
    why = errors.reason(error)
    if error.filename is None:
        return f"the output can't be written: {why}" if error.errno in UNWRITABLE else why
    return f"{shown(os.fsdecode(error.filename))}: {why}"


def _command(words: list[str], observers: Sequence["Observer"]) -> int:
    """Runs the command that the words name. UserError where there is none."""
    command = "train" if not words or words[0].startswith("-") else words.pop(0)
    if "--version" in words or words[:1] == ["-V"]:
        terminal.say("\n".join(f"{name} {number}" for name, number in settings.versions().items()))
        return 0
    if command not in COMMANDS:
        raise _no_such_command(command)
    if command == "report":
        words = [word for word in words if word != "--run"]  # as the other commands name a run
    if command not in WITHOUT_JAX and not command_line.asks_for_help(words):
        environment.check_address_space()
        if sys.platform == "linux" and not os.access("/proc/cpuinfo", os.R_OK):  # as without /proc: a part of XLA fails
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_experimental_ynn_fusion_type="
    if command == "train":
        return train(words, observers)
    with terminal.ending_at_once():
        module = importlib.import_module(COMMANDS[command])
    return module.run(words)


def _no_such_command(command: str) -> UserError:
    """Returns the error that names the command which may have been meant."""
    if command == "bench":
        return UserError(
            "bench: not a command of the package, which doesn't hold what it compares with. In a clone: make bench, or "
            "python -m benchmarks.bench"
        )
    return UserError(
        f"{shown(command)}: there is no such command{_meant(command)} There are: {', '.join(COMMANDS)}; see "
        f"{terminal.command('--help')}"
    )


def _meant(word: str) -> str:
    """Returns what a word in a command's place may stand for, as a question; '.' where nothing is near."""
    path, configs = Path(word), settings.config_names()
    if word in ("help", "version"):
        words = f"--{word}"
    elif word == "resume":
        words = "--resume runs/NAME"
    elif word in configs or (path.suffix == ".toml" and os.path.isfile(path)):
        words = f"--config {shown(word)}"
    elif os.path.isfile(path / "config.toml"):
        words = f"generate {shown(word)}, or --resume {shown(word)} to train on"
    elif os.path.exists(path):
        words = f"--data.text {shown(word)}"
    elif (near := nearest(word, COMMANDS)) != ".":
        return near
    else:
        return nearest(word, configs).replace("you mean ", "you mean --config ")
    return f"; did you mean {words}?"


@dataclass(frozen=True)
class Train:
    """The options --config and --plan-for, beside all options of the configuration."""

    config: str = DEFAULT_CONFIG
    """Take the defaults of all other options from configs/CONFIG.toml, or from the path of a .toml file."""
    plan_for: str = ""
    """Train nothing, and print what the run would need on DEVICE:COUNT, such as h100:8; this machine needs no such
    device. DEVICE is a100, h100, h200, b200, 4090 or cpu."""
    options: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


def train(words: list[str], observers: Sequence["Observer"] = ()) -> int:
    """Trains a model; `observers` are called as `train.train` says."""
    resumed, rest = command_line.resumed(words)
    name, rest = command_line.take(command_line.written_out(rest), "--config")
    path = resumed / "config.toml" if resumed else settings.find_config(name or DEFAULT_CONFIG)
    defaults = settings.read_resumed(resumed) if resumed else settings.read_defaults(path)
    if command_line.asks_for_help(rest):
        terminal.say(help_of(rest, Train(name or DEFAULT_CONFIG, options=defaults)))
        sys.exit(0)
    asked = command_line.read(Train, rest, "", default=Train(name or DEFAULT_CONFIG, options=defaults))
    named, in_file = command_line.named(rest), settings.keys(path) if name else set()
    config = fit.keeping(asked.options, named, in_file)
    checks.check_processes(config.parallel)
    with terminal.ending_at_once():  # here, so that --help doesn't wait a second for JAX and Orbax
        from jaxgpt.commands import configuration
        from jaxgpt.commands import train as loop
        from jaxgpt.parallel import processes
        from jaxgpt.runs import folder
    given = named | in_file
    if asked.plan_for:
        config = settings.changed(config, run={"name": config.run.name or path.stem})
        return plan(config, asked.plan_for, given, words)
    with processes.together(config.parallel), errors.out_of_memory_told():  # before JAX sees its devices for weights
        if not config.run.name:
            text = Path(config.data.text).stem if "data.text" in named else ""
            config = folder.named(config, f"{path.stem}-{text}" if text else path.stem)
        begun = config.training.init_from or config.lora.adapters or folder.will_resume(config)
        if name == TUNING and not begun:
            raise UserError(f"--config {TUNING} goes on from a model: name it by --init-from, as runs/NAME or gpt2")
        config = configuration.with_weights(config, given)
        checks.check(config)
        fit.check(config)
        loop.train(config, *observers)
    return 0


def help_of(words: list[str], defaults: Train) -> str:
    """Returns the page that --help prints: the common options, or those of the sections behind --help-all, or all."""
    usage, known = f"{terminal.program()} [--config NAME] [options]", help_page.sections(Train)
    if command_line.ALL in words:
        only = [word for word in words[words.index(command_line.ALL) + 1 :] if word in known]
        return help_page.page(Train, usage, DESCRIPTION, defaults, only or None)
    ours = f"{DESCRIPTION}\n{EXAMPLES}".replace("python run.py", terminal.program())
    head = f"usage: {usage}\n\n{ours}\nConfigs: {', '.join(settings.config_names())}\n\nCommon options:"
    more = f"{command_line.ALL} shows all options, and {command_line.ALL} model those of a section: {', '.join(known)}"
    some = help_page.some(Train, ("config", "plan-for", *COMMON), defaults)
    return "\n".join([help_page.fitted(head), some, "", help_page.fitted(more)])


def plan(config: Config, devices: str, given: set[str], words: list[str]) -> int:
    """Plans the run for devices that may be elsewhere."""
    from jaxgpt.commands import configuration, plan

    config = configuration.with_weights(config, given)
    checks.check(config)
    fit.check(config)
    _, rest = command_line.take(words, "--plan-for")
    return plan.run(config, devices, rest)


COMMANDS = {
    "train": "jaxgpt.commands.train",
    "prepare": "jaxgpt.commands.prepare",
    "generate": "jaxgpt.commands.generate",
    "serve": "jaxgpt.commands.serve",
    "evaluate": "jaxgpt.commands.evaluate",
    "report": "jaxgpt.commands.report",
    "convert": "jaxgpt.commands.convert",
    "verify": "jaxgpt.commands.verify",
    "gradcheck": "jaxgpt.commands.gradcheck",
}  # modules; each one's `run` takes the words behind the command's name
