"""The check of a compiled step, as a run takes it, on the device where it trains: every gradient beside the oracle's.

    gradients    of several inputs, by the step's own code on the step's own devices, sharded and in the step's own
                 dtype, and by `jax.grad` in float64 (`gradcheck_oracle.py`)
    the step     one step of the very compiled program (`as_run_step.py`)

What is read back are all devices' copies: where they should be the same they must be, to the bit, and the zeros with
which shards are filled up must still be zeros.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.layers.numerics import accumulation_dtype
from jaxgpt.models.blocks import are_stacked, stacked_marks
from jaxgpt.options.config import Config, Model
from jaxgpt.parallel.sharding import Layout
from jaxgpt.proof import as_run_inputs
from jaxgpt.proof.as_run_inputs import Batches, Inputs
from jaxgpt.proof.gradcheck_oracle import Tree, make_oracle, rounded, rounded_base
from jaxgpt.training.resharding import Resharding
from jaxgpt.training.state import TrainState, layout_of
from jaxgpt.training.step import key_of_masks, make_gradients

# Eps of the products of float32 where no higher precision is asked for: TF32 on a GPU, bfloat16 on a TPU.
FASTER = {"gpu": 2.0**-10, "tpu": 2.0**-7}
EXACT = ("highest", "float32")  # precisions whose products of float32 are those of a CPU
ZERO = 1e-12  # of the whole gradient's norm: a tensor whose gradient is smaller has none, but for the oracle's rounding
NOTHING = "0, and the oracle's is not"  # a fault


class Row(NamedTuple):
    """Distance of a tensor from what it should be."""

    tensor: str
    inputs: str  # the name of the inputs
    error: float  # ‖a - b‖ / ‖b‖, of the worst layer
    entry: float  # max |a - b| / max |b|, of the worst layer
    tolerance: float  # of both
    fault: str = ""  # what is wrong beside the numbers, in a few words

    @property
    def passed(self) -> bool:
        return not self.fault and self.error <= self.tolerance and self.entry <= self.tolerance  # False for NaN

    @property
    def of_tolerance(self) -> float:
        """Returns the worse error as a share of the tolerance, infinity for NaN or a fault."""
        share = max(self.error, self.entry) / self.tolerance
        return share if math.isfinite(share) and not self.fault else math.inf


def tolerance(config: Config, platform: str) -> float:
    """Returns the relative error that the rounding of a configuration explains, on a platform such as "cpu" or "gpu".

    As `gradcheck.tolerance` counts it: about ten roundings of eps/2 in a layer where sums are taken in a wider dtype
    than products' factors, and where they are not, one for each term of the longest sum, but a thousand at least.
    Errors of random sign add up as their root, over all layers too. Twice that is allowed.
    """
    model, training = config.model, config.training
    eps, sums = of_products(config, platform)
    terms = training.batch_size * training.sequence_length, model.width, model.feed_forward
    roundings = max(1000, *terms) if sums else 10
    return eps * math.sqrt(roundings * (2 * model.layers + 2))


def of_products(config: Config, platform: str) -> tuple[float, bool]:
    """Returns eps of the factors of products, and whether sums are no wider than these."""
    dtype, precision = jnp.dtype(config.compute.dtype), jax.config.values["jax_default_matmul_precision"]
    if accumulation_dtype(dtype) != dtype:
        return float(jnp.finfo(dtype).eps), False
    if platform in FASTER and precision not in EXACT:
        return FASTER[platform], False
    return float(jnp.finfo(dtype).eps), True


class Whole(NamedTuple):
    """A tree of parameters, or of gradients, in NumPy's memory."""

    tensors: Tree  # with layers stacked
    faults: dict[str, str]  # by a tensor's name: what the devices disagree about


def on_host(tree: Tree, layout: Layout) -> Whole:
    """Returns a tree in the layout of parameters as whole, stacked tensors, and what is wrong between the devices.

    It may have None for some of them.
    """
    faults: dict[str, str] = {}

    def one(path: tuple, shape: jax.ShapeDtypeStruct, array: jax.Array | None) -> np.ndarray | None:
        if array is None:
            return None
        whole, fault = _read(array)
        if layout.sharded:
            size = math.prod(shape.shape[whole.ndim - 1 :])
            if np.any(whole[..., size:] != 0):  # NaN too
                fault = fault or "the zeros that fill up the shards were written over"
            whole = whole[..., :size].reshape(shape.shape)
        if fault:
            faults[tensor_name(path)] = fault
        return whole

    tensors = jax.tree_util.tree_map_with_path(one, layout.shapes, tree)
    if not are_stacked(tensors.blocks):
        tensors = tensors._replace(blocks=jax.tree.map(lambda *leaves: np.stack(leaves), *tensors.blocks))
    return Whole(tensors, faults)


def _read(array: jax.Array) -> tuple[np.ndarray, str]:
    """Returns an array's numbers, and a fault where two devices that have the same part of it differ in it."""
    parts: dict[str, tuple[int, np.ndarray]] = {}
    for shard in array.addressable_shards:
        mine = np.asarray(shard.data)
        device, first = parts.setdefault(str(shard.index), (shard.device.id, mine))
        if first.tobytes() != mine.tobytes():
            return np.asarray(array), f"device {shard.device.id} has other numbers than device {device}"
    return np.asarray(array), ""


def tensor_name(path: tuple) -> str:
    """Returns a tensor's name, the same with layers apart: blocks.qkv.weight."""
    parts = [part for part in path if not isinstance(part, jax.tree_util.SequenceKey)]
    return jax.tree_util.keystr(tuple(parts), simple=True, separator=".")


def compare(found: Whole, truth: Tree, model: Model, inputs: str, limit: float) -> Iterator[Row]:
    """Yields a row for each gradient, and for those of queries, keys and values one each, which differ in size."""
    whole = math.sqrt(sum(float(np.vdot(leaf, leaf)) for leaf in jax.tree.leaves(truth)))
    marks = jax.tree.leaves(stacked_marks(truth))
    pairs = zip(jax.tree.leaves_with_path(found.tensors), jax.tree.leaves(truth), marks, strict=True)
    for (path, a), b, stacked in pairs:
        name = tensor_name(path)
        fault = found.faults.get(name, "")
        for part, columns in parts(path, b.shape, model):
            yield compared(name + part, a[columns], b[columns], inputs, limit, stacked, fault, whole)


def compared(
    name: str,
    found: np.ndarray,
    truth: np.ndarray,
    inputs: str,
    limit: float,
    stacked: bool,
    fault: str,
    whole: float = 0.0,
) -> Row:
    """Returns the row of one tensor, with the errors of the worst layer where its first axis counts layers.

    `whole` is the norm of the gradient by all tensors.
    """
    a, b = np.asarray(found, np.float64), np.asarray(truth, np.float64)
    layers = list(zip(a, b, strict=True)) if stacked else [(a, b)]
    errors = [_error(*layer, whole) for layer in layers]
    error, entry = (max(each, key=_nan_first) for each in zip(*errors, strict=True))
    if not fault and not np.any(a) and np.linalg.norm(b) > ZERO * whole:
        fault = NOTHING
    return Row(name, inputs, error, entry, limit, fault)


def _nan_first(error: float) -> float:
    return math.inf if math.isnan(error) else error


def _error(a: np.ndarray, b: np.ndarray, whole: float) -> tuple[float, float]:
    """Returns both relative errors. Against the whole gradient's norm where b is 0 but for rounding."""
    norm, largest = float(np.linalg.norm(b)), float(np.max(np.abs(b), initial=0.0))
    if norm < ZERO * whole:
        norm = largest = whole
    difference = a - b
    return float(np.linalg.norm(difference)) / (norm or 1.0), float(np.max(np.abs(difference), initial=0.0)) / (
        largest or 1.0
    )


def parts(path: tuple, shape: tuple[int, ...], model: Model) -> list[tuple[str, Any]]:
    """Returns the names and the columns of a tensor's parts."""
    if not any(getattr(part, "name", "") == "qkv" for part in path):
        return [("", ...)]
    queries, each = model.heads * model.width_per_head, model.key_value_heads * model.width_per_head
    assert shape[-1] == queries + 2 * each
    ends = (queries, queries + each, queries + 2 * each)
    columns = zip("qkv", (0, *ends[:-1]), ends, strict=True)
    return [(f" ({name})", (..., slice(start, end))) for name, start, end in columns]


class Check:
    """The check of one configuration, which must have its sizes filled in and no "auto" in `compute`."""

    def __init__(self, config: Config):
        self.config, self.layout = config, layout_of(config)
        self.resharding, self.gradients, self.oracle = Resharding(config), make_gradients(config), make_oracle(config)
        self.params, self.base = as_run_inputs.parameters(config), as_run_inputs.base_of_adapters(config)
        self.platform = self.layout.mesh.devices.flat[0].platform
        self.limit = tolerance(config, self.platform)

    def batches(self) -> Batches:
        """Returns what makes the batches."""
        return Batches(self.config, lambda: (rounded(self.params, self.config), self._exact_base(ties=False)))

    def rows(self, inputs: Inputs) -> Iterator[Row]:
        """Yields the rows of the gradients, and one of the loss, for each batch of these inputs."""
        state, frozen, params, base = self.begin(ties=inputs.ties)
        truth = None
        for number, batch in enumerate(inputs.batches):
            if truth is None or self.config.model.dropout:  # whose masks are others on each device
                truth = self.oracle(params, base, batch, self.key(state))
            name = inputs.name if len(inputs.batches) == 1 else f"{inputs.name}, {number}"
            loss, grads = self.gradients(state._replace(moments=None), frozen, batch)
            found, _ = _read(loss)
            error = abs(float(found) - truth.loss) / abs(truth.loss or 1.0)
            yield Row("loss", name, error, error, self.limit)
            yield from compare(on_host(grads, self.layout), truth.grads, self.config.model, name, self.limit)

    def begin(self, *, ties: bool) -> tuple[TrainState, Any, Tree, Tree]:
        """Returns the state and what is frozen, on the devices, and what is trained and what is frozen in float64."""
        params, base = self.params, self.base
        if ties:
            params, base = as_run_inputs.with_ties(params), base and as_run_inputs.with_ties(base)
        state = self.resharding.first_state(params)
        frozen = None if base is None else self.resharding.placed_base(base)
        return state, frozen, rounded(params, self.config), self._exact_base(ties=ties)

    def _exact_base(self, *, ties: bool) -> Tree:
        if self.base is None:
            return None
        return rounded_base(as_run_inputs.with_ties(self.base) if ties else self.base, self.config)

    def key(self, state: TrainState) -> np.ndarray | None:
        """Returns the words of the key of a step's masks; None where there is no dropout."""
        return np.asarray(jax.random.key_data(key_of_masks(state))) if self.config.model.dropout else None
