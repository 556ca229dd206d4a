"""Fixtures of the tests of a run's folder."""

import resource
from typing import Any

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxgpt.options.config import Config, Run


@pytest.fixture
def config(tmp_path):
    """A function that makes a configuration whose runs are in tmp_path/runs."""

    def make(name: str = "one", *, folder: str = "", **options: Any) -> Config:
        return Config(run=Run(name=name, folder=folder or str(tmp_path / "runs"), **options))

    return make


@pytest.fixture
def small_files():
    """A function that limits the size of files, which stands in for a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """A module's runs have few programs among them, which are kept on the disk."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
