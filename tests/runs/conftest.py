"""Fixtures of the tests of a run's folder."""

import resource
from typing import Any

import pytest

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
