"""Compiled programs kept on the disk, so that a second start needs no compiler.

They are kept in compiled/ of the user's cache folder, by what they were compiled from and for: another option, another
version of JAX or another device has programs of its own. Whoever can write to the folder can have code run: it is the
user's own. The least recently used are deleted when all take more than LARGEST_BYTES.
"""

import os
import sys
import tempfile
from pathlib import Path

import jax

from jaxgpt.data import texts

OFF = "off"
LARGEST_BYTES = 4 * 2**30
SHORTEST_SECONDS = 0.1  # a program that was compiled faster isn't kept: there are many of those


def use(choice: str) -> None:
    """To be called before anything is compiled; `choice` is `run.compilation_cache`.

    A folder that can't be written is no reason to stop: it is said on stderr, and programs are compiled anew. Where the
    option chooses nothing, JAX's own variables hold (JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE).
    """
    if choice == OFF:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if not choice and (
        jax.config.values["jax_compilation_cache_dir"] or not jax.config.values["jax_enable_compilation_cache"]
    ):
        return
    folder = Path(choice) if choice else texts.cache_folder() / "compiled"
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        reason = getattr(error, "strerror", None) or error
        print(
            f"{folder}: compiled programs can't be kept there ({reason}), so each start compiles them anew; "
            "--run.compilation-cache takes another folder",
            file=sys.stderr,
        )
        jax.config.update("jax_enable_compilation_cache", False)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    jax.config.update("jax_compilation_cache_max_size", LARGEST_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST_SECONDS)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
