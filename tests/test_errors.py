"""Memory that is refused is said as such, in one line, whoever noticed it."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from jaxgpt import environment, errors
from jaxgpt.commands import cli
from jaxgpt.training import device_memory

ROOT = Path(__file__).resolve().parent.parent
REFUSED = [
    MemoryError(),
    MemoryError("std::bad_alloc"),
    RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes."),
    RuntimeError("can't start new thread"),
    ImportError("libjax_common.so: failed to map segment from shared object"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]


@pytest.mark.parametrize("error", REFUSED, ids=repr)
def test_each_way_is_one_message_with_status_1(error, monkeypatch, capsys):
    def refused(words):
        try:
            raise error
        except Exception as cause:
            raise ValueError("could not read the array") from cause

    monkeypatch.setattr("jaxgpt.commands.report.run", refused)
    assert cli.main(["report"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: there is not enough memory (")


@pytest.mark.parametrize("error", [ValueError("memory"), KeyError("x"), OSError(errno.ENOENT, "No such file")])
def test_other_errors_are_none_of_it(error):
    assert not errors.is_out_of_memory(error)


def test_an_error_that_comes_from_itself_ends_the_search():
    one, other = ValueError("a"), ValueError("b")
    one.__cause__, other.__cause__ = other, one
    assert not errors.is_out_of_memory(one)


@pytest.mark.skipif(sys.platform != "linux", reason="limits as Linux has them")
def test_a_limit_below_what_jax_needs_is_said_before_it_aborts():
    line = f"ulimit -v 1200000; exec '{sys.executable}' '{ROOT / 'run.py'}' --config quickstart"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "1.23 GB of address space (ulimit -v 1200000), and JAX needs 2 GB" in done.stderr


def test_a_limit_of_the_address_space_counts_in_the_memory_plan(monkeypatch):
    free = device_memory._system_left()
    monkeypatch.setattr(environment, "address_space", lambda: 10**15)
    assert len(device_memory._system_left()) == len(free) + 1
    monkeypatch.setattr(environment, "address_space", lambda: 10**6)
    assert min(device_memory._system_left()) == 0


def test_a_system_without_proc_does_not_say(monkeypatch):
    def missing():
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/proc/meminfo")

    monkeypatch.setattr(device_memory.psutil, "virtual_memory", missing)
    monkeypatch.setattr(device_memory, "CGROUPS", Path("/nowhere"))
    assert device_memory._system_left() == []


def test_enough_or_no_limit_is_no_error(monkeypatch):
    for limit in (None, environment.LEAST_ADDRESS_SPACE):
        monkeypatch.setattr(environment, "address_space", lambda limit=limit: limit)
        environment.check_address_space()
    monkeypatch.setattr(environment, "address_space", lambda: environment.LEAST_ADDRESS_SPACE - 1)
    with pytest.raises(errors.RunError, match="ulimit -v unlimited"):
        environment.check_address_space()
