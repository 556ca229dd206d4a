"""The reference of a policy: the weights that its run began with, from which it is kept near.

They are a second copy of the parameters, on the devices as the first is. A policy of adapters needs none: the reference
is its base. A checkpoint keeps only a fingerprint of them; a resumed run reads them again where they were.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxgpt.commands.batches import Setting
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import shown
from jaxgpt.interop import bases, detect_format
from jaxgpt.models.blocks import Params
from jaxgpt.training.state import with_head

FINGERPRINT = "reference"  # what a checkpoint keeps


class ReferenceWeights(NamedTuple):
    params: Params  # as the train state has them
    fingerprint: str  # of the weights; empty for adapters, whose base has one

    def to_keep(self) -> dict[str, Any]:
        return {FINGERPRINT: self.fingerprint} if self.fingerprint else {}


def find(setting: Setting) -> ReferenceWeights | None:
    """Returns the reference; None where the objective has none.

    UserError where a resumed run's can't be read any more, or are other ones.
    """
    config = setting.config
    if not config.objective.has_reference:
        return None
    if config.lora.rank:  # adapters of zeros add nothing to the base
        return ReferenceWeights(jax.tree.map(jnp.zeros_like, setting.state.params), "")
    try:
        weights = detect_format.open_weights(config.training.init_from).load()
    except UserError as error:
        raise UserError(f"the weights that this policy is kept near can't be read: {error}") from None
    made = ReferenceWeights(setting.resharding.placed(with_head(weights, config)), bases.fingerprint(weights))
    _check(setting.kept, made.fingerprint, config.training.init_from)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(made.params)) / 2**20
    setting.note(f"reference the weights that the run began with: a second copy of {size:,.1f} MiB, beside the plan")
    return made


def _check(kept: Mapping[str, Any], fingerprint: str, name: str) -> None:
    if kept.get(FINGERPRINT, fingerprint) != fingerprint:
        raise UserError(
            f"--init-from {shown(name)}: these weights are other ones than those that the run began with, and was kept "
            "near. Put the old ones back, or begin a new run"
        )
