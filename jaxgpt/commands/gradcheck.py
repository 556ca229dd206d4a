"""`run.py gradcheck`: the shapes that are checked, and the table that is printed."""

import dataclasses
import itertools
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax

from jaxgpt import compilation_cache
from jaxgpt.commands import configuration, gradcheck_as_run
from jaxgpt.errors import RunError, UserError, reason
from jaxgpt.models import family
from jaxgpt.options import checks, command_line, settings
from jaxgpt.options.config import Compute, Model
from jaxgpt.proof import cases, gradcheck, objective_cases
from jaxgpt.reports import history
from jaxgpt.terminal import say

# Without --config: odd sizes everywhere, a vocabulary that is padded, chunks and blocks that do not divide.
SMALL_MODEL = Model(layers=2, heads=3, width=24, context=24, vocabulary_size=200, document_start=7)
SMALL_COMPUTE = Compute(classifier_chunk=13, attention_block=7)
BATCH, LENGTH = 2, 20
LONGEST = 64  # tokens in a sequence where the shapes come from a config
AS_RUN = "--as-run"
COPIES = 8  # float64 copies of the parameters at the oracle's peak of memory


@dataclass(frozen=True)
class Gradcheck:
    """Compares every hand-written gradient, layer by layer and of the whole model, with jax.grad."""

    config: str = ""
    """Take the shapes from configs/CONFIG.toml; empty checks a small model of odd sizes."""
    dtype: Literal["float64", "float32", "bfloat16"] = "float64"
    """Type in which the hand-written gradients are computed; jax.grad is always computed in float64."""
    chart: str = ""
    """Draw the errors beside their tolerances to this PNG file."""
    as_run: bool = False
    """Check the compiled step of a configuration, or of `--as-run runs/NAME`, on the device where it trains;
    it has options of its own: --as-run --help."""


def run(words: list[str]) -> int:
    """Prints a row for each tensor as it is found; returns 1 if a gradient is outside its tolerance, and else 0."""
    words = [part for word in words for part in (word.split("=", 1) if word.startswith(f"{AS_RUN}=") else [word])]
    if AS_RUN in words:
        at = words.index(AS_RUN)
        return gradcheck_as_run.run([*words[at + 1 :], *words[:at]])
    options = command_line.read(Gradcheck, words, "gradcheck")
    dtype, chart = options.dtype, Path(options.chart) if options.chart else None
    # Refuses what can't be checked, before JAX's options are set.
    model, compute, batch, length = _shapes(options.config)
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_default_matmul_precision", "highest")
    compilation_cache.use("")
    say(
        f"{family(model).parameter_count(model):,} parameters, {batch} sequences of {length} tokens, "
        f"by hand in {dtype}, jax.grad in float64, on {jax.devices()[0].platform}\n"
    )
    say(f"{'tensor':<38} {'relative error':>14} {'tolerance':>10}")
    rows: list[gradcheck.Row] = []
    shapes = model, compute, batch, length, jax.random.key(0)
    for case in itertools.chain(cases.cases(*shapes), objective_cases.cases(*shapes)):
        for row in gradcheck.check(case, dtype):
            say(
                f"{row.tensor:<38} {row.error:>14.2e} {row.tolerance:>10.1e}  {'ok' if row.passed else 'FAILED'}",
                flush=True,
            )
            rows.append(row)
    failed, total = sum(not row.passed for row in rows), len(rows)
    say(f"\n{total - failed} of {total} gradients agree with jax.grad" + (f"; {failed} FAILED" if failed else ""))
    if chart:
        try:
            draw(rows, dtype, chart)
        except (OSError, ValueError) as error:  # ValueError: a format that matplotlib hasn't got
            raise RunError(f"--chart {chart}: writing failed ({reason(error)})") from error
        say(f"chart: {chart}")
    return 1 if failed else 0


def draw(rows: list[gradcheck.Row], dtype: str, path: Path) -> None:
    """Draws each tensor's error on a logarithmic scale, with a mark at its tolerance, and writes the picture."""
    figure = history.figure(figsize=(8, 1.2 + 0.2 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(rows))
    finite = [row.error if math.isfinite(row.error) else 1e3 for row in rows]
    least = min((error for error in finite if error > 0), default=1e-17)
    shown = [max(error, least) for error in finite]  # an exact zero has no place on this scale
    axes.hlines(places, least, shown, color="0.8", linewidth=1, zorder=0)
    axes.scatter(shown, places, c=["tab:blue" if row.passed else "tab:red" for row in rows], s=22, label="error")
    axes.scatter([row.tolerance for row in rows], places, marker="|", color="0.3", s=60, label="tolerance")
    axes.set(xscale="log", xlabel=f"relative error of the hand-written gradient in {dtype}")
    axes.set_yticks(places, [row.tensor for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=110)


def _shapes(config_name: str) -> tuple[Model, Compute, int, int]:
    if not config_name:
        return SMALL_MODEL, SMALL_COMPUTE, BATCH, LENGTH
    config = settings.read(settings.find_config(config_name))
    checks.check(config)
    config = configuration.without_text(config)
    length = min(LONGEST, config.training.sequence_length)
    needed = COPIES * 8 * family(config.model).parameter_count(config.model, padded=True)
    has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > has:
        raise UserError(
            f"--config {config_name}: jax.grad in float64 would need about {needed / 2**30:.0f} GiB for a model of "
            f"this size, and this machine has {has / 2**30:.0f} GiB. Check a smaller config: the layers are the same"
        )
    # The oracle differentiates the forward: cuDNN's is a primitive, and takes no float64.
    chunk = min(config.compute.classifier_chunk, length)
    compute = dataclasses.replace(config.compute, attention="blocks", classifier_chunk=chunk)
    if compute.recompute == "auto":  # "auto" is this where there is memory enough
        compute = dataclasses.replace(compute, recompute="none")
    return config.model, compute, BATCH, length
