"""Options in files: reading, writing, and in what two configurations differ. `checks.py` checks them.

`configs/NAME.toml` holds what differs from the defaults in `config.py`; options on the command line override both.
"""

import dataclasses
import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

import tomli_w

from jaxgpt import __version__, files
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import quoted, shown
from jaxgpt.options import command_line
from jaxgpt.options.command_line import meant, nearest, types_of
from jaxgpt.options.config import Config, Model

_PACKAGE = Path(__file__).resolve().parents[1]
CONFIGS = next((path for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if path.is_dir()), Path("configs"))
VERSIONS = "versions"  # the table that a run's own config.toml adds; read back, it is passed over
PACKAGES = ("jax", "jaxlib", "numpy", "orbax-checkpoint", "tiktoken")
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
    own = {"folder": str(run.parent), "name": run.name, "resume": "always", "overwrite": False}
    return changed(
        config,
        run=own | {"trackers": "", "compilation_cache": ""},
        parallel={"processes": 0, "process": -1, "coordinator": ""},
        objective={"reward": "" if config.objective.rewarded_by_a_program else config.objective.reward},
    )


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


def changed(config: Config, **sections: Any) -> Config:
    """Returns the configuration with some options of some sections changed, or with other sections.

    `changed(config, model=other, compute={"layers": "scanned"})` takes another model, and one other option.
    """
    parts = {
        name: dataclasses.replace(getattr(config, name), **new) if isinstance(new, dict) else new
        for name, new in sections.items()
    }
    return dataclasses.replace(config, **parts)


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


def versions() -> dict[str, str]:
    """Returns the versions of this package, of Python, and of the packages that numbers depend on."""
    own = {"jaxgpt": __version__, "python": platform.python_version()}
    return own | {name: importlib.metadata.version(name) for name in PACKAGES}


def write(config: Config, path: Path) -> None:
    """Writes everything needed to repeat the run: all options, and the versions of what it ran on."""
    path.write_text(tomli_w.dumps(dataclasses.asdict(config) | {VERSIONS: versions()}), encoding="utf-8")
