"""Checks of `compute.products`."""

from jaxgpt.errors import UserError
from jaxgpt.options.config import Config

MOST_HISTORY = 4096  # steps; all of it is moved in each, and is on every device


def check(config: Config) -> None:
    """Raises a UserError, naming the option, where products of 8 bits can't be had."""
    if (history := config.compute.fp8_history) > MOST_HISTORY:
        raise UserError(f"--compute.fp8-history is {history}, and must be at most {MOST_HISTORY}")
    if config.compute.products != "fp8":
        return
    for option, value, works, needed in (
        ("--model.experts", config.model.experts, not config.model.experts, "0, since experts have"),
        ("--lora.rank", config.lora.rank, not config.lora.rank, "0, since weights beside adapters have"),
        ("--parallel.reproducible", True, not config.parallel.reproducible, "left away, since its sums have"),
        (
            "--objective.name",
            config.objective.name,
            _has_head(config),
            "next_token for --compute.fp8-head: others have",
        ),
    ):
        if not works:
            raise UserError(
                f"{option} is {value}; with --compute.products fp8 it must be {needed} no products of 8 bits"
            )


def _has_head(config: Config) -> bool:
    return config.objective.name == "next_token" or not config.compute.fp8_head
