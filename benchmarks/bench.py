"""Measures one training step beside jax.value_and_grad's and PyTorch's.

python -m benchmarks.bench [options]; --help lists them.
"""

import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro

from benchmarks import compare
from jaxgpt import environment
from jaxgpt.commands import cli, configuration
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import shown
from jaxgpt.options import checks, command_line, settings
from jaxgpt.options.config import Compute

PROGRAM = "-m benchmarks.bench"  # as it is typed behind "python"
CONFIGS = {"gpt2": "gpt2_124m", "llama": "llama_125m"}
Implementation = Literal["ours", "jax.grad", "torch", "torch.compile"]


@dataclass(frozen=True)
class Bench:
    """Measures one training step beside jax.value_and_grad's and PyTorch's, each in a process of its own."""

    model_family: Literal["gpt2", "llama"] = "gpt2"
    """Measure the config of this family: gpt2_124m, or llama_125m."""
    config: str = ""
    """Take the model's shape and the compute options from configs/CONFIG.toml, or from the path of a .toml file;
    empty takes the family's."""
    sizes: tuple[str, ...] = ("2x512",)
    """Sequences and their length, such as 2x512 4x1024."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """Compute dtypes."""
    who: tuple[Implementation, ...] = get_args(Implementation)
    """Implementations to measure."""
    steps: int = 5
    """Steps timed in a process, after two that are not."""
    rounds: int = 1
    """Number of times that each is run, in turn, so that a drift of the machine's speed hits all alike."""
    minutes: float = 20.0
    """Minutes that a process may take before it is stopped and left out."""
    output: str = ""
    """Write the figures to this JSON file."""
    chart: str = "bench.png"
    """Draw the bar chart to this PNG file."""
    profile: str = ""
    """Measure only our own step, at the first size and dtype: write a trace that XProf and Perfetto open to this folder
    and print a table of time per layer, forward and backward."""
    compute: Annotated[Compute, tyro.conf.arg(name="compute")] = field(default_factory=Compute)


def run(words: list[str]) -> int:
    """Prints tables, draws a chart, writes JSON; 1 if the implementations don't agree."""
    name, rest = command_line.take(words, "--config")
    chosen, _ = command_line.take(rest, "--model-family")
    config = settings.read(settings.find_config(name := name or CONFIGS.get(chosen or "gpt2", CONFIGS["gpt2"])))
    options = command_line.read(Bench, rest, PROGRAM, default=Bench(config=name, compute=config.compute))
    checks.check(replace(config, compute=options.compute))
    for key in ("steps", "rounds", "minutes"):
        checks.check_number(getattr(options, key), "", key, positive=True)
    if options.compute.recompute == "auto":
        raise UserError("--compute.recompute auto: name the level to measure")
    if not (options.sizes and options.dtypes and options.who):
        raise UserError("--sizes, --dtypes and --who each need at least one value")
    sizes = [size_of(text, "--sizes", config.model.context) for text in options.sizes]

    model = configuration.without_text(config).model
    if options.profile:
        from benchmarks import step_profile

        compute = replace(options.compute, dtype=options.dtypes[0])
        return step_profile.report(replace(config, model=model, compute=compute), *sizes[0], Path(options.profile))
    return compare.compare(
        model,
        sizes=sizes,
        dtypes=list(options.dtypes),
        steps=options.steps,
        rounds=options.rounds,
        minutes=options.minutes,
        who=list(options.who),
        compute=options.compute,
        output=Path(options.output) if options.output else None,
        chart=Path(options.chart),
    )


def size_of(text: str, option: str, context: int) -> tuple[int, int]:
    """Returns "2x512" as (2, 512). UserError, naming the option, for what is no size for this context."""
    batch, _, length = text.partition("x")
    if not all(re.fullmatch("[0-9]{1,10}", number) for number in (batch, length)):
        raise UserError(f"{option} {shown(text)}: give sequences x length, such as 2x512")
    if not (1 <= int(batch) <= checks.LARGEST and 1 <= int(length) <= context):
        raise UserError(f"{option} {text}: give at least 1 sequence, and a length from 1 to {context} for this model")
    return int(batch), int(length)


if __name__ == "__main__":
    environment.restart_with_allocator()
    sys.exit(cli.run(run, sys.argv[1:]))
