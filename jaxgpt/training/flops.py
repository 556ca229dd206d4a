"""Floating-point operations of training, counted per token: a multiplication and an addition are two.

There are two counts of what the model needs. llm.c's, by which `mfu` in metrics.jsonl compares with other programs':

    6 N + 6 L C T                        N: all parameters that a token meets, V rows in the table

and the matrix products alone, exactly, which each family counts itself (`flops_per_token`). `hardware_per_token` adds
the operations of this program beyond those: attention's scores computed again, the part of each block of queries that
the mask hides, and with recompute = "block" each block's forward but its last product.
"""

from jaxgpt.models import family
from jaxgpt.options.config import Compute, Model


def per_token(model: Model, sequence_length: int) -> int:
    """Returns llm.c's count, 6N + 6LCT.

    6N is a multiplication and an addition for each parameter in the forward and twice that in the backward; 6LCT is
    attention's share, with causality halving 12LCT.
    """
    return 6 * family(model).parameter_count(model, active=True) + 6 * model.layers * model.width * sequence_length


def products_per_token(model: Model, sequence_length: int) -> int:
    """Returns the operations of the model's matrix products, forward and backward."""
    return family(model).flops_per_token(model, sequence_length)


def hardware_per_token(model: Model, compute: Compute, sequence_length: int) -> float:
    """Returns `products_per_token` and the operations that the program repeats or does in vain, together.

    Counted for `layers/attention.py`, and for tokens that fill the classifier's chunks; a device-specific kernel skips
    other parts of the square.
    """
    C, T, block = model.width, sequence_length, compute.attention_block
    keys = sum((min(start + block, T) - start) * min(start + block, T) for start in range(0, T, block)) / T
    needed = 8 if compute.recompute == "block" else 6  # attention's products; ∂p, ∂q, ∂k and ∂v are 4 of them
    beyond = (needed + 1) * 2 * C * keys - needed * C * (T + 1)  # the scores again, and all that a block's queries see
    return family(model).flops_per_token(model, T, recompute=compute.recompute) + model.layers * beyond
