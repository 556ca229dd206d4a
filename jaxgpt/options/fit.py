"""`compute.fit`: the size that it names, and the options that it may choose.

An option is free unless somebody has said what it is to be: on the command line, or in the --config file. Of how a step
is split only the command line says so, by --training.micro-batches: a config's numbers are for some card or other, and
the number of a step's sequences, their product, stays in any case. "auto" leaves an option free.
"""

import dataclasses
import math
import re
from collections.abc import Set

from jaxgpt.errors import UserError
from jaxgpt.foreign_text import shown
from jaxgpt.options.config import Config
from jaxgpt.options.settings import changed, option

DEVICE = "device"
SPLIT = "training.micro_batches"
FREE = (SPLIT, "compute.recompute", "compute.classifier_chunk", "parallel.zero", "parallel.moments")
UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}


def size(fit: str) -> int | None:
    """Returns the bytes that `compute.fit` names; None where it names the device's own memory. UserError otherwise."""
    if fit == DEVICE:
        return None
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?([A-Za-z]{2,3})", fit)
    units = {name.lower(): value for name, value in UNITS.items()}
    if not found or found[2].lower() not in units or not float(found[1]):
        raise UserError(f"--compute.fit is {shown(fit)}, and must be {DEVICE}, or a size such as 24GB or 22.5GiB")
    return int(float(found[1]) * units[found[2].lower()])


def check(config: Config) -> None:
    """Raises a UserError for a size that is none, and for options that don't go together with `compute.fit`."""
    compute = config.compute
    for name in compute.fit_keeps:
        if name not in FREE:
            raise UserError(f"--compute.fit-keeps {shown(name)}: fit chooses among {', '.join(FREE)}")
    if not compute.fit:
        return
    size(compute.fit)
    if compute.memory_limit_gib:
        raise UserError("--compute.memory-limit-gib: leave it away, since --compute.fit says how much memory there is")
    if config.objective.name == "policy":
        raise UserError(
            "--compute.fit: leave it away with --objective.name policy, since the plan doesn't know what a reward "
            "model needs"
        )


def keeping(config: Config, typed: Set[str], in_file: Set[str]) -> Config:
    """Returns the configuration with the options that fit is to leave alone.

    Args:
        config: The configuration.
        typed: Options on the command line, as "section.key".
        in_file: Options in the --config file.
    """
    if not config.compute.fit:
        return config
    said = (typed | (in_file - {SPLIT})) & set(FREE)
    said = {name for name in said if value(config, name) != "auto"}
    keeps = tuple(name for name in FREE if name in said or name in config.compute.fit_keeps)
    unknown = tuple(name for name in config.compute.fit_keeps if name not in FREE)  # which `check` refuses
    return changed(config, compute={"fit_keeps": keeps + unknown})


def free(config: Config) -> tuple[str, ...]:
    """Returns the options that may be chosen; without `compute.fit` the recompute level alone, where it is "auto"."""
    if config.compute.fit:
        return tuple(name for name in FREE if name not in config.compute.fit_keeps)
    return ("compute.recompute",) if config.compute.recompute == "auto" else ()


def value(config: Config, name: str) -> object:
    """Returns the value of an option named "section.key"."""
    section, _, key = name.partition(".")
    return getattr(getattr(config, section), key)


def words(config: Config, changed: Config) -> str:
    """Returns the command-line options that turn `config` into `changed`."""
    found = []
    for section in ("compute", "parallel", "training"):
        before, after = (dataclasses.asdict(getattr(of, section)) for of in (config, changed))
        found += [f"{option(section, key)} {new}" for key, new in after.items() if new != before[key]]
    return " ".join(found)


def undivided(config: Config) -> tuple[int, str]:
    """Returns the sequences that must divide among the devices, and what they are in words.

    Where fit splits the step itself, these are the step's, in parts that a validation loss is of too.
    """
    training = config.training
    if not config.compute.fit or SPLIT not in free(config):
        return training.batch_size, f"--training.batch-size is {training.batch_size}"
    sequences = training.batch_size * training.micro_batches
    both = math.gcd(sequences, training.batch_size * training.evaluation_batches)
    validated = f", and a validation loss {training.evaluation_batches} batches" if training.evaluation_batches else ""
    return both, f"--training.micro-batches x --training.batch-size is {sequences} sequences{validated}"


def split(config: Config, batch_size: int) -> dict[str, int]:
    """Returns the options of `training` that cut the same step in micro-batches of so many sequences."""
    training = config.training
    return {"batch_size": batch_size, "micro_batches": training.micro_batches * training.batch_size // batch_size}
