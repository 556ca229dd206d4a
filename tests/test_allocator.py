"""The command starts itself again once, with the C library's settings and the same words."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxgpt import allocator

RUN = Path(__file__).parent.parent / "run.py"


@pytest.mark.skipif(sys.platform != "linux", reason="the settings are those of Linux's C library")
def test_a_command_runs_with_the_settings():
    """The words are kept, and -X options too; the restarted process is seen by the variable it prints."""
    code = (
        "import os, sys; from jaxgpt import allocator; allocator.restart_with_settings();"
        "print(os.environ['GLIBC_TUNABLES'], sys.argv[1:], sys.flags.dev_mode, sep='|')"
    )
    environment = {name: value for name, value in os.environ.items() if name != allocator.VARIABLE}
    command = [sys.executable, "-X", "dev", "-W", "ignore", "-c", code, "a b", "--c"]
    output = subprocess.run(command, env=environment, cwd=RUN.parent, check=True, capture_output=True, text=True).stdout
    variable, words, dev_mode = output.strip().split("|")
    assert "glibc.malloc.mmap_max=0" in variable
    assert words == "['a b', '--c']"
    assert dev_mode == "True"


def test_settings_of_the_user_are_left_alone(monkeypatch):
    monkeypatch.setenv(allocator.VARIABLE, "glibc.malloc.check=1")
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("started again"))
    allocator.restart_with_settings()
    assert os.environ[allocator.VARIABLE] == "glibc.malloc.check=1"
