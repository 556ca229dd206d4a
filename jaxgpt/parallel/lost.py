"""What is done where JAX finds that the processes have lost each other: a message, and a status of ours.

JAX would abort the process there, with a trace of its C++ code. It takes a function to be called instead, but up to
0.12 it can't hand Python the reason: that is a C++ exception which nobody catches, for which the C++ library aborts the
process as well. So that one exception is caught where all that nobody catches arrive.
"""

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator

from jaxlib import _jax  # type: ignore[reportAttributeAccessIssue]

_kept = []  # what C++ has pointers to


@contextlib.contextmanager
def instead_of_abort(function: Callable[[], None]) -> Iterator[None]:
    """Clients of JAX's service that are made inside call this function, which ends the process, in a thread of theirs.

    Where the C++ library is another one than GCC's, JAX does as it always does.
    """
    if not _catch_bad_cast(function):
        yield
        return
    make = _jax.get_distributed_runtime_client
    _jax.get_distributed_runtime_client = functools.partial(make, missed_heartbeat_callback=lambda *_: function())
    try:
        yield
    finally:
        _jax.get_distributed_runtime_client = make


def _catch_bad_cast(function: Callable[[], None]) -> bool:
    try:
        library = ctypes.CDLL("libstdc++.so.6")
        set_terminate, current = library._ZSt13set_terminatePFvvE, library.__cxa_current_exception_type
    except (OSError, AttributeError):
        return False
    handler_type = ctypes.CFUNCTYPE(None)
    set_terminate.argtypes, set_terminate.restype = [handler_type], ctypes.c_void_p
    current.restype = ctypes.POINTER(ctypes.c_void_p)
    before = []

    @handler_type
    def terminate() -> None:
        thrown = current()
        # A std::type_info: a pointer to its table of functions, and one to its name.
        if thrown and ctypes.string_at(thrown[1] or 0) == b"St8bad_cast":
            function()
        handler_type(before[0])()

    before.append(set_terminate(terminate))
    _kept.append(terminate)
    return True
