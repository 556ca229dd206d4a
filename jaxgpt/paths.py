"""Where the package keeps files of its own on a user's machine."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Returns where downloads and compiled programs are kept: jaxgpt/ in $XDG_CACHE_HOME, by default in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "jaxgpt"
