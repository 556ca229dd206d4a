"""Standard input, output and error: what the commands print, and what was typed.

They may be open, closed, full, or have a reader that has left. Anything from outside that is printed is shown as text,
and never obeyed by the terminal.
"""

import contextlib
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from typing import IO, Any, NoReturn

from jaxgpt.errors import Interrupted, UserError
from jaxgpt.foreign_text import printable, shown

INTERRUPTED = "stopped with Ctrl-C"


def prepare() -> None:
    """Makes the three of them usable, whatever they are.

    The null device is opened for those that are closed, as `>&-` leaves them. Else the next file that is opened gets
    their number, and what a library prints goes into that file. What an encoding can't express is no reason to fail.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, _null(number, "w" if number else "r"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace" if number else "surrogateescape")


def say(text: object = "", *, error: bool = False, end: str = "\n", flush: bool = False) -> None:
    """Prints a text, with control characters written out, to stdout or where `error` says so to stderr.

    File names, fields of files, tokens and drawn text are others' words, so the package prints by this function alone,
    or by rich's Console with `printable` and without markup. An error that can't be printed is no further error.
    """
    if not error:
        print(printable(str(text)), end=end, flush=flush)
        return
    try:
        print(printable(str(text)), file=sys.stderr, end=end, flush=True)
    except (OSError, ValueError):  # ValueError: it was closed since
        discard(sys.stderr)


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """Has Ctrl-C end the process while it imports what takes a second.

    A KeyboardInterrupt that is raised in there may get lost in another package's code, and a run would then go on.
    """

    def end_now(number: int, frame: object) -> None:
        say(f"\n{INTERRUPTED}", error=True)
        end(Interrupted.status)

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, end_now)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def end(status: int) -> NoReturn:
    """Ends the process at once. Threads that still compile could fail in the interpreter's own end."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def check_typed(text: str) -> None:
    """Raises a UserError for a byte that isn't UTF-8, of a command line or a line that was typed.

    Python has such a byte as half a surrogate pair, U+DC80 for 0x80.
    """
    found = re.search("[\ud800-\udfff]", text)
    if found is None:
        return
    if not 0xDC80 <= (code := ord(found[0])) <= 0xDCFF:
        raise UserError(f"{shown(text)}: half a surrogate pair, {shown(found[0])}, is no text: take it out")
    bytes_shown = re.sub("[\udc80-\udcff]", lambda byte: f"\\x{ord(byte[0]) - 0xDC00:02x}", text)
    raise UserError(
        f"{shown(bytes_shown)}: its byte 0x{code - 0xDC00:02x} isn't UTF-8. Write it as UTF-8, or rename the file that "
        "it names"
    )


def discard(stream: IO[Any]) -> None:
    """Sends what a stream has not yet written to the null device, where the interpreter's end can't fail at it."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def _null(number: int, mode: str) -> IO[Any]:
    """Opens the null device as the file of this number, unless another file has got that."""
    try:
        os.fstat(number)
    except OSError:
        opened = os.open(os.devnull, os.O_RDWR)
        if opened != number:
            os.dup2(opened, number)
            os.close(opened)
        os.set_inheritable(number, True)
        return open(number, mode, encoding="utf-8", closefd=False)
    return open(os.devnull, mode, encoding="utf-8")
