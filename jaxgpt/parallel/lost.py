"""Replaces JAX's abort, where the processes have lost each other, by a message and an exit status of our own.

JAX would abort the process there, with a trace of its C++ code. It takes a callback instead, but up to 0.12 it fails to
hand Python the reason: it throws a C++ exception that nobody catches, for which the C++ library aborts the process as
well. So this one exception is caught in the C++ library's terminate handler, where all uncaught ones arrive.
"""

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator

from jaxlib import _jax  # type: ignore[reportAttributeAccessIssue]

_kept = []  # keeps alive what C++ has pointers to


@contextlib.contextmanager
def instead_of_abort(function: Callable[[], None]) -> Iterator[None]:
    """Has clients of JAX's service that are made inside call a function where they would abort the process.

    Args:
        function: Ends the process. It is called in a thread of the client's. It is not used where the C++ library is
            another one than GCC's (libstdc++): there JAX aborts as ever.
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
    """Has an uncaught std::bad_cast call a function before the process aborts. Returns False without libstdc++."""
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
