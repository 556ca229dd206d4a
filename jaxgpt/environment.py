"""Whole numbers in environment variables, which a scheduler or the user sets."""

import contextlib
import os
import traceback
from collections.abc import Iterator

from jaxgpt.errors import UserError
from jaxgpt.foreign_text import quoted, shown

BACKENDS = ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES")  # variables that say what JAX starts
LARGEST = 2**53  # up to here, every whole number has an exact float; seconds since 1970 are far below


def number(name: str) -> int | None:
    """Returns a variable's whole number from 0 to `LARGEST`; None where it isn't set or is something else."""
    text = os.environ.get(name, "").strip()
    if not (text.isascii() and text.isdecimal() and len(text) <= len(str(LARGEST))):
        return None
    return value if (value := int(text)) <= LARGEST else None


def needed(name: str, otherwise: int | None = None) -> int:
    """Returns a variable's whole number from 0 to `LARGEST`, or `otherwise` where the variable isn't set.

    Raises:
        UserError: The variable is something else, or it isn't set and there is no `otherwise`.
    """
    if name not in os.environ and otherwise is not None:
        return otherwise
    value = number(name)
    if value is None:
        is_set = f"is {quoted(os.environ[name])}" if name in os.environ else "isn't set"
        raise UserError(f"the environment variable {name} {is_set}, and must be a whole number from 0 to {LARGEST}")
    return value


def check() -> None:
    """Raises a UserError where JAX refuses the value of one of its environment variables, as it does on import."""
    if not any(name.startswith("JAX_") for name in os.environ):
        return  # so that JAX is not imported for a --help
    try:
        import jax  # noqa: F401
    except ValueError as error:
        raise UserError(f"an environment variable of JAX's is not as JAX wants it: {shown(error)}") from None


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Inside, an error of a backend that JAX's variables ask for and that JAX can't start becomes a UserError."""
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        asked = {name: os.environ[name] for name in BACKENDS if os.environ.get(name)}
        frames = traceback.extract_tb(error.__traceback__)
        if not asked or not any(frame.filename.endswith("xla_bridge.py") for frame in frames):
            raise
        reason = f" ({shown(error)})" if str(error) else ""
        values = " and ".join(f"{name} is {quoted(value)}" for name, value in asked.items())
        raise UserError(
            f"the environment variable {values}, and JAX can't start that here{reason}. Leave it away, or name "
            "a platform that is installed, such as cpu, and one device or more"
        ) from None
