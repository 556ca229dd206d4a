"""The commands, each with a --help of its own.
Where none is named a run is trained. --version, or -V, prints the versions of jaxgpt, Python, JAX and what else numbers
depend on.

    python run.py [--config NAME] [options]     train; with --plan-for, what it would need on devices elsewhere
    python run.py prepare SOURCE                make token files of text of any size, or of a data set by name
    python run.py generate --run runs/NAME      draw text from a trained model
    python run.py serve --run runs/NAME         answer requests as OpenAI's completions API does
    python run.py evaluate --run runs/NAME      its loss, or its accuracy on HellaSwag, MMLU and others
    python run.py report runs/A runs/B          a page that shows how runs are doing; --live serves it
    python run.py convert FROM TO               weights between runs, Hugging Face's folders and llm.c's files
    python run.py verify --model M --state S    compare the forward and backward with what llm.c wrote down
    python run.py gradcheck                     compare every hand-written gradient with jax.grad
"""

import errno
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated

import tyro

from jaxgpt import environment, errors, terminal
from jaxgpt.errors import Interrupted, JaxgptError, UserError
from jaxgpt.foreign_text import shown
from jaxgpt.options import command_line, settings
from jaxgpt.options.command_line import nearest
from jaxgpt.options.config import Config

if TYPE_CHECKING:
    from jaxgpt.commands.train import Observer

DEFAULT_CONFIG = "quickstart"
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
    if command not in WITHOUT_JAX and command_line.OF_ALL.isdisjoint(words):
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
    is_config = command in settings.config_names()
    near = f"; did you mean --config {command}?" if is_config else nearest(command, COMMANDS)
    return UserError(
        f"{command}: there is no such command{near} There are: {', '.join(COMMANDS)}; see python run.py --help"
    )


@dataclass(frozen=True)
class Train:
    """The options --config and --plan-for, beside all options of the configuration."""

    config: str = DEFAULT_CONFIG
    """Take the defaults of all other options from configs/CONFIG.toml, or from the path of a .toml file."""
    plan_for: str = ""
    """Train nothing: print what the run would need on DEVICE:COUNT, such as h100:8, which need not be there. DEVICE is
    a100, h100, h200, b200, 4090 or cpu."""
    options: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


def train(words: list[str], observers: Sequence["Observer"] = ()) -> int:
    """Trains a model; `observers` are called as `train.train` says."""
    name, rest = command_line.take(command_line.written_out(words), "--config")
    path = settings.find_config(name or DEFAULT_CONFIG)
    description = f"{__doc__}\nConfigs: {', '.join(settings.config_names())}"
    defaults = Train(name or DEFAULT_CONFIG, options=settings.read_defaults(path))
    asked = command_line.read(Train, rest, "", default=defaults, description=description)
    config = asked.options
    if not config.run.name:
        config = replace(config, run=replace(config.run, name=path.stem))
    settings.check_processes(config.parallel)
    with terminal.ending_at_once():  # here, so that --help doesn't wait a second for JAX and Orbax
        from jaxgpt.commands import configuration
        from jaxgpt.commands import train as loop
        from jaxgpt.parallel import processes
    given = command_line.named(rest) | (settings.keys(path) if name else set())
    if asked.plan_for:
        return plan(config, asked.plan_for, given, words)
    with processes.together(config.parallel), errors.out_of_memory_told():  # before JAX sees its devices for weights
        config = configuration.with_weights(config, given)
        settings.check(config)
        loop.train(config, *observers)
    return 0


def plan(config: Config, devices: str, given: set[str], words: list[str]) -> int:
    """Plans the run for devices that may be elsewhere."""
    from jaxgpt.commands import configuration, plan

    config = configuration.with_weights(config, given)
    settings.check(config)
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
