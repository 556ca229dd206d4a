"""The command: its options, the programs that it compiles and the output of its figures."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from benchmarks.bench import size_of
from benchmarks.gpu_program import compile, picture, report
from benchmarks.gpu_program.cards import CARDS
from jaxgpt.commands import configuration
from jaxgpt.errors import UserError
from jaxgpt.options import checks, command_line, settings
from jaxgpt.options.config import Compute, Config, Model, Optimizer, Parallel

PROGRAM = "-m benchmarks.gpu_program"  # as it is typed behind "python"


@dataclass(frozen=True)
class GpuProgram:
    """Compiles the train step for an NVIDIA GPU, with neither driver nor card, and prints what its kernels take at
    least. The options of a run's configuration are here too."""

    config: str = "gpt2_124m"
    """Take the options of configs/CONFIG.toml, or of the path of a .toml file; the dtype is bfloat16 unless named."""
    size: str = "32x1024"
    """Sequences on each card and their length."""
    card: Literal["a100", "h100", "h200", "b200", "4090"] = "h100"
    """The card to compile for."""
    topology: int = 1
    """Number of cards that train together, on one machine."""
    against: Literal["", "jax.grad"] = ""
    """Compile automatic differentiation's step as well, with scanned and unrolled layers, and compare with the
    better."""
    output: str = ""
    """Write the figures to this JSON file."""
    picture: str = ""
    """Draw the kinds of kernels to this PNG file."""
    text: str = ""
    """Write XLA's optimised program to this text file."""
    model: Annotated[Model, tyro.conf.arg(name="model")] = field(default_factory=Model)
    optimizer: Annotated[Optimizer, tyro.conf.arg(name="optimizer")] = field(default_factory=Optimizer)
    compute: Annotated[Compute, tyro.conf.arg(name="compute")] = field(default_factory=Compute)
    parallel: Annotated[Parallel, tyro.conf.arg(name="parallel")] = field(default_factory=Parallel)


def run(words: list[str]) -> int:
    """Compiles what the words ask for and prints it."""
    jax.config.update("jax_platforms", "cpu")  # a card that is there is left alone
    jax.config.update("jax_enable_compilation_cache", False)
    options, config = configured(words)
    card = CARDS[options.card]
    with compile.devices_of(card, options.topology) as devices:
        config, attention = configuration.with_attention(config)
        ours = compile.ours(config, devices)
        reports = [report.of("ours", ours, config, card)]
        if options.against:
            for layers in ("scanned", "unrolled"):
                program = compile.automatic(config, layers, devices)
                reports.append(report.of(f"jax.grad, {layers}", program, config, card))
    if options.text:
        Path(options.text).write_text(ours.text)
    report.show(reports, config, card, f"{options.config}, {options.size}", attention)
    if options.output:
        named = {"config": options.config, "size": options.size, "card": options.card, "cards": options.topology}
        figures = {**named, **report.figures(reports, config)}
        Path(options.output).write_text(json.dumps(figures, indent=2) + "\n")
    if options.picture:
        title = f"{options.config}, {options.size}, {config.compute.dtype}, {card.name}"
        picture.draw({program.name: program.kinds for program in reports}, title, Path(options.picture))
    return 0


def configured(words: list[str]) -> tuple[GpuProgram, Config]:
    """Returns the options, and the configuration with its sizes."""
    name, rest = command_line.take(words, "--config")
    config = settings.read(settings.find_config(name := name or GpuProgram.config))
    default = GpuProgram(
        config=name,
        model=config.model,
        optimizer=config.optimizer,
        compute=replace(config.compute, dtype="bfloat16"),
        parallel=config.parallel,
    )
    options = command_line.read(GpuProgram, rest, PROGRAM, default=default)
    checks.check_number(options.topology, "", "topology", positive=True)
    if options.compute.recompute == "auto":
        raise UserError("--compute.recompute auto: name the level to compile")
    batch, length = size_of(options.size, "--size", options.model.context)
    if options.against and (options.topology > 1 or options.model.family != "gpt2"):
        raise UserError("--against jax.grad is written for GPT-2 on one card: leave out --topology, or --against")
    config = replace(
        config,
        model=options.model,
        optimizer=options.optimizer,
        compute=options.compute,
        parallel=replace(options.parallel, devices=options.topology),
        training=replace(config.training, batch_size=batch * options.topology, micro_batches=1, sequence_length=length),
    )
    checks.check(config)
    return options, configuration.without_text(config)
