"""The weights that a run began with, read again from where they were: what DPO and a policy take as their reference."""

from typing import NamedTuple

from jaxgpt.commands import configuration
from jaxgpt.commands.batches import Setting
from jaxgpt.interop import bases, detect_format
from jaxgpt.models.blocks import Params
from jaxgpt.training.state import random_params, with_head


class FirstWeights(NamedTuple):
    params: Params  # as the train state has them
    fingerprint: str  # empty for new adapters, which add nothing to their base yet; the base has one of its own


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


def option(setting: Setting) -> str:
    """Returns the option that named them."""
    return "--lora.adapters" if setting.config.lora.adapters else "--init-from"


def name(setting: Setting) -> str:
    """Returns the name that the user gave them."""
    return setting.config.lora.adapters or setting.config.training.init_from
