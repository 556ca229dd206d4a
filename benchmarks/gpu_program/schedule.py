"""Places at which a program issues its collectives, relative to the products of the backward pass.

The text of a compiled program is in the order in which its operations are issued. A gradient's reduction that is issued
before the last product can run beside what is left of the backward; one that is issued after it is waited for.
"""

from typing import NamedTuple

from benchmarks.gpu_program import roofline
from benchmarks.gpu_program.cards import Card
from benchmarks.gpu_program.kernels import Kernel

REDUCTIONS = ("all-reduce", "reduce-scatter")


class Collective(NamedTuple):
    name: str  # all-reduce, reduce-scatter, all-gather
    times: int  # in a step
    bytes: int  # what each device gives to one of them
    products_after: int  # products that are issued later, in a step
    milliseconds: float  # on the link, all of them together
    beside: float  # the bound on what runs between its start and the place where it is waited for, in milliseconds

    @property
    def is_reduction(self) -> bool:
        return self.name in REDUCTIONS


class Summary(NamedTuple):
    reductions: int
    early: int  # those issued before the last product
    bytes: int
    early_bytes: int
    largest_late: int  # bytes of the largest one that is issued after it


def collectives(launches: list[Kernel], card: Card) -> list[Collective]:
    """Returns the collectives in the order in which they are issued; a loop's stand where its first turn is."""
    waits = {kernel.instruction.operands[0]: place for place, kernel in enumerate(launches) if kernel.is_wait}
    after = sum(kernel.times for kernel in launches if kernel.is_product)
    found = []
    for place, kernel in enumerate(launches):
        after -= kernel.times * kernel.is_product
        if kernel.is_collective and not kernel.is_wait:
            between = launches[place : waits.get(kernel.instruction.name, place)]
            beside = roofline.total((other for other in between if not other.is_wait), card)
            took = roofline.milliseconds(kernel, card)
            found.append(Collective(kernel.collective, kernel.times, kernel.bytes, after, took, beside))
    return found


def summary(collectives: list[Collective]) -> Summary:
    """Sums up the reductions; scalars, such as the number of targets and the loss, are left out."""
    reductions = [collective for collective in collectives if collective.is_reduction and collective.bytes > 64]
    early = [collective for collective in reductions if collective.products_after]
    late = [collective for collective in reductions if not collective.products_after]
    return Summary(
        sum(collective.times for collective in reductions),
        sum(collective.times for collective in early),
        sum(collective.times * collective.bytes for collective in reductions),
        sum(collective.times * collective.bytes for collective in early),
        max((collective.bytes for collective in late), default=0),
    )
