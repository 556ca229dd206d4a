"""Out-of-memory errors of Python, XLA and the system, reported by one message.

Under a limit of the shell's (`ulimit -v`) Python raises a MemoryError, XLA reports RESOURCE_EXHAUSTED or
std::bad_alloc, the loader of libraries raises an ImportError, and the start of a thread a RuntimeError.
"""

import contextlib
import errno
from collections.abc import Iterator

from jaxgpt.errors import JaxgptError, RunError
from jaxgpt.foreign_text import shown

WORDS = (
    "RESOURCE_EXHAUSTED",
    "bad_alloc",
    "can't start new thread",
    "Cannot allocate memory",
    "failed to map segment from shared object",
)
# Bytes. With less, JAX can't compile, and its threads, whose errors nobody can catch, abort the process.
LEAST_ADDRESS_SPACE = 2 * 10**9


def is_cause(error: BaseException | None) -> bool:
    """Returns whether an error, or one in its chain of causes, reports that memory was refused."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
            return True
        if any(word in str(error) for word in WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Raises a RunError in the place of any error in the block by which memory was refused."""
    try:
        yield
    except JaxgptError:
        raise
    except Exception as error:
        if not is_cause(error):
            raise
        lines = [line for line in str(error).splitlines() if any(word in line for word in WORDS)]
        reason = shown(lines[0].strip() if lines else str(error) or type(error).__name__)
        raise RunError(
            f"there is not enough memory ({reason}). A smaller model, --training.batch-size or "
            "--training.sequence-length needs less; so may a limit be raised (ulimit -v, a container's, a job's)"
        ) from None


def check_limit() -> None:
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
