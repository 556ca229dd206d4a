"""`run.py verify`: comparison with llm.c.

Our forward and backward are compared with llm.c's, on a model and a debug state that llm.c has written.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxgpt import compilation_cache
from jaxgpt.commands.convert import describe
from jaxgpt.data.loader import Batch
from jaxgpt.errors import UserError
from jaxgpt.interop import gpt2_tables, llmc
from jaxgpt.models import family, logits
from jaxgpt.models.blocks import Context, Params
from jaxgpt.objectives import next_token
from jaxgpt.options import command_line
from jaxgpt.options.config import Compute, Model
from jaxgpt.terminal import say

LOGITS, LOSS = 1e-3, 1e-5  # largest differences
GRADIENT, GRADIENT_SHARE, GRADIENT_NORM = 1e-6, 0.02, 1e-4
AT_ONCE = 1 << 22  # numbers compared at a time


@dataclass(frozen=True)
class Verify:
    """Compares logits, loss and every gradient with llm.c's own, on the batch of its debug state."""

    model: str
    """Model file of llm.c in float32, such as gpt2_124M.bin."""
    state: str
    """Debug state that belongs to it, such as gpt2_124M_debug_state.bin."""


def run(words: list[str]) -> int:
    """Prints a row for each tensor and a verdict; returns 1 if one is outside its bounds, and else 0.

    UserError where a file can't be read, or the model is in bfloat16, whose rounding alone is more than the bounds.
    """
    options = command_line.read(Verify, words, "verify")
    model_path, state_path = Path(options.model), Path(options.state)
    source = llmc.open_model(model_path)
    if source.dtype != "float32":
        raise UserError(f"{model_path}: weights in {source.dtype}; the bounds are for float32 (version 3)")
    state = llmc.read_state(state_path, source.model)
    say(f"model     {source.where}: {describe(source)}")
    say(f"state     {state_path}: {state.tokens.shape[0]} x {state.tokens.shape[1]} tokens")
    compilation_cache.use("")
    say(
        f"bounds    logits {LOGITS}, loss {LOSS}; gradients {GRADIENT} + {GRADIENT_SHARE} |reference|, {GRADIENT_NORM} "
        f"in norm\n\n{'tensor':<12} {'difference':>10} {'largest':>10} {'in norm':>9} {'of bound':>9}"
    )
    failed = total = 0
    for row in rows(computed(source.load(), state, source.model), state):
        verdict = "ok" if row.passed else "FAILED"
        say(
            f"{row.name:<12} {row.difference:>10.2e} {row.reference:>10.2e} {row.relative:>9.1e} {row.of_bound:>9.1e}"
            f"  {verdict}",
            flush=True,
        )
        total += 1
        failed += not row.passed
    say(f"\n{total - failed} of {total} agree with llm.c" + (f"; {failed} FAILED" if failed else ""))
    return 1 if failed else 0


class Computed(NamedTuple):
    logits: Any  # (B, T, V)
    loss: Any
    grads: Params


class Row(NamedTuple):
    name: str
    difference: float  # the largest |ours - theirs| of one number
    reference: float  # the largest |theirs|
    relative: float  # ‖ours - theirs‖ / ‖theirs‖
    of_bound: float  # the largest difference, as a share of its bound
    passed: bool


def computed(params: Params, state: llmc.State, model: Model) -> Computed:
    """Returns our logits, loss and gradients, in float32."""
    compute = Compute(attention="blocks", classifier_chunk=min(Compute.classifier_chunk, state.tokens.size))

    @jax.jit
    def everything(params, tokens, targets):
        context = Context(model, compute)
        loss, _, grads = next_token.loss_and_grads(family(model), params, Batch(tokens, targets), context)
        return Computed(logits(params, tokens, context), loss, grads)

    with jax.default_matmul_precision("highest"):
        return jax.tree.map(np.asarray, everything(params, state.tokens, state.targets))


def rows(ours: Computed, theirs: llmc.State) -> Iterator[Row]:
    """Yields the comparisons of the logits, the loss and each gradient."""
    yield compare("logits", ours.logits, theirs.logits, LOGITS, 0.0, np.inf)
    yield compare("loss", ours.loss, np.float32(theirs.loss), LOSS, 0.0, np.inf)
    for (tensor, a), (_, b) in zip(gpt2_tables.paired(ours.grads), gpt2_tables.paired(theirs.grads), strict=True):
        yield compare(tensor.llmc, a, b, GRADIENT, GRADIENT_SHARE, GRADIENT_NORM)


def compare(name: str, ours, theirs, bound: float, share: float, in_norm: float) -> Row:
    """Compares two tensors of the same size.

    Each number may differ by bound + share·|theirs|, and all of them together by `in_norm` of their norm.
    """
    ours, theirs = np.ravel(ours), np.ravel(theirs)
    difference = reference = of_bound = squares = all_squares = 0.0
    with np.errstate(invalid="ignore", over="ignore"):  # for NaN and infinity, which never pass
        for start in range(0, ours.size, AT_ONCE):
            b = np.float64(theirs[start : start + AT_ONCE])
            a = np.abs(ours[start : start + AT_ONCE] - b)
            difference, reference = np.maximum(difference, a.max()), np.maximum(reference, np.abs(b).max())  # NaN stays
            of_bound = np.maximum(of_bound, (a / (bound + share * np.abs(b))).max())
            squares, all_squares = squares + np.dot(a, a), all_squares + np.dot(b, b)
        relative = float(np.sqrt(squares / all_squares if all_squares else squares))
    passed = bool(of_bound <= 1 and relative <= in_norm)
    return Row(name, float(difference), float(reference), relative, float(of_bound), passed)
