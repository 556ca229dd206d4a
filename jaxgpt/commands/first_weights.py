"""The weights that a run began with, read again from where they were: what DPO and a policy take as their reference.

DPO needs their log-probabilities alone (`comparison_batches.py`). A policy is kept near them: they are a second copy of
what is trained, on the devices as the first is, and in the memory plan (`other_times.py`). A policy of new adapters
needs no second model: its reference is its base. A checkpoint keeps only a fingerprint of them; a resumed run reads
them again where they were.
"""

from typing import Any, NamedTuple

from jaxgpt.commands import configuration
from jaxgpt.commands.batches import Setting
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import shown
from jaxgpt.interop import bases, detect_format
from jaxgpt.models.blocks import Params
from jaxgpt.training.state import random_params, with_head

FINGERPRINT = "reference"  # what a checkpoint keeps


class FirstWeights(NamedTuple):
    params: Params  # as the train state has them
    fingerprint: str  # empty for new adapters, which add nothing to their base yet; the base has one of its own

    def to_keep(self) -> dict[str, Any]:
        return {FINGERPRINT: self.fingerprint} if self.fingerprint else {}


def load(setting: Setting) -> FirstWeights:
    """Returns the first weights on the devices. UserError where they can't be read any more."""
    config = setting.config
    if config.lora.rank and not config.lora.adapters:
        return FirstWeights(random_params(config), "")
    source = (
        configuration.adapters(config) if config.lora.rank else detect_format.open_weights(config.training.init_from)
    )
    weights = source.load()
    return FirstWeights(setting.resharding.placed(with_head(weights, config)), bases.fingerprint(weights))


def reference(setting: Setting) -> FirstWeights | None:
    """Returns the reference of a policy; None where the objective has none.

    UserError where a resumed run's can't be read any more, or are other ones.
    """
    if not setting.config.objective.has_reference:
        return None
    try:
        found = load(setting)
    except UserError as error:
        raise UserError(f"the weights that this policy is kept near can't be read: {error}") from None
    if found.fingerprint and setting.kept.get(FINGERPRINT, found.fingerprint) != found.fingerprint:
        raise UserError(
            f"{option(setting)} {shown(name(setting))}: these weights are other ones than "
            "those that the run began with, and was kept near. Put the old ones back, or begin a new run"
        )
    return found


def option(setting: Setting) -> str:
    """Returns the option that named them."""
    return "--lora.adapters" if setting.config.lora.adapters else "--init-from"


def name(setting: Setting) -> str:
    """Returns the name that the user gave them."""
    return setting.config.lora.adapters or setting.config.training.init_from
