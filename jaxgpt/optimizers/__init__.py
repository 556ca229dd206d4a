"""Optimizers, gradient clipping and learning-rate schedules, as functions of arrays.

`init` and `update` are those of a run's optimizer: AdamW, or Muon where there are matrices for it.
"""

from typing import Any

from jaxgpt.optimizers import adamw, muon
from jaxgpt.optimizers.adamw import Moments, Tree


def init(params: Tree, matrices: Tree | None) -> Moments:
    """Returns zero moments: AdamW's, or with Muon's `matrices` theirs and AdamW's of all else."""
    return adamw.init(params) if matrices is None else muon.init(params, matrices)


def update(*arguments: Any, setup: muon.Setup, **more: Any) -> tuple[Tree, Moments]:
    """Returns the new parameters and moments; the other arguments are those of `adamw.update`."""
    if setup.matrices is None:
        return adamw.update(*arguments, **more)
    return muon.update(*arguments, setup=setup, **more)
