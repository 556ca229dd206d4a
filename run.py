"""The command line's entry: `python run.py --help` tells the rest."""

import importlib.util
import shlex
import sys
from pathlib import Path

NEEDED = ("jax", "numpy", "tyro")


def without_packages() -> str:
    """Returns what to type if this Python is too old, or lacks the packages that are needed; else ""."""
    here, words = Path(sys.argv[0]).parent, shlex.join(sys.argv[1:])
    own = here / ".venv" / "bin" / "python"
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if sys.version_info >= (3, 11) and not missing:
        return ""
    why = f"has no {' and no '.join(missing)}" if missing else "is older than 3.11"
    then = f"{shlex.quote(str(own))} {shlex.quote(sys.argv[0])} {words}".strip()
    usable = own.exists() and own.absolute() != Path(sys.executable).absolute()
    made = "" if usable else f"make -C {shlex.quote(str(here))} env && "
    return f"error: this Python ({sys.executable}) {why}. Type: {made}{then}"


if __name__ == "__main__":
    if message := without_packages():
        print(message, file=sys.stderr)
        sys.exit(2)
    from jaxgpt import environment, terminal

    environment.restart_with_allocator()
    with terminal.ending_at_once():
        from jaxgpt.commands.cli import main

    sys.exit(main())
