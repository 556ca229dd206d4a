"""Settings of every test: the CPU, exact products, checked shape annotations, few optimisations; common fixtures."""

import gc
import os
import pathlib
import re
import signal
import tempfile

import jax
import pytest
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_num_cpu_devices", 8)  # of which a run takes one, unless it asks for more

# XLA's older code generator takes a third of the time to compile for a CPU. Later versions have only the newer one.
if jax.__version_info__ < (0, 11):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"

# Nothing is taken from the user's cache or left there, by the processes that tests start neither.
CACHE = tempfile.TemporaryDirectory(prefix="jaxgpt-tests-")  # until the tests' process ends
os.environ["XDG_CACHE_HOME"] = CACHE.name
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
jax.config.update("jax_disable_most_optimizations", True)  # programs compile in half the time, and run slower
jax.config.update("jax_enable_compilation_cache", False)

# Every call of a function of these packages has its arguments' and its results' shapes and dtypes checked. It works on
# modules imported from here on.
install_import_hook(["jaxgpt.layers", "jaxgpt.models", "jaxgpt.kernels", "jaxgpt.optimizers"], "beartype.beartype")

# A shell that starts the tests in the background has them ignore Ctrl-C, which some of them are about.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Each shape is compiled anew, so examples are few and slow; the same ones are drawn every time. A fixture here is a
# switch that is the same for every example (x64), so that it is set once for all of them does no harm.
settings.register_profile(
    "jaxgpt",
    max_examples=5,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("jaxgpt")


@pytest.fixture(scope="session", autouse=True)
def one_device_by_default():
    """Has runs see one device, as on the machine that most people begin with."""
    from jaxgpt.parallel import mesh  # not before the import hook above

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh, "available", lambda: 1)
        yield


@pytest.fixture
def all_optimizations():
    """Compiles with all optimisations, as users do, for the length of a test that compares the bits of several
    programs."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def not_under_nohup():
    """Handles SIGHUP as at a terminal, also if the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def x64():
    """64-bit numbers for the length of a test; without it a test sees JAX as users run it, in 32 bits."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def assert_exact(x64):
    """A function that asserts that a gradcheck case's hand-written gradients are `jax.grad`'s, in float64."""
    from jaxgpt.proof import gradcheck  # not before the import hook above

    def check(case):
        rows = gradcheck.check(case, "float64")
        assert rows
        assert [row for row in rows if not row.error < 1e-10] == []

    return check


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with text.txt, which is the current folder."""
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question\n" * 20)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("JAXGPT_DATA", raising=False)  # where `prepare` would write
    return tmp_path


@pytest.fixture
def fails(capsys):
    """A function that runs a command which is to end with status 2, and returns its message on one line."""

    from jaxgpt.commands import cli  # not before the import hook above

    def run(*words: str, command=None) -> str:
        try:
            status = cli.run(command, list(words)) if command else cli.main(words)
        except SystemExit as error:  # as the parser of the command line ends it
            status = error.code
        out, err = capsys.readouterr()
        assert status == 2
        assert "Traceback" not in out + err
        return " ".join(re.sub("[─│╭╮╰╯]", " ", err).split())

    return run


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Drops compiled programs after a file where they have many: Linux ends a process that maps 65,530 regions."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()
