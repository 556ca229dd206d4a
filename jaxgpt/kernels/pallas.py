"""Calls of kernels that are written in Pallas for Triton.

On a CPU a kernel is interpreted, slowly, which is how it is tested. JAX has declared Pallas' way to Triton deprecated;
the versions that this project takes all have it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

STAGES = 2


def call(
    kernel: Callable,
    shapes: Sequence[Any],
    grid: tuple[int, ...],
    *,
    warps: int,
    specs: tuple[Any, Any] | None = None,
    operations: float = 0.0,
) -> Callable[..., Any]:
    """Returns a kernel as a function of arrays.

    Args:
        kernel: Function of references to the arrays, and then to the results; a partial one of a function with a name.
        shapes: Anything that has the results' shapes and dtypes.
        grid: Number of programs along each axis.
        warps: Number of warps of a program.
        specs: Block specifications of the arrays and of the results; None hands every program all of each.
        operations: Operations of its products, which the compiler can't know of.
    """
    blocks = {} if specs is None else {"in_specs": specs[0], "out_specs": specs[1]}
    metadata = {"flops": str(round(operations))} if operations else None
    name = getattr(kernel, "func", kernel).__name__.strip("_")

    def run(*arrays: Any, interpret: bool) -> Any:
        return pl.pallas_call(
            kernel,
            out_shape=[jax.ShapeDtypeStruct(shape.shape, shape.dtype) for shape in shapes],
            grid=grid,
            interpret=interpret,
            compiler_params=triton.CompilerParams(num_warps=warps, num_stages=STAGES),
            metadata=metadata,
            name=name,
            **blocks,
        )(*arrays)

    return lambda *arrays: lax.platform_dependent(
        *arrays, cpu=functools.partial(run, interpret=True), default=functools.partial(run, interpret=False)
    )
