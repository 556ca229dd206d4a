"""Settings of the C library's allocator that keep freed memory in the process.

On a CPU, XLA asks the C library anew for the temporary memory of each step. By default glibc gets such large blocks
from the kernel and gives them back, and then each first touch of a page is a page fault: a third of a small model's
step time. With these settings glibc keeps what is freed, and uses huge pages where it can (`man mallopt`,
`GLIBC_TUNABLES`). glibc reads the settings only when a process starts.
"""

import os
import sys

VARIABLE = "GLIBC_TUNABLES"
SETTINGS = {
    "glibc.malloc.hugetlb": 1,  # transparent huge pages
    "glibc.malloc.mmap_max": 0,  # no mmap of its own for a large request
    "glibc.malloc.trim_threshold": 1 << 40,  # bytes that may lie free before they go back to the kernel
    "glibc.malloc.top_pad": 1 << 26,
}


def restart_with_settings() -> None:
    """Restarts the command with the settings, on Linux; does nothing elsewhere, or where GLIBC_TUNABLES is set."""
    if sys.platform != "linux" or VARIABLE in os.environ:
        return
    os.environ[VARIABLE] = ":".join(f"{name}={value}" for name, value in SETTINGS.items())
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
