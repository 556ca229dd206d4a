"""Environment variables, and the restart of a command with the C library's settings and the same words."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxgpt import environment
from jaxgpt.errors import UserError
from jaxgpt.options.config import Parallel
from jaxgpt.parallel import cluster

ROOT = Path(__file__).resolve().parent.parent
NO_NUMBERS = ["", "soon", "-1", "1.5", "9" * 5000, "٣", str(2**53 + 1), "\x1b[31m3"]


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_what_is_no_number(monkeypatch, text):
    monkeypatch.setenv("SOME", text)
    assert environment.number("SOME") is None
    with pytest.raises(UserError, match=r"the environment variable SOME is .*, and must be a whole number"):
        environment.needed("SOME", 3)


def test_a_number_and_none(monkeypatch):
    monkeypatch.setenv("SOME", f" {2**53} ")
    assert environment.number("SOME") == environment.needed("SOME") == 2**53
    monkeypatch.delenv("SOME")
    assert environment.number("SOME") is None
    assert environment.needed("SOME", 3) == 3
    with pytest.raises(UserError, match="SOME isn't set"):
        environment.needed("SOME")


@pytest.mark.parametrize("number", NO_NUMBERS)
@pytest.mark.parametrize("variable", ["SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK"])
def test_a_cluster_that_says_no_number(monkeypatch, variable, number):
    for name in ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", number if name == variable else "1")
    with pytest.raises(UserError, match=f"OMPI_COMM_WORLD_{variable} is"):
        cluster.find(Parallel())


@pytest.mark.parametrize("text", ["9" * 5000, "1(x" + "9" * 5000 + ")", "x", "1(x3"])
def test_numbers_of_nodes_of_any_length(text):
    assert all(count < 10**6 for count in cluster._per_node(text))


def test_jax_refuses_its_own_variables(fails, monkeypatch):
    """JAX reads them at its import, which has happened here already."""

    def refuse(name, *arguments):
        if name == "jax":
            raise ValueError('Invalid value "abc" for JAX flag jax_num_cpu_devices')
        return imported(name, *arguments)

    imported = __import__
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "abc")
    monkeypatch.setattr("builtins.__import__", refuse)
    assert 'Invalid value "abc" for JAX flag jax_num_cpu_devices' in fails("generate", "--run", "x")


PLUGINS = [name for name in ("jax_cuda12_plugin", "jax_cuda13_plugin") if importlib.util.find_spec(name)]


@pytest.mark.parametrize(
    "platform", ["foo", pytest.param("cuda", marks=pytest.mark.skipif(bool(PLUGINS), reason="CUDA may be there"))]
)
def test_a_platform_that_jax_cannot_start_is_told(platform, tmp_path):
    """One platform doesn't exist; the other's plugin isn't installed, or has no device here."""
    words = [sys.executable, ROOT / "run.py", "--config", "quickstart", "--run.folder", tmp_path / "runs"]
    variables = os.environ | {"JAX_PLATFORMS": platform}
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=variables)
    assert done.returncode == 2
    message = done.stderr.splitlines()[-1]
    assert message.startswith(
        f"error: the environment variable JAX_PLATFORMS is '{platform}', and JAX can't start that"
    )
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the settings are those of Linux's C library")
def test_a_command_runs_with_the_settings():
    """The words are kept, and -X options too; the restarted process is seen by the variable it prints."""
    code = (
        "import os, sys; from jaxgpt import environment; environment.restart_with_allocator();"
        "print(os.environ['GLIBC_TUNABLES'], sys.argv[1:], sys.flags.dev_mode, sep='|')"
    )
    variables = {name: value for name, value in os.environ.items() if name != environment.ALLOCATOR_VARIABLE}
    command = [sys.executable, "-X", "dev", "-W", "ignore", "-c", code, "a b", "--c"]
    output = subprocess.run(command, env=variables, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    variable, words, dev_mode = output.strip().split("|")
    assert "glibc.malloc.mmap_max=0" in variable
    assert words == "['a b', '--c']"
    assert dev_mode == "True"


def test_settings_of_the_user_are_left_alone(monkeypatch):
    monkeypatch.setenv(environment.ALLOCATOR_VARIABLE, "glibc.malloc.check=1")
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("started again"))
    environment.restart_with_allocator()
    assert os.environ[environment.ALLOCATOR_VARIABLE] == "glibc.malloc.check=1"


def test_no_device_at_all_is_told(tmp_path):
    words = [sys.executable, ROOT / "run.py", "--config", "quickstart", "--run.folder", tmp_path / "runs"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "0"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 2
    assert "JAX_PLATFORMS is 'cpu' and JAX_NUM_CPU_DEVICES is '0'" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
