"""Compiled programs on the disk: kept, taken, and done without."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxgpt import cli, compilation_cache

ROOT = Path(cli.__file__).resolve().parent.parent
OPTIONS = ["jax_compilation_cache_dir", "jax_enable_compilation_cache", "jax_compilation_cache_max_size"]
OPTIONS += ["jax_persistent_cache_min_compile_time_secs", "jax_persistent_cache_min_entry_size_bytes"]

COMPILE = """
import logging, sys
import jax
from jaxgpt import compilation_cache
logging.basicConfig(level=logging.DEBUG)
compilation_cache.SHORTEST_SECONDS = 0.0
compilation_cache.use(sys.argv[1])
jax.jit(lambda x: x * 2 + 1)(3.0).block_until_ready()
print("hit" if "cache hit for 'jit__lambda'" in open(sys.argv[2]).read() else "compiled")
"""


@pytest.fixture
def enabled():
    """As a user's process starts; afterwards as the tests' was."""
    before = {name: jax.config.values[name] for name in OPTIONS}
    jax.config.update("jax_enable_compilation_cache", True)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def user(tmp_path, monkeypatch):
    """The user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "jaxgpt" / "compiled"


def start(choice: str, tmp_path: Path) -> tuple[str, str]:
    """What a process that compiles one program says, on stdout and on stderr."""
    environment = {key: value for key, value in os.environ.items() if key != "JAX_ENABLE_COMPILATION_CACHE"}
    with (tmp_path / "log").open("w") as log:
        done = subprocess.run(
            [sys.executable, "-c", COMPILE, choice, str(tmp_path / "log")],
            env=environment | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            check=True,
        )
    return done.stdout.strip(), (tmp_path / "log").read_text()


def test_the_second_start_takes_what_the_first_compiled(user, tmp_path):
    """And says nothing of it: no warning, no error."""
    assert start("", tmp_path)[0] == "compiled"
    assert list(user.glob("jit__lambda*-cache"))
    assert user.stat().st_mode & 0o077 == 0  # nobody else's: what is in it is run
    said, log = start("", tmp_path)
    assert said == "hit"
    assert not [line for line in log.splitlines() if line.startswith(("WARNING", "ERROR", "E0", "W0"))]


def test_another_folder(enabled, user, tmp_path):
    compilation_cache.use(str(tmp_path / "mine"))
    assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "mine")
    assert (tmp_path / "mine").is_dir()
    assert not user.exists()


def test_off(enabled, user):
    compilation_cache.use("off")
    assert not jax.config.values["jax_enable_compilation_cache"]
    assert not user.exists()


def test_what_jaxs_own_variables_choose_holds(enabled, user, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "chosen"))
    compilation_cache.use("")
    assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "chosen")
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.use("")
    assert jax.config.values["jax_compilation_cache_dir"] is None
    assert not user.exists()


@pytest.mark.parametrize("folder", ["file/below", "a\0b", "/proc/compiled"])
def test_a_folder_that_cannot_be_written_is_said_once(enabled, tmp_path, capsys, monkeypatch, folder):
    """And stops nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    compilation_cache.use(folder)
    assert not jax.config.values["jax_enable_compilation_cache"]
    (line,) = capsys.readouterr().err.splitlines()
    assert "compiled programs can't be kept there" in line
    assert "--run.compilation-cache" in line
