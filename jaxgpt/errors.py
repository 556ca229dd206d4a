"""Errors that end a command, each with its exit status, and the words for errors of others.

Each carries one message for the user: what is wrong, where (file, option, byte offset), and what to do. `cli.main`
prints the message without a traceback and exits with the status.
"""

import contextlib
import errno
from collections.abc import Iterator

from jaxgpt.foreign_text import shown

# How a lack of memory shows: under a limit of the shell's (`ulimit -v`) Python raises a MemoryError, XLA reports
# RESOURCE_EXHAUSTED or std::bad_alloc, the loader of libraries raises an ImportError, the start of a thread a
# RuntimeError.
OUT_OF_MEMORY = (
    "RESOURCE_EXHAUSTED",
    "bad_alloc",
    "can't start new thread",
    "Cannot allocate memory",
    "failed to map segment from shared object",
)


class JaxgptError(Exception):
    """An error that is reported by its message alone."""

    status = 1


class UserError(JaxgptError):
    """A mistake of the user's: a bad option, a missing or damaged file. Exit status 2."""

    status = 2


class RunError(JaxgptError):
    """A run that failed on its own: NaN in the loss, a full disk. Exit status 1."""


class AllFailed(RunError):
    """A RunError that all processes of a run raise at the same step, so that none need tell the others."""


class Interrupted(JaxgptError):
    """A stop by Ctrl-C. Exit status 130, the shells' convention."""

    status = 130


class Terminated(Interrupted):
    """A stop by SIGTERM, or before the end of a Slurm allocation. Exit status 143, the shells' convention."""

    status = 143


class HungUp(Terminated):
    """A stop by SIGHUP, as when the terminal is closed. Exit status 129, the shells' convention."""

    status = 129


def one_line(error: BaseException) -> str:
    """Returns an error's first line, without orbax's pointer to more; the name of its type where it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].partition(" See full")[0]


def reason(error: BaseException) -> str:
    """Returns the system's words for an error, without a file's name, or else its first line."""
    return getattr(error, "strerror", None) or one_line(error)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Returns whether an error, or one in its chain of causes, reports that memory was refused."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
            return True
        if any(word in str(error) for word in OUT_OF_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def out_of_memory_told() -> Iterator[None]:
    """Raises a RunError in the place of any error in the block by which memory was refused."""
    try:
        yield
    except JaxgptError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        lines = [line for line in str(error).splitlines() if any(word in line for word in OUT_OF_MEMORY)]
        why = shown(lines[0].strip() if lines else str(error) or type(error).__name__)
        raise RunError(
            f"there is not enough memory ({why}). A smaller model, --training.batch-size or "
            "--training.sequence-length needs less; so may a limit be raised (ulimit -v, a container's, a job's)"
        ) from None
