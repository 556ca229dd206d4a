"""Folders of the package's own files on a user's machine."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Returns the folder of downloads and compiled programs: jaxgpt/ in $XDG_CACHE_HOME, by default in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "jaxgpt"
