"""The choice of how a step is computed so that it fits a device's memory: `compute.fit`, and recompute = "auto".

1. Every combination of the free options (`options/fit.py`) is a candidate, with an estimate of its memory
   (`estimate.py`) and of its time (`step_time.py`). The number of a step's sequences is the same in all.
2. The fastest whose estimate fits is compiled. What its program needs is exact, and corrects the estimates of the
   others: by as much as its own was wrong. So faster ones that now seem to fit are tried next, and where it didn't fit,
   slower ones.
3. What is taken is the fastest that was compiled and fits; the run then takes its steps with that very program. Where
   none fits, the smallest of all is compiled, and the refusal says what it needs.

All processes compile the same programs in the same order, and go by the largest of their needs.
"""

from typing import NamedTuple

import jax

from jaxgpt.options import fit as options
from jaxgpt.options.config import Config
from jaxgpt.parallel import processes
from jaxgpt.training import device_memory, fit_words, memory_plan, refusal, step
from jaxgpt.training.candidates import Candidate, ElseOf, candidates, nothing_else, place_here
from jaxgpt.training.device_memory import Capacity
from jaxgpt.training.memory_plan import Plan
from jaxgpt.training.state import layout_of

MOST_COMPILED = 5
BELOW = 0.97  # an estimate that was corrected may still be so much too large
MARGIN = 0.03  # share of a device's memory that stays free: its allocator's free memory is not in one piece
OF_A_CPU = 512 << 20  # bytes that compiling and the process itself take beside a run's arrays


class Fitted(NamedTuple):
    config: Config
    program: jax.stages.Compiled
    plan: Plan
    lines: list[str]  # what was chosen and why; none without `compute.fit`


def capacity(config: Config) -> Capacity:
    """Returns the memory that a run's arrays may take on a device: what there is, and no more than `compute.fit`.

    With `compute.fit` a margin of it stays free.
    """
    sharing = len(layout_of(config).own_devices) if jax.default_backend() == "cpu" else 1
    has = device_memory.capacity(config.compute, sharing)
    if not config.compute.fit:
        return has
    if has.bytes is not None and jax.default_backend() == "cpu":
        has = has._replace(bytes=max(0, has.bytes - OF_A_CPU // sharing))
    return granted(has, config)


def granted(has: Capacity, config: Config) -> Capacity:
    """Returns what `compute.fit` grants of what there is."""
    named = options.size(config.compute.fit)
    if named is not None and (has.bytes is None or named <= has.bytes):
        has = Capacity(named, "--compute.fit")
    if has.bytes is None:
        return has
    return Capacity(int((1 - MARGIN) * has.bytes), f"{1 - MARGIN:.0%} of {has.source}")


def prepare(config: Config, has: Capacity, elsewhere: ElseOf = nothing_else) -> Fitted:
    """Chooses what is free, compiles the train step and plans its memory.

    Args:
        config: The configuration, complete.
        has: What there is.
        elsewhere: What a run needs beside its step; only `compute.fit` asks.

    Raises:
        UserError: Nothing fits. The message says what would make it fit.
    """
    if not config.compute.fit:
        elsewhere = nothing_else
        if config.compute.recompute != "auto":
            program = step.compile_step(config)
            plan = memory_plan.make(config, program, has)
            if not plan.fits:
                raise refusal.of_step(config, plan)
            return Fitted(config, program, plan, [])
    place = place_here(config)
    found = candidates(config, place, elsewhere)
    search = _Search(found, has, elsewhere)
    best = search.run()
    if best is not None:
        program, plan = search.programs[best]
        lines = fit_words.said(config, place, found, best, search.needs, has) if config.compute.fit else []
        return Fitted(best.config, program, plan, lines)
    least = min(search.plans, key=lambda one: search.needs[one])
    if not config.compute.fit:
        raise refusal.of_step(least.config, search.plans[least])
    needs = search.needs[least]
    raise fit_words.refused(config, least.config, needs, has, place, needs / least.bytes)


class _Search:
    """Compiles candidates until the fastest that fits is known."""

    def __init__(self, found: list[Candidate], has: Capacity, elsewhere: ElseOf):
        self.candidates, self.has, self.elsewhere = found, has, elsewhere
        self.programs: dict[Candidate, tuple[jax.stages.Compiled, Plan]] = {}  # the last that fitted
        self.plans: dict[Candidate, Plan] = {}  # of what was compiled
        self.needs: dict[Candidate, int] = {}  # the same, the most of all processes
        self._wrong = 1.0  # compiled by estimated, of the last that was compiled
        self._of_level: dict[str, float] = {}  # the same, by recompute level

    def run(self) -> Candidate | None:
        """Returns the fastest candidate that fits, None where none does."""
        best, faster = None, self.candidates
        smallest = min(self.candidates, key=lambda one: one.bytes)
        while faster and len(self.needs) < MOST_COMPILED:
            following = self._following(faster)
            if following is None and (best or self.needs):
                break
            following = following or smallest  # whose need says by how much the estimates are wrong
            if self._compile(following):
                best = following
                faster = self.candidates[: self.candidates.index(best)]
        if best is None and smallest not in self.needs and self._compile(smallest):
            best = smallest
        return best

    def _following(self, candidates: list[Candidate]) -> Candidate | None:
        """Returns the fastest that seems to fit and wasn't compiled yet; else one that does if its estimate is high."""
        for share in (1.0, BELOW):
            for one in candidates:
                if one not in self.needs and self._seems_to_fit(one, share):
                    return one
        return None

    def _seems_to_fit(self, one: Candidate, share: float) -> bool:
        if self.has.bytes is None:
            return True
        corrected = share * one.bytes * self._of_level.get(one.config.compute.recompute, self._wrong)
        return max(corrected, memory_plan.least(one.config)) <= self.has.bytes

    def _compile(self, one: Candidate) -> bool:
        """Compiles a candidate and returns whether it fits."""
        program = step.compile_step(one.config)
        self.plans[one] = plan = memory_plan.make(one.config, program, self.has, self.elsewhere(one.config))
        self.needs[one] = needs = max(processes.talk.all_gather(plan.need))
        self._wrong = self._of_level[one.config.compute.recompute] = needs / one.bytes
        if self.has.bytes is not None and needs > self.has.bytes:
            return False
        self.programs = {one: (program, plan)}
        return True
