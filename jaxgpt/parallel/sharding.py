"""Who has what, and what crosses the network: ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054).

D devices each take their part of every micro-batch's sequences. What each of them has of the P parameters:

    zero    masters, moments    gradients        parameters the activations meet
    0       P                   P                P
    1       P/D                 P                P
    2       P/D                 P/D              P
    3       P/D                 P/D              P/D, and one layer's at a time

From stage 1 on a tensor is kept as pieces: flattened, filled up with zeros to a multiple of D, and cut in D (of stacked
layers, each layer by itself). So a tensor of any shape is divided, and AdamW, which looks at one number at a time, runs
on the pieces as they are. A filling zero has the gradient 0 and stays 0.

A sum of gradients over the devices is `psum` where everyone needs all of it, and `psum_scatter` where everyone needs a
piece. The other functions here say when it is taken; on one device all of them do nothing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Key

from jaxgpt.models.blocks import BlockTransform, Params, block_shapes, identity, stacked_marks
from jaxgpt.parallel.mesh import AXIS

Tree = Any


@dataclass(frozen=True)
class Layout:
    """How the parameters lie on the devices. Of one device all is whole, whatever the stage."""

    mesh: Mesh
    zero: int
    shapes: Params  # of the whole parameters
    reproducible: bool

    @property
    def devices(self) -> int:
        return self.mesh.size

    @property
    def in_pieces(self) -> bool:
        """Whether masters and moments are."""
        return self.zero >= 1 and self.devices > 1

    # Of what each process has

    @property
    def own_devices(self) -> list[int]:
        """The places in the mesh of this process's devices."""
        devices = self.mesh.devices.flat
        return [place for place, device in enumerate(devices) if device.process_index == jax.process_index()]

    def own_rows(self, sequences: int) -> list[int]:
        """Which of a micro-batch's sequences this process's devices compute with, and so those that it reads."""
        each = sequences // self.devices
        return [device * each + row for device in self.own_devices for row in range(each)]

    def from_processes(self, own: Tree, spec: PartitionSpec) -> Tree:
        """Arrays of all processes, divided among the devices as `spec` says, from this one's part; alone, as it is."""
        if jax.process_count() == 1:
            return own
        sharding = NamedSharding(self.mesh, spec)
        return jax.tree.map(lambda array: jax.make_array_from_process_local_data(sharding, array), own)

    # Of whole arrays, outside of the step

    def specs(self) -> Params:
        """Which axis of the parameters, or of a moment, is divided among the devices."""

        def one(shape: jax.ShapeDtypeStruct, stacked: bool) -> PartitionSpec:
            return PartitionSpec(*[None] * stacked, AXIS) if self.in_pieces else PartitionSpec()

        return jax.tree.map(one, self.shapes, stacked_marks(self.shapes))

    def shardings(self, specs: Tree) -> Tree:
        """For jit; None, which is as it comes, on one device."""
        return None if self.devices == 1 else jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs)

    def jit(self, function: Callable, *, in_specs: Tree, out_specs: Tree, **options: Any) -> Callable:
        """The function jitted, which every device runs on what the specs give it of the arguments."""
        if self.devices == 1:
            return jax.jit(function, **options)
        # check_vma would want layers to say which of their arrays differ between devices.
        run = jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        return jax.jit(run, in_shardings=self.shardings(in_specs), out_shardings=self.shardings(out_specs), **options)

    def pieces(self, whole: Params) -> Params:
        """All devices' pieces of the parameters, or of a moment; itself where it isn't kept in pieces."""
        return self._split(whole, stacked_marks(whole)) if self.in_pieces else whole

    def whole(self, pieces: Params) -> Params:
        """The inverse of `pieces`."""
        return jax.tree.map(_joined, pieces, self.shapes) if self.in_pieces else pieces

    def _split(self, whole: Tree, stacked: Tree) -> Tree:
        return jax.tree.map(lambda array, stacked: _filled_up(array, int(stacked), self.devices), whole, stacked)

    # Of one device's arrays, inside of the step

    def total(self, value: Array) -> Array:
        """The sum of all devices' values."""
        return lax.psum(value, AXIS) if self.devices > 1 else value

    def total_of_pieces(self, value: Array) -> Array:
        """The sum of a value that each device has for its own pieces."""
        return self.total(value) if self.in_pieces else value

    def own_key(self, key: Key[Array, ""]) -> Key[Array, ""]:
        """For the rounding of what this device updates: another on each, where each has its own pieces."""
        return jax.random.fold_in(key, lax.axis_index(AXIS)) if self.in_pieces else key

    def working(self, params: Params) -> Params:
        """What the model computes with: whole parameters, with stage 3 the blocks' in pieces that `gather` joins."""
        if not self.in_pieces:
            return params
        if self.zero < 3:
            return _gathered(params, self.shapes)
        ends = _gathered(params._replace(blocks=()), self.shapes._replace(blocks=()))
        return ends._replace(blocks=params.blocks)

    @property
    def gather(self) -> BlockTransform:
        """One layer's parameters from what `working` gave for it."""
        if not (self.in_pieces and self.zero >= 3):
            return identity
        shapes = block_shapes(self.shapes)
        return lambda block: _gathered(block, shapes)

    @property
    def scatter(self) -> BlockTransform:
        """What is kept of a micro-batch's gradients of one layer: from stage 2 on a piece of their sum."""
        if not self._early:
            return identity
        return lambda grads: self._scattered(grads, jax.tree.map(lambda _: False, grads))

    def scatter_ends(self, grads: Params) -> Params:
        """The same for what is in no layer; the layers have been seen to."""
        if not self._early:
            return grads
        ends = grads._replace(blocks=())
        return self._scattered(ends, stacked_marks(ends))._replace(blocks=grads.blocks)

    def reduce(self, grads: Params) -> Params:
        """The sum over devices of a step's gradients, once; what stages 2 and 3 have summed already stays."""
        if self.devices == 1 or self._early:
            return grads
        return self._scattered(grads, stacked_marks(grads)) if self.zero else lax.psum(grads, AXIS)

    @property
    def _early(self) -> bool:
        """Whether gradients are summed over the devices in each micro-batch, so that none keeps all of them."""
        return self.in_pieces and self.zero >= 2

    def _scattered(self, grads: Tree, stacked: Tree) -> Tree:
        return jax.tree.map(
            lambda array: lax.psum_scatter(array, AXIS, scatter_dimension=array.ndim - 1, tiled=True),
            self._split(grads, stacked),
        )


def _filled_up(array: Array, kept: int, devices: int) -> Array:
    """Flattened but for the first `kept` axes, with zeros behind it up to a multiple of the number of devices."""
    flat = array.reshape(*array.shape[:kept], -1)
    return jnp.pad(flat, [(0, 0)] * kept + [(0, -flat.shape[-1] % devices)])


def _joined(flat: Array, shape: jax.ShapeDtypeStruct) -> Array:
    """The inverse of `_filled_up`."""
    size = math.prod(shape.shape[flat.ndim - 1 :])
    return flat[..., :size].reshape(shape.shape)


def _gathered(pieces: Tree, shapes: Tree) -> Tree:
    def one(piece: Array, shape: jax.ShapeDtypeStruct) -> Array:
        return _joined(lax.all_gather(piece, AXIS, axis=piece.ndim - 1, tiled=True), shape)

    return jax.tree.map(one, pieces, shapes)


def first_axis_that_divides(shape: jax.ShapeDtypeStruct, mesh: Mesh) -> NamedSharding:
    """For a whole tensor between devices: divided along the first axis that can be, or else on all of them."""
    for axis, size in enumerate(shape.shape):
        if size % mesh.size == 0:
            return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))
    return NamedSharding(mesh, PartitionSpec())
