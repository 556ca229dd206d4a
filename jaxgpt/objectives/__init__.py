"""What is minimised. Each objective is a module with the same names: Batch, count, loss, loss_and_grads."""

from types import ModuleType

from jaxgpt.objectives import next_token
from jaxgpt.options.config import Config


def objective(config: Config) -> ModuleType:
    """The module of what this configuration minimises."""
    return next_token
