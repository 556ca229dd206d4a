"""The loss over a validation split."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxgpt.config import Config
from jaxgpt.data import loader
from jaxgpt.layers import cross_entropy
from jaxgpt.models import gpt2
from jaxgpt.parallel.mesh import AXIS
from jaxgpt.training.step import cast, layout_of


def make_validation_loss(config: Config, tokens: loader.Tokens, sequence_length: int) -> Callable[[gpt2.Params], float]:
    """A function of a state's parameters: the mean loss in nats over every token of `tokens` that has one before it.

    Windows of `sequence_length` that do not overlap, the last one filled up with ignored targets, so that the mean is
    the same whatever the batch size. With `evaluation_batches`, over that many batches from the beginning.
    """
    batches = list(
        loader.validation_batches(
            tokens,
            batch_size=config.training.batch_size,
            sequence_length=sequence_length,
            limit=config.training.evaluation_batches or None,
        )
    )
    count = sum(int(np.sum(targets != cross_entropy.IGNORED)) for _, targets in batches)

    layout = layout_of(config)

    def loss_sum(params: gpt2.Params, tokens: Int[Array, "B T"], targets: Int[Array, "B T"]) -> Float[Array, ""]:
        working, scale = layout.working(cast(params, config.compute)), jax.numpy.float32(1)
        value = gpt2.loss(working, tokens, targets, config.model, config.compute, scale=scale, gather=layout.gather)
        return layout.total(value)

    sequences = PartitionSpec(AXIS)
    batch_loss = layout.jit(loss_sum, in_specs=(layout.specs(), sequences, sequences), out_specs=PartitionSpec())

    def validation_loss(params: gpt2.Params) -> float:
        sums: list[Any] = [batch_loss(params, tokens, targets) for tokens, targets in batches]
        return float(np.sum(jax.device_get(sums), dtype=np.float64) / count)

    return validation_loss
