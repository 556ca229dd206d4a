"""Diagnosis of a wrong gradient: how far it is off, and the kind of mistake that would explain it."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

RIGHT = "right"
TOLERANCE = 1e-6  # in float64 rounding is near 1e-15, and a forgotten term seldom below 1e-3


def distance(mine: np.ndarray, truth: np.ndarray) -> float:
    """‖mine - truth‖ / ‖truth‖; of a truth of zeros ‖mine‖."""
    return float(np.linalg.norm(mine - truth) / (np.linalg.norm(truth) or 1))


def diagnose(
    mine: Any,
    truth: Any,
    sizes: Mapping[str, float] | None = None,
    mistakes: Mapping[str, Callable[[], Any]] | None = None,
    *,
    tolerance: float = TOLERANCE,
) -> str:
    """Returns `RIGHT`, or one sentence: what kind of mistake `mine` looks like, and how far it is off.

    `sizes` are the numbers by which one is easily off, by name; `mistakes` are wrong results by what was forgotten.
    """
    try:
        mine, truth = np.asarray(mine, float), np.asarray(truth, float)
    except (TypeError, ValueError):
        return f"not numbers: {type(mine).__name__}"
    if mine.shape != truth.shape:
        return _other_shape(mine, truth, tolerance)
    if not np.all(np.isfinite(mine)):
        return f"not finite in {np.sum(~np.isfinite(mine))} of {mine.size} places: a division by 0, or exp of too much?"
    off = distance(mine, truth)
    if off <= tolerance:
        return RIGHT
    for what, wrong in (mistakes or {}).items():
        if np.shape(wrong()) == mine.shape and distance(mine, np.asarray(wrong(), float)) <= tolerance:
            return f"{what} (off by {off:.1%})"
    return f"{_pattern(mine, truth, sizes or {}, tolerance)} (off by {off:.1%})"


def _other_shape(mine: np.ndarray, truth: np.ndarray, tolerance: float) -> str:
    said = f"the shape is {mine.shape}, and should be {truth.shape}"
    if mine.shape == truth.shape[::-1] and distance(mine.T, truth) <= tolerance:
        return f"transposed: {said}"
    if mine.ndim == truth.ndim and mine.size == truth.size:
        return f"{said}: axes in another order, or transposed"
    if mine.ndim > truth.ndim:
        return f"{said}: a sum over an axis is missing"
    if mine.ndim < truth.ndim:
        return f"{said}: summed over an axis too many"
    return f"{said}: summed over the wrong axis?"


def _pattern(mine: np.ndarray, truth: np.ndarray, sizes: Mapping[str, float], tolerance: float) -> str:
    """Returns what the two arrays, of one shape, say about the mistake."""
    if not np.any(mine):
        return "all zeros"
    if distance(-mine, truth) <= tolerance:
        return "the sign is turned"
    factor = float(np.vdot(mine, truth) / (np.vdot(truth, truth) or 1))
    if factor and distance(mine / factor, truth) <= tolerance:
        return _factor(factor, sizes)
    if mine.ndim == 2 and mine.shape[0] == mine.shape[1] and distance(mine.T, truth) <= tolerance:
        return "transposed"
    rest = truth - mine
    wrong = np.abs(rest) > tolerance * np.abs(truth).max()
    if wrong.mean() < 0.5:
        return f"{np.sum(~wrong)} of {wrong.size} places are right: some rows or columns are left out, or wrong"
    for axis in range(mine.ndim):
        if mine.shape[axis] > 1 and np.allclose(rest, rest.mean(axis, keepdims=True), rtol=0, atol=tolerance):
            return f"a term is missing (or too much) that is the same along axis {axis}: a mean or sum over it"
    return "a term is missing, or a factor inside of a sum"


def _factor(factor: float, sizes: Mapping[str, float]) -> str:
    if factor < 0:
        return f"the sign is turned, and {_factor(-factor, sizes)}"
    for name, size in sizes.items():
        for value, shown in [
            (size, name),
            (1 / size, f"1/{name}"),
            (size**0.5, f"√{name}"),
            (size**-0.5, f"1/√{name}"),
        ]:
            if abs(factor / value - 1) < 1e-6:
                return f"a factor too much: {shown} = {value:.4g}"
    return f"a factor of {factor:.4g} too much"
