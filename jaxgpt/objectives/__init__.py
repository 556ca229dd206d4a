"""Objectives, which training minimises: modules with the same names, Batch, shapes, count, loss and loss_and_grads."""

from types import ModuleType

from jaxgpt.objectives import next_token, policy, preference, reward
from jaxgpt.options.config import Config


def objective(config: Config) -> ModuleType:
    """Returns the module of this configuration's objective."""
    return {"next_token": next_token, "reward": reward, "preference": preference, "policy": policy}[
        config.objective.name
    ]
