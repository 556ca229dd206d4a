"""Scores of texts, and log-probabilities of answers, of any number of comparisons: on all devices, in batches.

They are computed as the train step computes them, so that of the weights that a run begins with and of its reference
the log-probabilities are the same to the last bit.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxgpt.models import family
from jaxgpt.models.blocks import Params
from jaxgpt.objectives import reward
from jaxgpt.options.config import Config
from jaxgpt.parallel.mesh import AXIS, in_turn
from jaxgpt.parallel.sharding import Layout
from jaxgpt.training.log_probabilities import make_forward
from jaxgpt.training.state import layout_of, working

ROWS, WHOLE = PartitionSpec(AXIS), PartitionSpec()
Arrays = tuple[np.ndarray, ...]
# Arrays of the comparisons of these numbers, from 0 to count - 1, and their number, to one number for each text.
Evaluate = Callable[[Params, Callable[[np.ndarray], Arrays], int], np.ndarray]


def make_scores(config: Config, frozen: Any = None) -> Evaluate:
    """Returns a function of a train state's parameters, tokens (B, K, T) and last (B, K): the scores of K texts."""
    layout = layout_of(config)

    def scores(
        params: Params, frozen: Any, tokens: Int[Array, "B K T"], last: Int[Array, "B K"]
    ) -> Float[Array, "B K"]:
        whole, context = working(params, frozen, config, layout)
        batch = reward.Batch(tokens, last, jnp.zeros_like(last))
        found, _, _, _ = reward.scores(family(config.model), whole, batch, context)  # type: ignore[arg-type]
        return _of_all(found, layout)

    program = layout.jit(scores, in_specs=(layout.specs(), WHOLE, ROWS, ROWS), out_specs=WHOLE)
    return lambda params, make, count: _in_batches(
        lambda *arrays: program(params, frozen, *arrays), make, count, config
    )


def make_answers(config: Config, frozen: Any = None) -> Evaluate:
    """Returns a function of a train state's parameters, tokens and targets (B, 2, T): log-probabilities.

    They are the answers', sums over their tokens.
    """
    layout, forward = layout_of(config), make_forward(config)
    sums = layout.jit(lambda logp: _of_all(jnp.sum(logp, axis=-1), layout), in_specs=ROWS, out_specs=WHOLE)

    def answers(params: Params, make: Callable[[np.ndarray], Arrays], count: int) -> np.ndarray:
        def flat(numbers: np.ndarray) -> Arrays:
            return tuple(array.reshape(-1, array.shape[-1]) for array in make(numbers))

        def program(*arrays: Array) -> Array:
            return sums(forward(params, frozen, *arrays).logp).reshape(-1, 2)

        return _in_batches(program, flat, count, config)

    return answers


def _of_all(own: Float[Array, " b *rest"], layout: Layout) -> Float[Array, " B *rest"]:
    return own if layout.devices == 1 else lax.all_gather(own, AXIS, tiled=True)


def _in_batches(
    program: Callable[..., Array], make: Callable[[np.ndarray], Arrays], count: int, config: Config
) -> np.ndarray:
    """Returns what the program computes of each comparison. The last batch has its last one several times."""
    layout, B = layout_of(config), config.training.batch_size
    own = np.array(layout.own_rows(B))

    def dispatched() -> Iterator[Array]:
        for start in range(0, count, B):
            arrays = make(np.minimum(start + own, count - 1))
            yield program(*layout.from_processes(arrays, ROWS))

    return np.concatenate([np.asarray(found) for found in in_turn(dispatched())])[:count]
