"""ZeRO sharding (Rajbhandari et al. 2020, arXiv:1910.02054): each device's shards, and the collectives.

D devices each take their part of every micro-batch's sequences. Each of them keeps, of the P parameters,

    zero    masters, moments    gradients        parameters the activations meet
    0       P                   P                P
    1       P/D                 P                P
    2       P/D                 P/D              P
    3       P/D                 P/D              P/D, and one layer's at a time

From stage 1 on a tensor is kept as shards: flattened, padded with zeros to a multiple of
D, and cut in D (stacked layers each by itself). So a tensor of any shape can be sharded, and AdamW, which looks at one
number at a time, runs on the shards as they are. A padding zero has the gradient 0 and stays 0.

Muon looks at whole matrices. Each tensor of a layer has a device that owns it: an all-to-all brings it the shards of
its momentum, it orthogonalises, and another all-to-all brings each device its shard of the result. With S such tensors
of one kind a device owns S/D of them, rounded up, and none is two devices'.

Gradients are summed over the devices by an all-reduce (`psum`) where every device needs the whole sum, and by a
reduce-scatter (`psum_scatter`) where each needs its shard. The functions here say when; on one device they do nothing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from jaxgpt.models.blocks import BlockTransform, Params, block_shapes, cast, identity, matrices, stacked_marks
from jaxgpt.parallel.mesh import AXIS, SHARDS

Tree = Any


@dataclass(frozen=True)
class Layout:
    """The layout of the parameters on the devices. On one device all is whole, whatever the stage."""

    mesh: Mesh
    zero: int
    shapes: Params  # of the whole parameters
    reproducible: bool
    matrices: Params | None = None  # which of them are Muon's (`blocks.as_matrices`); None for AdamW

    @property
    def devices(self) -> int:
        return self.mesh.size

    @property
    def sharded(self) -> bool:
        """Returns whether master weights and moments are sharded."""
        return self.zero >= 1 and self.devices > 1

    @property
    def own_devices(self) -> list[int]:
        """Indices of this process's devices in the mesh."""
        devices = self.mesh.devices.flat
        return [place for place, device in enumerate(devices) if device.process_index == jax.process_index()]

    def own_rows(self, sequences: int) -> list[int]:
        """Returns the indices of a micro-batch's sequences that this process's devices compute with.

        They are the only ones that this process reads.
        """
        each = sequences // self.devices
        return [device * each + row for device in self.own_devices for row in range(each)]

    def places_of_rows(self, micro_batches: int, rows: int) -> Int[Array, "A B"]:
        """Returns the places of this device's rows, so many in each micro-batch, among all rows of a step."""
        device = lax.axis_index(AXIS) if self.devices > 1 else 0
        first = jnp.arange(micro_batches) * (rows * self.devices) + device * rows
        return first[:, None] + jnp.arange(rows)

    def from_processes(self, own: Tree, spec: PartitionSpec) -> Tree:
        """Returns arrays of all processes, sharded over the devices by `spec`, from this process's part of them.

        A process that trains alone gets its arrays back as they are.
        """
        if jax.process_count() == 1:
            return own
        sharding = NamedSharding(self.mesh, spec)
        return jax.tree.map(lambda array: jax.make_array_from_process_local_data(sharding, array), own)

    def specs(self) -> Params:
        """Returns the PartitionSpecs of the parameters, which are the first moments' too."""

        def one(shape: jax.ShapeDtypeStruct, stacked: bool) -> PartitionSpec:
            return PartitionSpec(*[None] * stacked, AXIS) if self.sharded else PartitionSpec()

        return jax.tree.map(one, self.shapes, stacked_marks(self.shapes))

    def second_specs(self) -> Params:
        """Returns those of the second moments, which Muon's matrices have none of."""
        specs = self.specs()
        if self.matrices is None:
            return specs
        return jax.tree.map(lambda spec, of: None if of else spec, specs, self.matrices, is_leaf=_is_spec)

    def shardings(self, specs: Tree) -> Tree:
        """Returns NamedShardings for `jax.jit`, or None on one device."""
        return None if self.devices == 1 else jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs)

    def jit(self, function: Callable, *, in_specs: Tree, out_specs: Tree, **options: Any) -> Callable:
        """Jits a function that every device runs on its part of the arguments, as `in_specs` divides them.

        `options` are those of `jax.jit`; shardings among them take the place of the specs'.
        """
        if self.devices == 1:
            return jax.jit(function, **options)
        # check_vma would want layers to say which of their arrays differ between devices.
        run = jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        where = {"in_shardings": self.shardings(in_specs), "out_shardings": self.shardings(out_specs)}
        return jax.jit(run, **where | options)

    def shard(self, whole: Params) -> Params:
        """Shards whole parameters, or a moment, over all devices; returns them unchanged where they are kept whole."""
        return self._split(whole, stacked_marks(whole)) if self.sharded else whole

    def unshard(self, shards: Params) -> Params:
        """The inverse of `shard`."""
        if not self.sharded:
            return shards
        return jax.tree.map(lambda shape, flat: None if flat is None else _joined(flat, shape), self.shapes, shards)

    def _split(self, whole: Tree, stacked: Tree) -> Tree:
        return jax.tree.map(lambda array, stacked: _filled_up(array, int(stacked), self.devices), whole, stacked)

    def to_owners(self, shards: Float[Array, "S n"]) -> Float[Array, "_ _"]:
        """Returns this device's own of S tensors that all devices have shards of: whole, a row each, filled up.

        Tensors of zeros make S a multiple of the number of devices.
        """
        if not self.sharded:
            return shards
        shards = jnp.pad(shards, ((0, -len(shards) % self.devices), (0, 0)))
        return lax.all_to_all(shards, AXIS, split_axis=0, concat_axis=1, tiled=True)

    def to_shards(self, own: Float[Array, "_ _"], count: int) -> Float[Array, "{count} _"]:
        """The inverse of `to_owners`: returns this device's shards of S = `count` tensors."""
        if not self.sharded:
            return own
        return lax.all_to_all(own, AXIS, split_axis=1, concat_axis=0, tiled=True)[:count]

    def total(self, value: Array) -> Array:
        """Sums a value over the devices."""
        return lax.psum(value, AXIS) if self.devices > 1 else value

    def largest(self, value: Array | None) -> Array | None:
        """Returns the largest of all devices' values, number by number; None of nothing."""
        return lax.pmax(value, AXIS) if value is not None and self.devices > 1 else value

    def total_of_shards(self, value: Array) -> Array:
        """Sums over the devices a value that each has for its own shards."""
        return self.total(value) if self.sharded else value

    def own_key(self, key: Key[Array, ""]) -> Key[Array, ""]:
        """Returns a key for rounding what this device updates: another on each, where each has its own shards."""
        return jax.random.fold_in(key, lax.axis_index(AXIS)) if self.sharded else key

    def working(self, params: Params, dtype: DTypeLike) -> Params:
        """Returns the parameters that the model computes with, cast to the activations' dtype and all-gathered.

        The blocks' are left for `gather` where it can take them one by one: at stage 3, and where nothing is sharded.
        """
        if self.sharded and self.zero < 3:
            return self.whole(params, dtype)
        ends, shapes = params._replace(blocks=()), self.shapes._replace(blocks=())
        ends = cast(ends, dtype, matrices(shapes))
        return (_gathered(ends, shapes) if self.sharded else ends)._replace(blocks=params.blocks)

    def whole(self, params: Params, dtype: DTypeLike) -> Params:
        """Returns all parameters, cast to the activations' dtype and all-gathered."""
        params = cast(params, dtype, matrices(self.shapes))
        return _gathered(params, self.shapes) if self.sharded else params

    def gather(self, dtype: DTypeLike) -> BlockTransform:
        """Returns a function that casts and all-gathers one block's parameters.

        So a copy of only two blocks' is there at a time. It is the identity where `working` has done both.
        """
        shapes = block_shapes(self.shapes)
        if not self.sharded:
            same = all(leaf.dtype == dtype for leaf in jax.tree.leaves(shapes))
            return identity if same else lambda block: cast(block, dtype)
        if self.zero < 3:
            return identity
        return lambda block: _gathered(cast(block, dtype, matrices(shapes)), shapes)

    @property
    def scatter(self) -> BlockTransform:
        """Function that reduce-scatters a micro-batch's gradients of one block; the identity below stage 2."""
        if not self._early:
            return identity
        return lambda grads: self._scattered(grads, jax.tree.map(lambda _: False, grads))

    def scatter_ends(self, grads: Params) -> Params:
        """Reduce-scatters a micro-batch's gradients of all but the blocks, whose own `scatter` has reduce-scattered."""
        if not self._early:
            return grads
        ends = grads._replace(blocks=())
        return self._scattered(ends, stacked_marks(ends))._replace(blocks=grads.blocks)

    def reduce(self, grads: Params) -> Params:
        """Sums a step's gradients over the devices, once: an all-reduce at stage 0, a reduce-scatter at stage 1.

        At stages 2 and 3 each micro-batch has done so already, and they stay as they are.
        """
        if self.devices == 1 or self._early:
            return grads
        return self._scattered(grads, stacked_marks(grads)) if self.zero else lax.psum(grads, AXIS)

    @property
    def _early(self) -> bool:
        """Returns whether gradients are summed over the devices in each micro-batch, so that none keeps all of them."""
        return self.sharded and self.zero >= 2

    def _scattered(self, grads: Tree, stacked: Tree) -> Tree:
        return jax.tree.map(
            lambda array: lax.psum_scatter(array, AXIS, scatter_dimension=array.ndim - 1, tiled=True),
            self._split(grads, stacked),
        )


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, PartitionSpec)


def _filled_up(array: Array, kept: int, devices: int) -> Array:
    """Flattens all but the first `kept` axes, and pads with zeros to a multiple of the number of devices."""
    flat = array.reshape(*array.shape[:kept], -1)
    return jnp.pad(flat, [(0, 0)] * kept + [(0, -flat.shape[-1] % devices)])


def _joined(flat: Array, shape: jax.ShapeDtypeStruct) -> Array:
    """The inverse of `_filled_up`."""
    size = math.prod(shape.shape[flat.ndim - 1 :])
    return flat[..., :size].reshape(shape.shape)


def _gathered(pieces: Tree, shapes: Tree) -> Tree:
    """All-gathers shards into whole tensors of these shapes."""

    def one(piece: Array, shape: jax.ShapeDtypeStruct) -> Array:
        return _joined(lax.all_gather(piece, AXIS, axis=piece.ndim - 1, tiled=True), shape)

    return jax.tree.map(one, pieces, shapes)


def first_axis_that_divides(shape: jax.ShapeDtypeStruct, mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a whole tensor along its first axis that divides; replicated where none does."""
    for axis, size in enumerate(shape.shape):
        if size % mesh.size == 0:
            return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))
    return NamedSharding(mesh, PartitionSpec())


def summed(function: Callable[[Any], Any], batch: Any, devices: int) -> Any:
    """Sums `function` over the virtual shards of all devices, of this device's batch, whose arrays are (A, B, ...).

    Gradients have then the same bits on 1, 2, 4 and 8 devices. Floating-point sums depend on their order, and XLA's on
    the shapes of what it sums. So every micro-batch is cut in 8 virtual shards of the same size, whatever the number of
    devices D, and each device computes the gradients of its 8/D one after another. They are added in pairs, as in a
    tournament: inside of a device first, and then between devices whose numbers differ in one bit, each adding what the
    other has:

        ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7))

    On the way between devices a sum is all of the gradients, log2 D times, where an all-reduce sends twice the
    gradients.

    B divides by this device's number of shards, and the number of devices divides 8.
    """

    def shards(array: Any) -> Any:
        A, B, *rest = array.shape
        count = SHARDS // devices
        return jnp.moveaxis(array.reshape(A, count, B // count, *rest), 1, 0)

    total = _tree(function, jax.tree.map(shards, batch))
    distance = 1
    while distance < devices:
        pairs = [(device, device ^ distance) for device in range(devices)]
        total = jax.tree.map(lambda mine, pairs=pairs: mine + lax.ppermute(mine, AXIS, pairs), total)
        distance *= 2
    return total


def _tree(function: Callable[[Any], Any], shards: Any) -> Any:
    """Loops in loops, of two turns each, so that it is compiled once and keeps two sums at each height of the tree."""
    count = len(jax.tree.leaves(shards)[0])
    if count == 1:
        return function(jax.tree.map(lambda array: array[0], shards))
    halves = jax.tree.map(lambda array: array.reshape(2, count // 2, *array.shape[1:]), shards)
    sums = lax.map(lambda half: _tree(function, half), halves)
    return jax.tree.map(lambda pair: pair[0] + pair[1], sums)
