"""`run.py gradcheck --as-run`: the very compiled step of a configuration, on the device where it trains.

1. The configuration is completed as a run's is: from its text, its weights and this machine (`configuration.py`).
2. The step is compiled as the run compiles it. What of a large run is checked is decided (`as_run_sampling.py`).
3. Each gradient is compared with `jax.grad` in float64, and one step with the optimizer's formula (`proof/as_run.py`).
4. The verdict is printed and written into the run's folder, where its report shows it.
"""

import dataclasses
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import jax
import psutil
import tyro

from jaxgpt import compilation_cache, files, writing
from jaxgpt.commands import configuration, other_times
from jaxgpt.commands.batches import open_source
from jaxgpt.errors import RunError, UserError
from jaxgpt.foreign_text import shown
from jaxgpt.models import family
from jaxgpt.options import checks, command_line, settings
from jaxgpt.options.config import Config
from jaxgpt.parallel import mesh
from jaxgpt.proof import as_run_sampling, as_run_step
from jaxgpt.proof.as_run import Check, Row
from jaxgpt.runs import verdict
from jaxgpt.terminal import command, say
from jaxgpt.training import fit
from jaxgpt.training.step import compile_step

DEFAULT_CONFIG = "quickstart"
NAMED = 3  # tensors, at most, in the message about those that are wrong
# Options that a step is made from: sections, and of training these.
OF_A_STEP = ("model", "compute", "parallel", "objective", "lora", "optimizer")
OF_TRAINING = ("batch_size", "micro_batches", "sequence_length")
DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class AsRun:
    """Compares every gradient of a configuration's compiled step with jax.grad, on the device where it trains."""

    config: str = DEFAULT_CONFIG
    """Take the defaults of all other options from configs/CONFIG.toml, or from the path of a .toml file. `--as-run
    runs/NAME` takes those of a run."""
    output: str = ""
    """Write the verdict to this JSON file too."""
    options: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


def run(words: list[str]) -> int:
    """Prints what is compared, the errors and the verdict. RunError where a tensor is wrong."""
    asked, output = _asked(words)
    compilation_cache.use(asked.run.compilation_cache)
    mesh.check(asked)
    asked = open_source(asked).config
    config, attention = configuration.with_attention(asked)
    config, program, *_ = fit.prepare(config, fit.capacity(config), other_times.of_run(config))
    memory, processors = psutil.virtual_memory().available, psutil.cpu_count(logical=False) or 1
    sampled, left_out = as_run_sampling.sample(config, memory, processors)
    if left_out:
        del program
        program = compile_step(sampled)
    about = _about(config, sampled, left_out, attention)
    say("\n".join(f"{name:<9} {about[name]}" for name in ("step", "device", "driver", "compared") if about[name]))
    tensors = _worst(_rows(Check(sampled), program))
    _say_table(tensors)
    found = verdict.as_json(tensors, about)
    say(_write(found, asked, output))
    _conclude(tensors)
    return 0


def _asked(words: list[str]) -> tuple[Config, str]:
    """Returns the configuration that the words ask for, as a run begins with it, and where to write the verdict."""
    words = command_line.written_out(words)
    if words and not words[0].startswith("-"):
        folder, rest = Path(words[0]), words[1:]
        if not files.exists(folder / "config.toml"):
            raise UserError(f"--as-run {shown(folder)}: not a run's folder{command_line.runs_near(folder)}")
        if command_line.take(rest, "--config")[0]:
            raise UserError(f"--as-run {shown(folder)} says already which config: leave --config away")
        name, given, defaults = DEFAULT_CONFIG, set(), settings.read_resumed(folder)
    else:
        name, rest = command_line.take(words, "--config")
        path = settings.find_config(name or DEFAULT_CONFIG)
        defaults, given = settings.read_defaults(path), settings.keys(path) if name else set()
        if not defaults.run.name:
            defaults = dataclasses.replace(defaults, run=dataclasses.replace(defaults.run, name=path.stem))
    default = AsRun(name or DEFAULT_CONFIG, options=defaults)
    options = command_line.read(AsRun, rest, "gradcheck --as-run", default=default)
    config = options.options
    if config.parallel.processes > 1:
        raise UserError(
            f"--parallel.processes is {config.parallel.processes}: gradcheck --as-run checks the devices of one "
            "process. Leave it away, here on each machine"
        )
    if config.compute.products == "fp8":
        raise UserError(
            "--compute.products fp8 can't be checked yet: its gradients are some percent from jax.grad's, as they are "
            "meant to be, and training measures by how much (docs/fp8.md). --compute.products dtype checks all the "
            "other code of this step"
        )
    config = configuration.with_weights(config, given | command_line.named(rest))
    checks.check(config)
    return config, options.output


def _about(config: Config, sampled: Config, left_out: list[str], attention: str) -> dict[str, Any]:
    """Returns what is compared, where and with what."""
    devices, compute, training = mesh.make(config.parallel).devices.flat, config.compute, sampled.training
    shards = f", ZeRO stage {config.parallel.zero}" if len(devices) > 1 else ""
    adapters = f", adapters of rank {config.lora.rank}" if config.lora.rank else ""
    return {
        "step": f"{family(config.model).describe(config.model)}, {config.objective.name}{adapters}, {compute.dtype}, "
        f"attention {attention}, recompute = {compute.recompute}",
        "device": f"{len(devices)} × {devices[0].device_kind} ({devices[0].platform}){shards}",
        "driver": _driver(),
        "versions": settings.versions(),
        "compared": "the gradients by the run's own step with jax.grad in float64 on the CPU, from random weights, of "
        f"{training.micro_batches} x {training.batch_size} sequences of {training.sequence_length:,} tokens; "
        + (f"of the run, only {', '.join(left_out)}" if left_out else "all of the run's step"),
        "options": dataclasses.asdict(sampled),
    }


def _driver() -> str:
    """Returns the version of NVIDIA's driver; empty where there is none."""
    try:
        found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", files.read_text(DRIVER, 1 << 16))
    except UserError:
        return ""
    return f"NVIDIA {found[1]}" if found else ""


def _rows(check: Check, program: jax.stages.Compiled) -> Iterator[Row]:
    """Yields all rows, and says after each of the inputs what the worst was."""
    say(f"allowed   {check.limit:.1e} relative, which {check.config.compute.dtype}'s rounding explains\n")
    for inputs in check.batches().inputs():
        yield from _timed(inputs.name, inputs.about, check.rows(inputs))
    yield from _timed(as_run_step.STEP, "one step of the compiled program", as_run_step.rows(check, program))


def _timed(name: str, about: str, found: Iterator[Row]) -> Iterator[Row]:
    started, rows = time.perf_counter(), list(found)
    worst, wrong = max(rows, key=lambda row: row.of_tolerance), sum(not row.passed for row in rows)
    words = f"worst {max(worst.error, worst.entry):.1e} of {worst.tolerance:.1e} allowed, {worst.tensor}"
    say(
        f"{name:<12} {about}: {f'{wrong} FAILED, ' if wrong else ''}{words} ({time.perf_counter() - started:.1f} s)",
        flush=True,
    )
    yield from rows


def _worst(rows: Iterator[Row]) -> list[verdict.Tensor]:
    """Returns each tensor's worst row, with a row of its own for a step's."""
    found: dict[str, Row] = {}
    for row in rows:
        name = f"{row.tensor} after a step" if row.inputs.startswith(as_run_step.STEP) else row.tensor
        if name not in found or row.of_tolerance > found[name].of_tolerance:
            found[name] = row._replace(tensor=name)
    return [
        verdict.Tensor(row.tensor, row.error, row.entry, row.tolerance, row.inputs, row.fault, row.passed)
        for row in found.values()
    ]


def _say_table(tensors: list[verdict.Tensor]) -> None:
    width = max(len(tensor.tensor) for tensor in tensors)
    say(f"\n{'tensor':<{width}} {'in norm':>8} {'largest':>8} {'allowed':>8}  worst at")
    for of in tensors:
        said = f"  FAILED{': ' if of.fault else ''}{of.fault}" if not of.passed else ""
        say(f"{of.tensor:<{width}} {of.error:>8.1e} {of.entry:>8.1e} {of.tolerance:>8.1e}  {of.inputs}{said}")


def _write(found: dict[str, Any], asked: Config, output: str) -> str:
    """Writes the verdict where it belongs, and returns the line that says where."""
    content = (json.dumps(found, indent=2) + "\n").encode()
    if output:
        writing.write_output(output, content)
    folder = Path(asked.run.folder) / asked.run.name
    if not files.exists(folder / "config.toml"):
        return f"\nverdict   {output or f'not written: there is no run {folder} yet'}"
    other = [of.option for of in _differences(folder, asked)]
    if other:
        return f"\nverdict   {output or 'not written'}: {folder} was trained with another {', '.join(other)}"
    writing.write(folder / verdict.NAME, content)
    return f"\nverdict   {folder / verdict.NAME}, and in the run's page: {command('report', folder)}"


def _differences(folder: Path, asked: Config) -> list[settings.Difference]:
    """Returns the options of a step in which the run in this folder differs from the one that was asked for."""
    saved = dataclasses.asdict(settings.read_resumed(folder))
    return [
        found
        for found in settings.differences(saved, asked)
        if found.section in OF_A_STEP or (found.section == "training" and found.key in OF_TRAINING)
    ]


def _conclude(tensors: list[verdict.Tensor]) -> None:
    """Says that all is right. RunError, naming the tensors, where it isn't."""
    wrong = [tensor for tensor in tensors if not tensor.passed]
    if not wrong:
        return say(f"{len(tensors)} of {len(tensors)} are right")
    words = [
        f"{of.tensor} ({of.fault or f'relative error {max(of.error, of.entry):.1e}, {of.tolerance:.1e} allowed'}; "
        f"at {of.inputs})"
        for of in wrong[:NAMED]
    ]
    more = f", and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
    raise RunError(f"{len(wrong)} of {len(tensors)} are WRONG on this device: {'; '.join(words)}{more}")
