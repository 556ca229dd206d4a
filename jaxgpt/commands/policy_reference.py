"""The reference of a policy: the weights that its run began with, from which it is kept near.

They are a second copy of what is trained, on the devices as the first is, and in the memory plan
(`other_times.py`). A policy of new adapters needs no second model: its reference is its base. A checkpoint keeps only a
fingerprint of them; a resumed run reads them again where they were.
"""

from typing import Any, NamedTuple

from jaxgpt.commands import first_weights
from jaxgpt.commands.batches import Setting
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import shown
from jaxgpt.models.blocks import Params

FINGERPRINT = "reference"  # what a checkpoint keeps


class ReferenceWeights(NamedTuple):
    params: Params  # as the train state has them
    fingerprint: str  # of the weights; empty for new adapters, whose base has one

    def to_keep(self) -> dict[str, Any]:
        return {FINGERPRINT: self.fingerprint} if self.fingerprint else {}


def find(setting: Setting) -> ReferenceWeights | None:
    """Returns the reference; None where the objective has none.

    UserError where a resumed run's can't be read any more, or are other ones.
    """
    if not setting.config.objective.has_reference:
        return None
    try:
        found = ReferenceWeights(*first_weights.load(setting))
    except UserError as error:
        raise UserError(f"the weights that this policy is kept near can't be read: {error}") from None
    if found.fingerprint and setting.kept.get(FINGERPRINT, found.fingerprint) != found.fingerprint:
        raise UserError(
            f"{first_weights.option(setting)} {shown(first_weights.name(setting))}: these weights are other ones than "
            "those that the run began with, and was kept near. Put the old ones back, or begin a new run"
        )
    return found
