"""Floating-point operations of training, counted per token: a multiplication and an addition are two.

Two counts of what the model needs. llm.c's, which `mfu` in metrics.jsonl is made with so that it compares with others':

    6 N + 6 L C T                        N: all parameters, V rows in the table

and the matrix products alone, exactly. Forward, per token, with F = 4C and a query seeing (T+1)/2 keys on average:

    layer        2 C·3C + 2 C·C + 2·2 C·F = 24 C²      queries, keys and values; attention's output; the MLP
    attention    2·2 C (T+1)/2            =  2 C (T+1)  q kᵀ and p v
    classifier   2 C Vp

and twice that in the backward, where every product has two gradients. `hardware_per_token` adds what this program
multiplies beyond it: attention's scores computed again, the part of each block of queries that the mask hides, and with
recompute = "block" each block's forward but its last product.
"""

from jaxgpt.config import Compute, Model
from jaxgpt.models import gpt2


def per_token(model: Model, sequence_length: int) -> int:
    """As llm.c counts: 6N + 6LCT, N being all parameters.

    6N is a multiplication and an addition for each parameter in the forward and twice that in the backward; 6LCT is
    attention's share, with causality halving 12LCT.
    """
    return 6 * gpt2.parameter_count(model) + 6 * model.layers * model.width * sequence_length


def products_per_token(model: Model, sequence_length: int) -> int:
    """The model's matrix products, forward and backward."""
    C = model.width
    forward = model.layers * (24 * C * C + 2 * C * (sequence_length + 1)) + 2 * C * model.padded_vocabulary_size
    return 3 * forward


def hardware_per_token(model: Model, compute: Compute, sequence_length: int) -> float:
    """`products_per_token`, and what the program multiplies again or in vain.

    As for `layers/attention.py` and tokens that fill the classifier's chunks; a kernel of a device's own skips other
    parts of the square.
    """
    C, T, block = model.width, sequence_length, compute.attention_block
    keys = sum((min(start + block, T) - start) * min(start + block, T) for start in range(0, T, block)) / T
    attention = 2 * C * keys  # one product over all queries and the keys that their block sees, per token
    layer = 3 * 24 * C * C + 7 * attention  # forward 2 of them; backward s again, ∂p, ∂q, ∂k, ∂v
    if compute.recompute == "block":
        layer += 16 * C * C + 2 * attention
    return model.layers * layer + 3 * 2 * C * model.padded_vocabulary_size
