"""Options in files and on the command line: reading, checking, writing.

`configs/NAME.toml` holds what differs from the defaults in `config.py`; options on the command line override both.
"""

import dataclasses
import importlib.metadata
import math
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

import tomli_w

from jaxgpt import __version__, files
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import quoted, shown
from jaxgpt.options import command_line, products
from jaxgpt.options.command_line import meant, nearest, types_of
from jaxgpt.options.config import IN_DATA, SPIKE_WINDOW, Config, Lora, Model, Objective, Parallel, Sampling

_PACKAGE = Path(__file__).resolve().parents[1]
CONFIGS = next((path for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if path.is_dir()), Path("configs"))
VERSIONS = "versions"  # the table that a run's own config.toml adds; read back, it is passed over
PACKAGES = ("jax", "jaxlib", "numpy", "orbax-checkpoint", "tiktoken")
MOST_PROCESSES = 1 << 16
MOST_RANK = 1 << 16
LARGEST = 2**31 - 1  # steps, seeds and sizes become int32 on the device
# Options that a command takes from the config.toml of a run that it reads: what the model is, how it is computed, and
# what it was trained on. Folders, trackers and processes are for the reader's own command line to name.
OF_A_TRAINED_MODEL: dict[str, set[str] | None] = {
    "model": None,  # all of it
    "compute": None,
    "data": None,
    "training": {"sequence_length"},
}


def config_names() -> list[str]:
    return sorted(path.stem for path in CONFIGS.glob("*.toml"))


def find_config(name: str) -> Path:
    """Returns the path of `configs/NAME.toml`, or of the TOML file of that name. UserError if there is none."""
    path = Path(name) if name.endswith(".toml") else CONFIGS / f"{name}.toml"
    if path.is_file():
        return path
    names = config_names()
    if name.endswith(".toml"):
        near = nearest(path.stem, names).replace("you mean ", "you mean --config ")
        raise UserError(f"--config {name}: there is no such file{near}")
    is_run = (Path(name) / "config.toml").is_file()
    near = f"; did you mean {name.rstrip('/')}/config.toml?" if is_run else nearest(name, names)
    raise UserError(
        f"--config {name}: there is no such config{near} "
        f"There are: {', '.join(names)}; or give the path of a .toml file"
    )


def read(path: Path) -> Config:
    """Returns the configuration in a TOML file. UserError for a table, a key or a value that doesn't belong there."""
    return _config(path, files.read_toml(path))


def read_defaults(path: Path) -> Config:
    """Returns the configuration in a file that the user names by --config.

    UserError as `read` raises it, and for a folder of compiled programs: these are run, and the file may be another's,
    so only the command line names it.
    """
    config = read(path)
    if config.run.compilation_cache not in ("", "off"):
        raise UserError(
            f"{shown(path)}: compilation_cache in [run] is taken from the command line alone, since programs are run "
            "from there: remove the line, and give --run.compilation-cache"
        )
    return config


def read_trained(run: Path) -> Config:
    """Returns what a run's config.toml says of its model and its text; all its other options are the defaults.

    The run may be someone else's, so nothing in it may name a folder to write to or to load programs from, a tracker,
    a process or a file to begin from. UserError as `read` raises it.
    """
    path = run / "config.toml"
    tables = {}
    for name, table in files.read_toml(path, within=run).items():
        kept = OF_A_TRAINED_MODEL.get(name, set())
        if kept and isinstance(table, dict):
            table = {key: value for key, value in table.items() if key in kept}
        if kept is None or kept:
            tables[name] = table
    return _config(path, tables)


def read_resumed(run: Path) -> Config:
    """Returns a run's own configuration to go on with it.

    The run may be someone else's, so what its config.toml says of programs, addresses and trackers is passed over: the
    command line alone names them. UserError as `read` raises it, and where there is no run.
    """
    path = run / "config.toml"
    if not files.exists(path):
        raise UserError(
            f"--resume {shown(run)}: not a run's folder (it has no config.toml){command_line.runs_near(run)}"
        )
    config = _config(path, files.read_toml(path, within=run))
    named = {"folder": str(run.parent), "name": run.name, "resume": "always"}
    own = dataclasses.replace(config.run, **named, overwrite=False, trackers="", compilation_cache="")
    parallel = dataclasses.replace(config.parallel, processes=0, process=-1, coordinator="")
    reward = "" if config.objective.rewarded_by_a_program else config.objective.reward
    objective = dataclasses.replace(config.objective, reward=reward)
    return dataclasses.replace(config, run=own, parallel=parallel, objective=objective)


def _config(path: Path, tables: dict[str, Any]) -> Config:
    sections = {field.name: field.default_factory for field in dataclasses.fields(Config)}
    parts = {}
    for name, table in tables.items():
        if name == VERSIONS:
            continue
        if name not in sections or not isinstance(table, dict):
            raise UserError(f"{shown(path)}: unknown table [{shown(name)}]{nearest(name, sections)}")
        parts[name] = section(shown(path), name, sections[name], table)
    return Config(**parts)


def keys(path: Path) -> set[str]:
    """Returns the options that a TOML file names, as "section.key"."""
    return {f"{name}.{key}" for name, table in files.read_toml(path).items() for key in table}


def section(where: str, name: str, kind: Any, table: dict[str, Any]) -> Any:
    """Returns the options of one table. UserError for a key or a value that doesn't belong there."""
    types = types_of(kind)
    values = {}
    for key, value in table.items():
        if key not in types:
            raise UserError(f"{where}: unknown key {shown(key)} in [{name}]{_meant(name, key)}")
        values[key] = _value(f"{where}: {key} in [{name}]", types[key], value)
    return kind(**values)


def _meant(section: str, key: str) -> str:
    """Returns '; did you mean X?' or '; did you mean X in [SECTION]?' where there is such a key, and otherwise '.'"""
    known = [f"{name}.{other}" for name, kind in types_of(Config).items() for other in types_of(kind)]
    found = meant(f"{section}.{key}", [name.replace("_", "-") for name in known])
    if not found:
        return "."
    where, _, known_key = found[0].replace("-", "_").partition(".")
    return f"; did you mean {known_key}{'' if where == section else f' in [{where}]'}?"


def _value(where: str, expected: Any, value: Any) -> Any:
    if get_origin(expected) is tuple:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise UserError(f"{where} is {quoted(value)}, and must be a list of strings")
        return tuple(value)
    if get_origin(expected) is not None:  # Literal
        choices = get_args(expected)
        if value not in choices or type(value) is not type(choices[0]):  # true is 1 to `in`
            raise UserError(f"{where} is {quoted(value)}, and must be one of {', '.join(map(str, choices))}")
        return value
    if expected is float and type(value) is int:
        return float(value)
    if type(value) is not expected:
        raise UserError(f"{where} is {quoted(value)}, and must be of type {expected.__name__}")
    return value


def option(section: str, key: str) -> str:
    """Returns the name of an option on the command line; `section` is empty for the options of a command's own."""
    return f"--{section}.{key}".replace("--.", "--").replace("_", "-")


class Difference(NamedTuple):
    """An option of which two configurations have different values."""

    section: str
    key: str
    saved: Any
    asked: Any

    @property
    def option(self) -> str:
        """Returns the option's name on the command line."""
        return option(self.section, self.key)


def differences(saved: Mapping[str, Mapping[str, Any]], asked: Config) -> list[Difference]:
    """Returns every option in which a saved configuration, as JSON has it, differs from the one that is asked for.

    An option, or a whole section, that did not exist when it was saved had its default. An option that exists no more
    is ignored. A tuple is the list that it becomes in a file.
    """
    found = []
    for section, options in dataclasses.asdict(asked).items():
        defaults = dataclasses.asdict(type(getattr(asked, section))())
        for key, value in options.items():
            old = saved.get(section, {}).get(key, defaults[key])
            if (list(old) if isinstance(old, tuple) else old) != (list(value) if isinstance(value, tuple) else value):
                found.append(Difference(section, key, old, value))
    return found


def model_differences(saved: Mapping[str, Any], asked: Model) -> list[Difference]:
    """Returns the `differences` of two models."""
    return differences({"model": saved}, Config(model=asked))


def check(config: Config) -> None:
    """Raises a UserError, naming the option, for a value that no run could use."""
    check_model(config.model)
    positive = {
        "compute": ("classifier_chunk", "attention_block", "fp8_history"),
        "training": ("steps", "batch_size", "micro_batches", "stop_after_nonfinite"),
        "rollouts": ("answers", "tokens", "minibatches", "epochs"),
        "evaluation": ("batch_size",),
        "optimizer": ("learning_rate", "epsilon"),
        "checkpoint": ("keep_last",),
    }
    not_negative = {
        "parallel": ("devices", "processes"),
        "compute": ("memory_limit_gib", "fp8_error_every"),
        "data": ("skip_bad",),
        "training": ("sequence_length", "seed", "evaluate_every", "evaluation_batches", "patience"),
        "evaluation": ("every", "limit"),
        "optimizer": ("muon_learning_rate", "warmup_steps", "final_fraction", "weight_decay", "clip_norm"),
        "checkpoint": ("every_steps", "every_minutes", "keep_every", "stop_minutes_before_end"),
        "run": ("sample_every",),
    }
    for sections in (positive, not_negative):
        for section, keys in sections.items():
            for key in keys:
                check_number(getattr(getattr(config, section), key), section, key, positive=sections is positive)
    context, largest, run = config.model.context, math.sqrt(SPIKE_WINDOW - 1), config.run
    of_length = f"at most the model's context, {context} (--model.context)"
    of_spikes = f"at least 0, and below {largest:.2f} to skip any step"
    for section, keys, holds, needed in (
        ("training", ("sequence_length",), lambda tokens: tokens <= context, of_length),
        ("data", ("validation_fraction",), lambda share: 0 < share < 1, "between 0 and 1"),
        ("optimizer", ("beta1", "beta2", "momentum"), lambda decay: 0 <= decay < 1, "at least 0 and below 1"),
        ("training", ("loss_spike_z", "grad_norm_spike_z"), lambda z: 0 <= z < largest, of_spikes),
        ("optimizer", ("final_fraction",), lambda share: share <= 1, "at most 1"),
    ):
        for key in keys:
            value = getattr(getattr(config, section), key)
            _require(holds(value), section, key, value, needed)
    check_sampling(config.sampling, "sampling")
    check_lora(config.lora)
    check_objective(config.objective)
    needed = "adamw where adapters are trained, which are factors of a matrix (--lora.rank)"
    _require(config.optimizer.name == "adamw" or not config.lora.rank, "optimizer", "name", "muon", needed)
    needed = "empty for a reward model, which draws and scores no text (--objective.name)"
    tasks = config.evaluation.tasks
    _require(not (tasks and config.objective.name == "reward"), "evaluation", "tasks", tasks, needed)
    needed = "given, since adapters are trained beside weights that there are (--lora.rank)"
    _require(bool(config.training.init_from) or not config.lora.rank, "training", "init_from", "empty", needed)
    check_processes(config.parallel)
    products.check(config)
    needed = "left away with --resume, or else the run would be lost before it is resumed"
    _require(not (run.overwrite and run.resume == "always"), "run", "overwrite", True, needed)


def check_model(model: Model) -> None:
    """Raises a UserError, naming the option, for a shape that no model has."""
    for key in ("layers", "heads", "width", "context"):
        check_number(getattr(model, key), "model", key, positive=True)
    check_number(model.vocabulary_size, "model", "vocabulary_size")
    if not model.head_width:
        needed = f"divisible by the number of heads, {model.heads} (--model.heads)"
        _require(model.width % model.heads == 0, "model", "width", model.width, needed)
    for key in ("kv_heads", "head_width", "feed_forward", "window", "logit_soft_cap", "experts", "router_balance"):
        check_number(getattr(model, key), "model", key)
    for key in ("norm_epsilon", "rope_base", "rope_factor", "rope_low_frequency", "rope_original_context"):
        check_number(getattr(model, key), "model", key, positive=True)
    check_number(model.experts_per_token, "model", "experts_per_token", positive=True)
    check_number(model.router_z, "model", "router_z")
    _require(0 <= model.dropout < 1, "model", "dropout", model.dropout, "at least 0 and below 1")
    needed = f"a divisor of the number of heads, {model.heads} (--model.heads)"
    _require(model.heads % model.key_value_heads == 0, "model", "kv_heads", model.kv_heads, needed)
    low, needed = model.rope_low_frequency, f"above --model.rope-low-frequency, {model.rope_low_frequency}"
    _require(
        low < model.rope_high_frequency < math.inf, "model", "rope_high_frequency", model.rope_high_frequency, needed
    )
    start, needed = model.document_start, f"a token, -1 for none or -2 for where the data say, and at most {LARGEST}"
    _require(IN_DATA <= start <= LARGEST, "model", "document_start", start, needed)


def check_objective(objective: Objective) -> None:
    """Raises a UserError, naming the option, for a value that no objective can have."""
    for key in ("beta", "clip", "program_seconds", "program_memory_mib"):
        check_number(getattr(objective, key), "objective", key, positive=True)
    for key in ("centre", "margin", "clip_above", "value_clip"):
        check_number(getattr(objective, key), "objective", key)
    for key in ("kl_coefficient", "entropy_coefficient", "value_coefficient", "kl_penalty", "kl_target"):
        check_number(getattr(objective, key), "objective", key)
    for key, holds, needed in (
        ("completions", lambda number: number >= 2, "at least 2"),
        ("label_smoothing", lambda share: 0 <= share < 0.5, "at least 0 and below 0.5"),
        ("discount", lambda factor: 0 <= factor <= 1, "at least 0 and at most 1"),
        ("advantage_decay", lambda factor: 0 <= factor <= 1, "at least 0 and at most 1"),
    ):
        value = getattr(objective, key)
        _require(holds(value), "objective", key, value, needed)


def check_lora(lora: Lora) -> None:
    """Raises a UserError, naming the option, for a value that no adapters can have."""
    check_number(lora.rank, "lora", "rank")
    _require(lora.rank <= MOST_RANK, "lora", "rank", lora.rank, f"at most {MOST_RANK}")
    check_number(lora.alpha, "lora", "alpha", positive=True)
    needed = "left away where --lora.base is not int8 or nf4, which alone have scales"
    _require(not lora.double_quantization or lora.base in ("int8", "nf4"), "lora", "double_quantization", True, needed)


def check_processes(parallel: Parallel) -> None:
    """Raises a UserError where a process can't know which one it is, or where the others are."""
    processes, process, coordinator = parallel.processes, parallel.process, parallel.coordinator
    _require(processes <= MOST_PROCESSES, "parallel", "processes", processes, f"at most {MOST_PROCESSES}")
    if processes > 1:
        needed = f"from 0 to {processes - 1}, another in each of the {processes} processes (--parallel.processes)"
        _require(0 <= process < processes, "parallel", "process", process, needed)
    else:
        needed = "left away where --parallel.processes is not given, or 1"
        _require(process == -1, "parallel", "process", process, needed)
    needed = "host:port, such as node1:12345, the same in all processes"
    _require(
        is_address(coordinator) or (not coordinator and processes <= 1),
        "parallel",
        "coordinator",
        coordinator or "empty",
        needed,
    )


def is_address(text: str) -> bool:
    """Returns whether a text is host:port."""
    host, _, port = text.rpartition(":")
    return bool(host) and re.fullmatch("[0-9]{1,5}", port) is not None and 0 < int(port) < 2**16


def check_sampling(sampling: Sampling, section: str) -> None:
    """Raises a UserError, naming the option, for a value that nothing can be drawn with."""
    for key in ("tokens", "temperature", "top_k"):
        check_number(getattr(sampling, key), section, key)
    _require(0 < sampling.top_p <= 1, section, "top_p", sampling.top_p, "above 0 and at most 1")
    _require(0 <= sampling.min_p <= 1, section, "min_p", sampling.min_p, "at least 0 and at most 1")
    check_number(sampling.repetition_penalty, section, "repetition_penalty", positive=True)
    _require(all(sampling.stop), section, "stop", "an empty text", "text of at least one character")


def check_own(options: Any, positive: tuple[str, ...], not_negative: tuple[str, ...]) -> None:
    """Checks numbers among the options of a command's own, as `check_number` does."""
    for key in (*positive, *not_negative):
        check_number(getattr(options, key), "", key, positive=key in positive)


def check_number(value: float, section: str, key: str, *, positive: bool = False) -> None:
    """Raises a UserError, naming the option, for a number that is out of its bounds.

    They are 0 (included unless `positive`) and, for an int, `LARGEST`. NaN and infinity are out of bounds.
    """
    bound = "greater than 0" if positive else "0 or more"
    _require(value > 0 or (value == 0 and not positive), section, key, value, bound)
    _require(math.isfinite(value), section, key, value, "finite")
    _require(isinstance(value, float) or value <= LARGEST, section, key, value, f"at most {LARGEST}")


def _require(holds: bool, section: str, key: str, value: object, requirement: str) -> None:
    if not holds:  # NaN fails every comparison, and so ends here too
        raise UserError(f"{option(section, key)} is {shown(value)}, and must be {requirement}")


def versions() -> dict[str, str]:
    """Returns the versions of this package, of Python, and of the packages that numbers depend on."""
    own = {"jaxgpt": __version__, "python": platform.python_version()}
    return own | {name: importlib.metadata.version(name) for name in PACKAGES}


def write(config: Config, path: Path) -> None:
    """Writes everything needed to repeat the run: all options, and the versions of what it ran on."""
    path.write_text(tomli_w.dumps(dataclasses.asdict(config) | {VERSIONS: versions()}), encoding="utf-8")
