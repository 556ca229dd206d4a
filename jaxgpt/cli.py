"""The commands.

    python run.py [--config NAME] [options]     train
    python run.py generate --run runs/NAME      draw text from a trained model
    python run.py gradcheck                     compare every hand-written gradient with jax.grad
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxgpt import settings
from jaxgpt.config import Config, Sampling
from jaxgpt.errors import JaxgptError, UserError

DEFAULT_CONFIG = "quickstart"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0, 1 for a failed run, 2 for a mistake of the user's."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = "train" if not words or words[0].startswith("-") else words.pop(0)
    try:
        if command not in COMMANDS:
            raise UserError(
                f"{command}: there is no such command{settings.nearest(command, COMMANDS)} "
                f"There are: {', '.join(COMMANDS)}; see python run.py --help"
            )
        return COMMANDS[command](words)
    except JaxgptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status


def train(words: list[str]) -> int:
    """Trains a model."""
    config, name = _parse_config(words, __doc__ or "")
    settings.check(config)
    if not config.run.name:
        config = _with_run_name(config, name)
    from jaxgpt.training import loop  # here, because importing JAX and Orbax takes a second that --help need not wait

    loop.train(config)
    return 0


def _parse_config(words: list[str], description: str) -> tuple[Config, str]:
    """The configuration that --config and the other options give, and the name of --config."""
    name, rest = _take(words, "--config")
    name = name or DEFAULT_CONFIG
    path = settings.find_config(name)
    description += (
        f"\n--config NAME takes the defaults below from configs/NAME.toml (default: {DEFAULT_CONFIG}); there are: "
        f"{', '.join(settings.config_names())}"
    )
    config = tyro.cli(Config, default=settings.read(path), args=rest, prog="run.py", description=description)
    return config, path.stem


def _take(words: list[str], option: str) -> tuple[str | None, list[str]]:
    """The value of an option, as `--option value` or `--option=value`, and the other words."""
    value, rest, waiting = None, [], False
    for word in words:
        if waiting:
            value, waiting = word, False
        elif word == option:
            waiting = True
        elif word.startswith(f"{option}="):
            value = word.removeprefix(f"{option}=")
        else:
            rest.append(word)
    if waiting:
        raise UserError(f"{option} needs a value")
    return value, rest


def _with_run_name(config: Config, name: str) -> Config:
    from dataclasses import replace

    return replace(config, run=replace(config.run, name=name))


@dataclass(frozen=True)
class Generate:
    """Draws text from a trained model."""

    run: str
    """The run's folder, such as runs/quickstart."""
    prompt: str = "\n"
    """What the text begins with."""
    samples: int = 1
    """How many texts to draw."""
    seed: int = 0
    """Another seed draws other texts."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)


def generate(words: list[str]) -> int:
    """Draws text from a trained model, to the terminal as it comes."""
    options = tyro.cli(Generate, args=words, prog="run.py generate")
    from jaxgpt.generation import command

    command.generate(Path(options.run), options.prompt, options.samples, options.seed, options.sampling)
    return 0


@dataclass(frozen=True)
class Gradcheck:
    """Compares every hand-written gradient, layer by layer and of the whole model, with jax.grad."""

    dtype: Literal["float64", "float32", "bfloat16"] = "float64"
    """What the hand-written gradients are computed in; jax.grad is always computed in float64."""


def gradcheck(words: list[str]) -> int:
    """Prints one row per tensor; 1 if a gradient is outside its tolerance."""
    name, rest = _take(words, "--config")
    options = tyro.cli(
        Gradcheck,
        args=rest,
        prog="run.py gradcheck",
        description="Compares every hand-written gradient, layer by layer and of the whole model, with jax.grad. "
        "--config NAME takes the shapes from configs/NAME.toml; without it a small odd-sized model is checked.",
    )
    from jaxgpt import gradcheck_report

    return gradcheck_report.report(name, options.dtype)


COMMANDS = {"train": train, "generate": generate, "gradcheck": gradcheck}
