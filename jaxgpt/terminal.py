"""Standard input, output and error: what the commands print, and what was typed.

A stream may be closed, its disk full, or its reader gone. Text from outside is escaped when it is printed, so that the
terminal never obeys it.
"""

import contextlib
import io
import os
import re
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

from jaxgpt.errors import Interrupted, UserError
from jaxgpt.foreign_text import printable, shown

INTERRUPTED = "stopped with Ctrl-C"


def prepare() -> None:
    """Makes the three streams usable, even those that are closed.

    The null device is opened in the place of closed ones, as `>&-` leaves them. Otherwise the next file that is opened
    would get their number, and what a library prints would go into that file. A character that an encoding can't
    express is escaped rather than raise an error.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, _null(number, "w" if number else "r"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace" if number else "surrogateescape")


def say(text: object = "", *, error: bool = False, flush: bool = False) -> None:
    """Prints a text with control characters escaped, to stdout, or with `error` to stderr.

    File names, fields of files, tokens and drawn text come from others, so the package prints by this function alone,
    or by rich's Console with `printable` and without markup. An error while printing an error is ignored.
    """
    if not error:
        print(printable(str(text)), flush=flush)
        return
    try:
        print(printable(str(text)), file=sys.stderr, flush=True)
    except (OSError, ValueError):  # ValueError: it has been closed
        discard(sys.stderr)


def program() -> str:
    """Returns the beginning of a command as it can be typed here: this Python and run.py, or the installed script."""
    script = Path(sys.argv[0])
    if script.stem == "jaxgpt":
        return "jaxgpt" if shutil.which("jaxgpt") == str(script) else _path(script)
    if script.name != "run.py":  # called from Python
        return "python run.py"
    found = next((name for name in ("python", "python3") if shutil.which(name) == sys.executable), None)
    return f"{found or _path(Path(sys.executable))} {_path(script)}"


def command(*words: object) -> str:
    """Returns a command of ours that can be typed here, each word quoted as a shell wants it."""
    return f"{program()} {shlex.join(map(str, words))}"


def _path(path: Path) -> str:
    """Returns a path for a shell, from the working folder on where it lies in it."""
    path, here = Path(os.path.abspath(path)), Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """Has Ctrl-C end the process while the block imports what takes a second.

    A KeyboardInterrupt that is raised during an import may get lost in another package's code, and the run would go
    on.
    """

    def end_now(number: int, frame: object) -> None:
        say(f"\n{INTERRUPTED}", error=True)
        end(Interrupted.status)

    before = signal.getsignal(signal.SIGINT)
    with contextlib.ExitStack() as restored:
        if before is signal.default_int_handler and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, end_now)
            restored.callback(signal.signal, signal.SIGINT, before)
        yield


def end(status: int) -> NoReturn:
    """Ends the process at once, without the interpreter's cleanup, in which threads that still compile could fail."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def check_typed(text: str) -> None:
    """Raises a UserError for a byte that isn't UTF-8, on a command line or in a line that was typed.

    Python represents such a byte as half of a surrogate pair: 0x80 as U+DC80.
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
    """Redirects a stream to the null device, so that the interpreter's last flush of it can't fail."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def _null(number: int, mode: str) -> IO[Any]:
    """Opens the null device, under this file number unless another file has taken it."""
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
