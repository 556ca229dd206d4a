"""A block's tensors as the matrices that Muon orthogonalises: one for each layer, each expert, and each part.

Parts lie side by side in one tensor: queries, keys and values, or a gate and its up projection. Each is a matrix by
itself, since as one they would share their singular values.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgpt.optimizers import newton_schulz

RMS = 0.2  # of AdamW's direction (Liu et al. 2025, arXiv:2502.16982, section 2.2)


@dataclass(frozen=True)
class Matrices:
    """A tensor as matrices; a leaf of a tree like the parameters, which has None for what AdamW updates."""

    layers: int  # on the tensor's first axis; 0 where each layer has its own tensor
    shape: tuple[int, ...]  # of one layer's tensor: (M, N), or (E, M, N) of E experts
    columns: tuple[int, ...]  # N of each matrix that lies in it side by side; together its last axis

    @property
    def rows(self) -> int:
        """Returns the number of layers in the tensor."""
        return max(self.layers, 1)

    @property
    def numbers(self) -> int:
        """Returns the size of one layer's tensor."""
        return math.prod(self.shape)

    @property
    def each(self) -> list[tuple[int, int]]:
        """Returns M and N of each matrix of one layer."""
        experts = math.prod(self.shape[:-2])
        return [(self.shape[-2], columns) for columns in self.columns for _ in range(experts)]

    def split(self, tensors: Float[Array, "S _"]) -> list[Float[Array, "_ _ _"]]:
        """Returns the matrices of tensors that are a row each, part by part; those higher than wide are transposed.

        A row may be filled up at its end.
        """
        laid_out = tensors[:, : self.numbers].reshape(-1, *self.shape)
        ends = list(itertools.accumulate(self.columns))[:-1]
        parts = [part.reshape(-1, *part.shape[-2:]) for part in jnp.split(laid_out, ends, axis=-1)]
        return [_lying(part) for part in parts]

    def join(self, parts: list[Float[Array, "_ _ _"]], length: int) -> Float[Array, "S {length}"]:
        """The inverse of `split`, with rows that zeros fill up to a length."""
        M = self.shape[-2]
        upright = [
            part if part.shape[1:] == (M, columns) else part.mT
            for part, columns in zip(parts, self.columns, strict=True)
        ]
        shaped = [part.reshape(-1, *self.shape[:-1], part.shape[-1]) for part in upright]
        rows = jnp.concatenate(shaped, axis=-1).reshape(-1, self.numbers)
        return jnp.pad(rows, ((0, 0), (0, length - self.numbers)))


def _lying(matrices: Float[Array, "S M N"]) -> Float[Array, "S _ _"]:
    return matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT


def directions(tensors: dict[Matrices, Float[Array, "_ _"]]) -> dict[Matrices, Float[Array, "_ _"]]:
    """Returns for tensors of each kind, a row each, their matrices orthogonalised and as long as AdamW's direction.

    Matrices of one size are multiplied together, whatever tensor they are from.
    """
    parts = {kind: kind.split(rows) for kind, rows in tensors.items()}
    sizes: dict[tuple[int, ...], list[tuple[Matrices, int]]] = {}
    for kind, pieces in parts.items():
        for place, piece in enumerate(pieces):
            sizes.setdefault(piece.shape[1:], []).append((kind, place))
    for (_, N), where in sizes.items():
        of_size = [parts[kind][place] for kind, place in where]
        found = RMS * math.sqrt(N) * newton_schulz.orthogonalise(jnp.concatenate(of_size))
        ends = list(itertools.accumulate(len(piece) for piece in of_size))[:-1]
        for (kind, place), piece in zip(where, jnp.split(found, ends), strict=True):
            parts[kind][place] = piece
    return {kind: kind.join(parts[kind], rows.shape[1]) for kind, rows in tensors.items()}


def owned(tree: Any, devices: int) -> dict[Matrices, int]:
    """Counts the tensors of each kind in a tree of `Matrices` and None that a device orthogonalises, layer by layer.

    Where the count doesn't divide by the number of devices some have tensors of zeros among theirs.
    """
    counts: dict[Matrices, int] = {}
    for kind in jax.tree.leaves(tree):
        counts[kind] = counts.get(kind, 0) + kind.rows
    return {kind: -(-count // devices) for kind, count in counts.items()}


def operations(tree: Any, devices: int = 1) -> int:
    """Counts the operations of a step with which a device orthogonalises its share of a tree's matrices."""
    each = {kind: sum(newton_schulz.operations(*size) for size in kind.each) for kind in jax.tree.leaves(tree)}
    return sum(count * each[kind] for kind, count in owned(tree, devices).items())
