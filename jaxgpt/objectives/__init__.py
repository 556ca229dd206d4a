"""Objectives, which training minimises. Each is a module with the same names: Batch, count, loss, loss_and_grads."""

from types import ModuleType

from jaxgpt.objectives import next_token
from jaxgpt.options.config import Config


def objective(config: Config) -> ModuleType:
    """Returns the module of this configuration's objective."""
    return next_token
