"""Runs programs that aren't trusted, such as those that a model wrote: with no network, and within limits.

`sandbox.py` is the process that a program runs in. It can read what the user can, and change nothing but an empty
folder in memory that is gone with it; all that is heard of it is how it ended. Limits bound the memory, the number of
processes and the time, and nothing that it starts outlives it. Where the system doesn't allow such a sandbox (macOS,
Windows, some containers) nothing is run, and `check` says so.
"""

import functools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jaxgpt.errors import UserError
from jaxgpt.foreign_text import shown

SANDBOX = Path(__file__).with_name("sandbox.py")
FAILED = 125  # as the sandbox ends where it can't be set up; a program that ends so has failed too
SET_UP_SECONDS = 20.0  # for the sandbox, beside the program's own time
VARIABLES = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8"}  # of the program
LONGEST_VARIABLE = 100_000  # bytes; the kernel takes 128 KiB


class Limits(NamedTuple):
    seconds: float  # by the clock
    memory: int  # bytes of addresses of each process


def check() -> None:
    """Raises a UserError where this system allows no sandbox."""
    if why := _refusal():
        raise UserError(
            f"--objective.reward program: no program is run here, since the network could not be kept from it ({why})."
            " It takes Linux, and in a container the right to make namespaces: `unshare --user --net true` shows "
            "whether there is. A function (--objective.reward FILE.py:FUNCTION) can ask another machine"
        )


@functools.lru_cache(maxsize=1)
def _refusal() -> str:
    if sys.platform != "linux":
        return f"{sys.platform} has no network namespaces"
    try:
        return "" if succeeds(["/bin/true"], "", Limits(10.0, 1 << 30)) else "not even /bin/true runs"
    except OSError as error:
        return shown(error)


def succeeds(command: Sequence[str], text: str, limits: Limits, variables: dict[str, str] | None = None) -> bool:
    """Returns whether a program ends with status 0 in its time. The text is on its standard input.

    `variables` are added to its environment. OSError where the sandbox can't be set up.
    """
    added = {name: value.replace("\0", "")[:LONGEST_VARIABLE] for name, value in (variables or {}).items()}
    request = json.dumps([[*command], *limits, VARIABLES | added])
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(SANDBOX), request],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=VARIABLES,
        start_new_session=True,
    )
    try:
        _, said = process.communicate(text.encode("utf-8", "replace"), limits.seconds + SET_UP_SECONDS)
    except subprocess.TimeoutExpired:
        return False
    finally:
        process.kill()  # and with it all that it has started
        process.wait()
    if process.returncode == FAILED and said:
        raise OSError(said.decode("utf-8", "replace").strip()[:200])
    return process.returncode == 0
