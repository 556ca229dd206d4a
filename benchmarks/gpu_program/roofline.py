"""The roofline of a program: what its kernels take at least, from their operations and bytes.

A kernel takes no less than its operations at the card's peak, and no less than its bytes at the bandwidth of the card's
memory (Williams, Waterman and Patterson 2009, doi:10.1145/1498765.1498785). The sum over all kernels is a bound from
counts, not a measured time: no kernel reaches both, launches cost time, and arithmetic outside of products, such as
tanh, is taken to be free. Collectives run beside the rest, and are not in the sum.
"""

import collections
import functools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jaxgpt
from benchmarks.gpu_program.cards import Card
from benchmarks.gpu_program.kernels import Kernel

PACKAGE = Path(jaxgpt.__file__).parent
WRITTEN_OUT = "models/blocks.py"  # traces a layer once for all
HELPERS = ("layers/numerics.py", "kernels/pallas.py")  # called from the lines of interest


class Row(NamedTuple):
    """Kernels of one kind, or all that do the same in one place; sums over a step."""

    name: str
    kernels: int
    operations: float
    bytes: int
    milliseconds: float
    where: str = ""  # a line of our source


def milliseconds(kernel: Kernel, card: Card) -> float:
    """Returns what a kernel takes at least, all its runs in a step together."""
    if kernel.is_collective:
        return 1e3 * kernel.times * _sent(kernel) / card.link
    product = kernel.operations / card.peak(kernel.inputs[0]) if kernel.inputs else 0.0
    return 1e3 * kernel.times * max(product, kernel.bytes / card.bandwidth)


def _sent(kernel: Kernel) -> float:
    """Returns the bytes that each device sends in a collective, around a ring."""
    others = kernel.devices - 1
    if kernel.collective == "all-reduce":
        return 2 * kernel.bytes * others / kernel.devices
    return kernel.bytes * (others if kernel.collective == "all-gather" else others / kernel.devices)


def total(kernels: Iterable[Kernel], card: Card) -> float:
    """Returns the bound on a step, in milliseconds."""
    return sum(milliseconds(kernel, card) for kernel in kernels if not kernel.is_collective)


def by_kind(kernels: list[Kernel], card: Card) -> list[Row]:
    return _rows(kernels, card, lambda kernel: (kernel.kind,))


def dearest(kernels: list[Kernel], card: Card, count: int = 10) -> list[Row]:
    """Returns the kernels that take longest; those of all layers that do the same are one row."""
    return _rows(kernels, card, lambda kernel: (described(kernel), place(kernel)))[:count]


def _rows(kernels: list[Kernel], card: Card, key: Any) -> list[Row]:
    groups: dict[tuple[str, ...], list[Kernel]] = collections.defaultdict(list)
    for kernel in kernels:
        groups[key(kernel)].append(kernel)
    rows = []
    for (name, *where), members in groups.items():
        rows.append(
            Row(
                name,
                sum(kernel.times for kernel in members),
                sum(kernel.times * kernel.operations for kernel in members),
                sum(kernel.times * kernel.bytes for kernel in members),
                sum(milliseconds(kernel, card) for kernel in members),
                *where,
            )
        )
    return sorted(rows, key=lambda row: -row.milliseconds)


def described(kernel: Kernel) -> str:
    """Returns a kernel's kind and the JAX operation it ends with: "loops: gelu.backward/mul"."""
    operation = kernel.instruction.op_name.rpartition("/")[2]
    return f"{kernel.kind}: {_scope(kernel)}/{operation}".replace(": /", ": ")


def _scope(kernel: Kernel) -> str:
    """Returns the innermost of our functions that a kernel is from, as `jax.named_scope` names it, or ""."""
    scopes = kernel.instruction.op_name.split("/")[:-1]
    return next((scope for scope in reversed(scopes) if re.fullmatch(r"[a-z_]+\.[a-z_]+", scope)), "")


def place(kernel: Kernel) -> str:
    """Returns the innermost line of this project that a kernel is from: "layers/gelu.py:41".

    Of layers that are traced once and written out JAX knows no more than where that is; then it is the function's line.
    """
    ours = [(name, line) for file, line in kernel.sources if (name := _own(file))]
    name, line = next((place for place in ours if place[0] not in HELPERS), ours[0] if ours else ("", 0))
    if name in ("", WRITTEN_OUT):
        name, line = _of_scope(_scope(kernel)) or (name, line)
    return f"{name}:{line}" if name else ""


@functools.cache
def _of_scope(scope: str) -> tuple[str, int] | None:
    """Returns the file and the line where a function such as gelu.backward begins."""
    module, _, function = scope.partition(".")
    for path in sorted(PACKAGE.rglob(f"{module}.py")) if scope else ():
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if text.startswith(f"def {function}("):
                return path.relative_to(PACKAGE).as_posix(), number
    return None


@functools.cache
def _own(file: str) -> str:
    """Returns the path of a file within the package, or "" for another's; the peers' begin with benchmarks/."""
    for root in (PACKAGE, PACKAGE.parent):
        if Path(file).is_relative_to(root):
            return Path(file).relative_to(root).as_posix()
    return ""
