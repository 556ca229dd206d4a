"""Environment of the process: numbers in variables, JAX's variables, limits, the allocator, the user's cache folder."""

import contextlib
import ctypes
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from jaxgpt.errors import RunError, UserError
from jaxgpt.foreign_text import quoted, shown

BACKENDS = ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES")  # variables that say what JAX starts
LARGEST = 2**53  # up to here, every whole number has an exact float; seconds since 1970 are far below
# Bytes. With less, JAX can't compile, and its threads, whose errors nobody can catch, abort the process.
LEAST_ADDRESS_SPACE = 2 * 10**9
ALLOCATOR_VARIABLE = "GLIBC_TUNABLES"
ALLOCATOR_SETTINGS = {
    "glibc.malloc.hugetlb": 1,  # transparent huge pages
    "glibc.malloc.mmap_max": 0,  # no mmap of its own for a large request
    "glibc.malloc.trim_threshold": 1 << 40,  # bytes that may lie free before they go back to the kernel
    "glibc.malloc.top_pad": 1 << 26,
}
# glibc's M_MMAP_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_TOP_PAD: its own defaults, but for a lower threshold.
MALLOPT_GIVING_BACK = {-4: 1 << 16, -3: 1 << 20, -1: 1 << 20, -2: 1 << 17}


def number(name: str) -> int | None:
    """Returns a variable's whole number from 0 to `LARGEST`; None where it isn't set or is something else."""
    text = os.environ.get(name, "").strip()
    if not (text.isascii() and text.isdecimal() and len(text) <= len(str(LARGEST))):
        return None
    return value if (value := int(text)) <= LARGEST else None


def needed(name: str, otherwise: int | None = None) -> int:
    """Returns a variable's whole number from 0 to `LARGEST`, or `otherwise` where the variable isn't set.

    UserError where the variable is something else, or it isn't set and there is no `otherwise`.
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


def cache_folder() -> Path:
    """Returns the folder of downloads and compiled programs: jaxgpt/ in $XDG_CACHE_HOME, by default in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "jaxgpt"


def check_address_space() -> None:
    """Raises a RunError where the shell grants less address space than JAX needs to start."""
    limit = address_space()
    if limit is not None and limit < LEAST_ADDRESS_SPACE:
        raise RunError(
            f"this process may have {limit / 1e9:.2f} GB of address space (ulimit -v {limit // 1024}), and JAX needs "
            f"{LEAST_ADDRESS_SPACE / 1e9:.0f} GB to start: raise the limit, or remove it (ulimit -v unlimited)"
        )


def address_space() -> int | None:
    """Returns the bytes of address space that this process may have; None where nothing limits them."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else limit


def restart_with_allocator() -> None:
    """Restarts the command with the settings of glibc's allocator, on Linux and where GLIBC_TUNABLES isn't set.

    On a CPU, XLA asks the C library anew for the temporary memory of each step. By default glibc gets such large blocks
    from the kernel and gives them back, and then each first touch of a page is a page fault: a third of a small model's
    step time. With these settings glibc keeps what is freed, and uses huge pages where it can (`man mallopt`). glibc
    reads them only when a process starts.
    """
    if sys.platform != "linux" or ALLOCATOR_VARIABLE in os.environ:
        return
    os.environ[ALLOCATOR_VARIABLE] = ":".join(f"{name}={value}" for name, value in ALLOCATOR_SETTINGS.items())
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def give_memory_back() -> None:
    """Has glibc's allocator give large blocks back to the system as soon as they are freed; elsewhere does nothing.

    It undoes what `restart_with_allocator` has asked for, where memory counts more than time: what is freed and kept
    lies in pieces, and a run's process then takes half as much again as its arrays.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in MALLOPT_GIVING_BACK.items():
            mallopt(parameter, value)
