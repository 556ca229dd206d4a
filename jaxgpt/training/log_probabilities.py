"""Log-probabilities of given texts under a model, and its values: what a policy's and DPO's batches are made with.

They are computed as the train step computes them, with the same layers on the same devices, so that at the first update
the ratio of new to old probabilities is 1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxgpt.layers import scalar_head, unembedding
from jaxgpt.models import family, with_scalar
from jaxgpt.models.blocks import Params, inputs_of
from jaxgpt.options.config import Config
from jaxgpt.parallel.mesh import AXIS
from jaxgpt.training.state import frozen_shapes, layout_of, working


class Forward(NamedTuple):
    logp: Float[Array, "B T"]  # of each target, 0 where it is ignored
    values: Float[Array, "B T"] | None  # at each token, where the model has a scalar head


def make_forward(config: Config) -> Callable[[Params, Any, Int[Array, "B T"], Int[Array, "B T"]], Forward]:
    """Returns a jitted function of parameters, as `config`'s train state has them, what is frozen, tokens and targets.

    B divides by the number of devices.
    """
    model, layout = config.model, layout_of(config)

    def forward(params: Params, frozen: Any, tokens: Int[Array, "B T"], targets: Int[Array, "B T"]) -> Forward:
        whole, context = working(params, frozen, config, layout)
        own = with_scalar.model_of(whole) if config.objective.scalar_head else whole
        x, _, _ = family(model).features(own, inputs_of(tokens, model), context)
        logp = unembedding.log_probabilities(
            family(model).head(own),
            x,
            targets.reshape(-1),
            vocabulary_size=model.vocabulary_size,
            chunk=config.compute.classifier_chunk,
            cap=model.logit_soft_cap,
        )
        if not config.objective.scalar_head:
            return Forward(logp.reshape(targets.shape), None)
        values, _ = scalar_head.forward(whole.scalar, x)
        return Forward(logp.reshape(targets.shape), values.reshape(targets.shape))

    rows, whole = PartitionSpec(AXIS), PartitionSpec()
    frozen = jax.tree.map(lambda _: whole, frozen_shapes(config))
    out = Forward(rows, rows if config.objective.scalar_head else None)  # type: ignore[arg-type]
    return layout.jit(forward, in_specs=(layout.specs(), frozen, rows, rows), out_specs=out)
