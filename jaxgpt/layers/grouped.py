"""Products of rows that are sorted by group, each group with a matrix of its own.

    multiply    y_r = x_r w[g(r)]                     (M, C) and (G, C, F) to (M, F), or (M, F) to (M, C) by wᵀ
    gradient    ∂w[g] = Σ_{r in g} x_rᵀ ∂y_r          (M, C) and (M, F) to (G, C, F)

`sizes` has each group's number of rows, M together. A group may be empty: its ∂w is 0.

XLA has such products (`lax.ragged_dot`), for a GPU as they should be. For a CPU it multiplies every row by every
group's matrix. So a CPU takes each group's rows in blocks, large ones as long as they are full and small ones for the
rest, and skips the blocks that the group doesn't reach.
"""

import functools
from collections.abc import Iterator

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxgpt.layers.numerics import accumulation_dtype, product, product_over_tokens

LARGE, SMALL = 256, 64  # rows of a CPU's blocks; the small size divides the large one
ROOM = 1.125  # rows of each group that a CPU's gradient takes in one product, as a multiple of the mean size


def multiply(
    x: Float[Array, "M _"], w: Float[Array, "G C F"], sizes: Int[Array, " G"], *, transposed: bool = False
) -> Float[Array, "M _"]:
    """Returns each row times its group's matrix, or with `transposed` times its transpose, in the dtype of x."""

    def ragged(x: Array, w: Array, sizes: Array) -> Array:
        dimensions = lax.RaggedDotDimensionNumbers((((1,), (2 if transposed else 1,)), ((), ())), [0], [0])
        return lax.ragged_dot_general(x, w, sizes, dimensions, preferred_element_type=x.dtype)

    on_cpu = _multiply_row_by_row if x.shape[0] < w.shape[0] else _multiply_in_blocks
    on_cpu = functools.partial(on_cpu, "f,cf->c" if transposed else "c,cf->f")
    return lax.platform_dependent(x, w, sizes, cpu=on_cpu, default=ragged)


def gradient(x: Float[Array, "M C"], dy: Float[Array, "M F"], sizes: Int[Array, " G"]) -> Float[Array, "G C F"]:
    """Returns the gradient by the groups' matrices, in the accumulation dtype."""

    def ragged(x: Array, dy: Array, sizes: Array) -> Array:
        dimensions = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
        return lax.ragged_dot_general(x, dy, sizes, dimensions, preferred_element_type=accumulation_dtype(x.dtype))

    return lax.platform_dependent(x, dy, sizes, cpu=_gradient_with_room, default=ragged)


def _multiply_row_by_row(equation: str, x: Float[Array, "M _"], w: Float[Array, "G C F"], sizes: Int[Array, " G"]):
    """For fewer rows than groups: takes only the matrices that are used."""
    groups = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(x.shape[0]), side="right")
    return lax.map(lambda row: product(equation, row[0], w[row[1]], dtype=x.dtype), (x, groups))


def _multiply_in_blocks(equation: str, x: Float[Array, "M _"], w: Float[Array, "G C F"], sizes: Int[Array, " G"]):
    """A block that reaches beyond its group's rows leaves the others' results as they are.

    Loops have fixed lengths and skip turns, so that the gradient check can differentiate through them.
    """
    rows, ends = x.shape[0], jnp.cumsum(sizes)
    equation = "->".join(f"r{operands}" for operands in equation.split("->"))

    def one_group(y: Array, group: tuple[Array, Array, Array]) -> tuple[Array, None]:
        matrix, first, end = group

        def one_block(size: int, y: Array, place: Array) -> Array:
            block, mine = _rows(x, place, first, end, size)
            result = product(equation, block, matrix, dtype=x.dtype)
            before, _ = _rows(y, place, first, end, size)
            result = jnp.where(mine, result, before)
            return lax.dynamic_update_slice_in_dim(y, result, jnp.minimum(place, rows - size), 0)

        for size, places, used in _blocks(rows, first, end):

            def turn(y: Array, block: tuple[Array, Array], size: int = size) -> tuple[Array, None]:
                place, used = block
                return lax.cond(used, functools.partial(one_block, size), lambda y, _: y, y, place), None

            y, _ = lax.scan(turn, y, (places, used))
        return y, None

    width = w.shape[2 if equation.endswith("f") else 1]
    return lax.scan(one_group, jnp.zeros((rows, width), x.dtype), (w, ends - sizes, ends))[0]


def _blocks(rows: int, first: Array, end: Array) -> Iterator[tuple[int, Int[Array, " n"], Bool[Array, " n"]]]:
    """Yields for both sizes of blocks where those of a group begin, and which of them it needs, of the most it can."""
    size, most = min(SMALL, rows), -(-rows // SMALL)
    if rows >= LARGE:
        places = first + LARGE * jnp.arange(rows // LARGE)
        yield LARGE, places, places + LARGE <= end
        first, most = first + (end - first) // LARGE * LARGE, LARGE // SMALL
    places = first + size * jnp.arange(most)
    yield size, places, places < end


def _rows(array: Float[Array, "M _"], place: Array, first: Array, end: Array, size: int):
    """Returns `size` rows that begin at `place`, or earlier where they would reach beyond the last; and whether each
    is between `first` and `end`."""
    place = jnp.minimum(place, array.shape[0] - size)
    numbers = place + jnp.arange(size)[:, None]
    return lax.dynamic_slice_in_dim(array, place, size), (first <= numbers) & (numbers < end)


def _gradient_with_room(x: Float[Array, "M C"], dy: Float[Array, "M F"], sizes: Int[Array, " G"]):
    """For each group one product of as many rows as there is room for, and one more for each small block beyond."""
    rows, ends = x.shape[0], jnp.cumsum(sizes)
    size = min(SMALL, rows)
    room = min(rows, -(-int(ROOM * rows) // (sizes.shape[0] * size)) * size)

    def one_group(group: tuple[Array, Array]) -> Array:
        first, end = group

        def one_block(place: Array, size: int) -> Array:
            x_block, mine = _rows(x, place, place, end, size)
            dy_block, _ = _rows(dy, place, place, end, size)
            return product_over_tokens("nc,nf->cf", jnp.where(mine, x_block, 0), dy_block)

        def further(number: Array | int, dw: Array) -> Array:
            return dw + one_block(first + room + number * size, size)

        return lax.fori_loop(0, (end - first - room + size - 1) // size, further, one_block(first, room))

    return lax.map(one_group, (ends - sizes, ends))
