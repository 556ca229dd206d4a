"""Memory from the C library that stays with the process.

On a CPU, XLA asks the C library anew for the temporary memory of each step. glibc by default gets such large pieces
from the kernel and gives them back, and then each first touch of a page is a page fault: a third of a small model's
step.
With these settings it keeps what it has freed, and takes huge pages where it can (`man mallopt`, `GLIBC_TUNABLES`).
glibc reads them only when a process starts.
"""

import os
import sys

VARIABLE = "GLIBC_TUNABLES"
SETTINGS = {
    "glibc.malloc.hugetlb": 1,  # transparent huge pages
    "glibc.malloc.mmap_max": 0,  # no piece of its own for a large request
    "glibc.malloc.trim_threshold": 1 << 40,  # bytes that may lie free before they go back to the kernel
    "glibc.malloc.top_pad": 1 << 26,
}


def restart_with_settings() -> None:
    """Starts the same command again with the settings, on Linux; does nothing elsewhere, or where some are set."""
    if sys.platform != "linux" or VARIABLE in os.environ:
        return
    os.environ[VARIABLE] = ":".join(f"{name}={value}" for name, value in SETTINGS.items())
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
