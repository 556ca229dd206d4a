"""Messages about a run that doesn't fit its device's memory: what it needs, and what would make it fit."""

from collections.abc import Iterator

from jaxgpt.errors import UserError
from jaxgpt.models.blocks import RECOMPUTE_LEVELS
from jaxgpt.options import fit
from jaxgpt.options.config import Config
from jaxgpt.options.settings import changed
from jaxgpt.training import step
from jaxgpt.training.device_memory import Capacity
from jaxgpt.training.memory_plan import Plan, least, make
from jaxgpt.training.state import layout_of

SMALLEST_CHUNK = 128  # of the classifier: below it, its products are slow


def of_step(config: Config, plan: Plan) -> UserError:
    """Returns the error, with the options that would make it fit, each of them compiled to see that it does."""
    assert plan.capacity is not None
    needs, has = plan.total / 2**20, plan.capacity / 2**20
    head = f"the train step needs {needs:,.0f} MiB, and {has:,.0f} MiB is {plan.source}. "
    found = [fitting for kind in _changes(config, plan) if (fitting := _first_that_fits(kind, plan))]
    if not found:
        chunk = min(SMALLEST_CHUNK, config.compute.classifier_chunk)
        least_of_all = {"recompute": "block", "classifier_chunk": chunk, "dtype": "bfloat16"}
        everything = changed(config, compute=least_of_all, training=fit.split(config, layout_of(config).devices))
        found = [fitting] if (fitting := _first_that_fits([everything], plan)) else []
    if not found:
        return UserError(f"{head}No option makes this model fit: take a smaller one, or a larger device")
    width = max(len(fit.words(config, change)) for change, _ in found)
    rows = [
        f"  {fit.words(config, change):<{width}}   {total / 2**20:,.0f} MiB, {(plan.total - total) / 2**20:,.0f} less"
        for change, total in found
    ]
    return UserError(f"{head}It fits with {'any of' if len(rows) > 1 else ''}\n" + "\n".join(rows))


def _changes(config: Config, plan: Plan) -> Iterator[list[Config]]:
    """Yields changes that might make it fit, kind by kind, the cheapest in time first; of a kind the smallest first."""
    compute, training = config.compute, config.training
    after = RECOMPUTE_LEVELS[RECOMPUTE_LEVELS.index(compute.recompute) + 1 :]
    yield [changed(config, compute={"recompute": level}) for level in after if level != "block"]
    devices = layout_of(config).devices
    chunk = min(compute.classifier_chunk, training.batch_size // devices * training.sequence_length)
    yield [changed(config, compute={"classifier_chunk": size}) for size in (512, SMALLEST_CHUNK) if size < chunk]
    divisors = [
        size for size in range(training.batch_size - 1, 0, -1) if training.batch_size % size == size % devices == 0
    ]
    promising = [size for size in divisors if size <= (plan.largest_batch_size or 0)] or divisors[-1:]
    yield [changed(config, training=fit.split(config, size)) for size in promising]
    if "block" in after:
        yield [changed(config, compute={"recompute": "block"})]
    if compute.dtype != "bfloat16":
        yield [changed(config, compute={"dtype": "bfloat16"})]


def _first_that_fits(candidates: list[Config], plan: Plan) -> tuple[Config, int] | None:
    """Returns the first candidate that fits, and the bytes that its compiled program needs; None where none does."""
    assert plan.capacity is not None
    for candidate in candidates:
        if least(candidate) <= plan.capacity:
            made = make(candidate, step.compile_step(candidate), Capacity(plan.capacity, plan.source))
            if made.fits:
                return candidate, made.total
    return None
