"""Counts of a program, and how they are told."""

from dataclasses import dataclass
from typing import Any

import jax

from benchmarks.gpu_program import hlo, kernels, roofline, schedule
from benchmarks.gpu_program.cards import Card
from benchmarks.gpu_program.compile import Program
from jaxgpt.options.config import Config
from jaxgpt.terminal import say
from jaxgpt.training import flops

BOUND = "A bound from counts of operations and bytes, not a measured time: nothing here has run on a GPU."


@dataclass(frozen=True)
class Report:
    """A program and what was counted in it."""

    name: str
    temporaries: int  # bytes on each card
    arguments: int
    kernels: list[kernels.Kernel]
    kinds: list[roofline.Row]
    dearest: list[roofline.Row]
    collectives: list[schedule.Collective]
    milliseconds: float
    mfu: float  # the largest that the bound allows

    @property
    def launches(self) -> int:
        return sum(kernel.times for kernel in self.kernels)


def of(name: str, program: Program, config: Config, card: Card) -> Report:
    """Counts a compiled program."""
    launches = kernels.launches(hlo.parse(program.text))
    found = [kernel for kernel in launches if not kernel.is_wait]
    bound = roofline.total(found, card)
    tokens = config.training.batch_size * config.training.sequence_length / config.parallel.devices
    work = flops.per_token(config.model, config.training.sequence_length) * tokens
    return Report(
        name=name,
        temporaries=program.temporaries,
        arguments=program.arguments,
        kernels=found,
        kinds=roofline.by_kind(found, card),
        dearest=roofline.dearest(found, card),
        collectives=schedule.collectives(launches, card),
        milliseconds=bound,
        mfu=1e3 * work / bound / card.peak("bf16" if config.compute.dtype == "bfloat16" else "f32"),
    )


def show(reports: list[Report], config: Config, card: Card, title: str, attention: str) -> None:
    """Prints our program, the first of these, beside the others."""
    ours, *others = reports
    compute = config.compute
    say(BOUND)
    cards = f"{config.parallel.devices} x {card.name}" if config.parallel.devices > 1 else card.name
    say(f"\n{title}, {compute.dtype}, recompute {compute.recompute}, for {cards}")
    say(f"attention {attention}; jax {jax.__version__}\n")
    say(f"{'':28}{'kernels':>8}{'TFLOP':>9}{'GB':>9}{'ms':>9}{'share':>8}")
    for row in ours.kinds:
        share = "beside" if row.name == "collectives" else f"{row.milliseconds / ours.milliseconds:.1%}"
        say(_line(row) + f"{share:>8}")
    say(_line(_sum(ours)) + f"{'100.0%':>8}")
    say("\nThe dearest, those of all layers together:")
    for row in ours.dearest:
        say(f"  {row.milliseconds:6.2f} ms {row.kernels:5} x {row.name}  {row.where}")
    memory = f"temporaries {ours.temporaries / 1e9:.2f} GB, arguments {ours.arguments / 1e9:.2f} GB"
    say(f"\n{memory}; at most {ours.mfu:.1%} MFU")
    if config.parallel.devices > 1:
        _print_schedule(ours)
    for other in others:
        say(
            f"{other.name}: {other.milliseconds:.1f} ms, temporaries {other.temporaries / 1e9:.2f} GB, "
            f"{other.launches} kernels, at most {other.mfu:.1%} MFU"
        )
    if others:
        best = min(others, key=lambda report: report.milliseconds)
        say(
            f"ours to the better of them, {best.name}: {ours.milliseconds / best.milliseconds:.2f} of its "
            f"milliseconds, {ours.temporaries / best.temporaries:.2f} of its temporaries"
        )


def _sum(report: Report) -> roofline.Row:
    rows = [row for row in report.kinds if row.name != "collectives"]
    return roofline.Row(
        "",
        sum(row.kernels for row in rows),
        sum(row.operations for row in rows),
        sum(row.bytes for row in rows),
        sum(row.milliseconds for row in rows),
    )


def _line(row: roofline.Row) -> str:
    return f"{row.name:28}{row.kernels:8}{row.operations / 1e12:9.2f}{row.bytes / 1e9:9.2f}{row.milliseconds:9.2f}"


def _print_schedule(report: Report) -> None:
    say("\nCollectives in the order in which they are issued:")
    say(f"  {'':16}{'times':>6}{'MB each':>10}{'link ms':>9}{'beside ms':>11}{'products after':>16}")
    for found in report.collectives:
        say(
            f"  {found.name:16}{found.times:6}{found.bytes / 1e6:10.2f}{found.milliseconds:9.2f}{found.beside:11.2f}"
            f"{found.products_after:16}"
        )
    total = schedule.summary(report.collectives)
    say(
        f"{total.early} of {total.reductions} reductions ({total.early_bytes / 1e6:.0f} of {total.bytes / 1e6:.0f} MB) "
        f"are issued before the last product; the largest after it has {total.largest_late:,} bytes"
    )


def figures(reports: list[Report], config: Config) -> dict[str, Any]:
    """Returns what is printed, for JSON."""
    return {
        "about": BOUND,
        "dtype": config.compute.dtype,
        "recompute": config.compute.recompute,
        "zero": config.parallel.zero,
        "jax": jax.__version__,
        "programs": {report.name: _program(report) for report in reports},
    }


def _program(report: Report) -> dict[str, Any]:
    return {
        "milliseconds": report.milliseconds,
        "mfu": report.mfu,
        "kernels": report.launches,
        "temporaries": report.temporaries,
        "arguments": report.arguments,
        "kinds": [row._asdict() for row in report.kinds],
        "dearest": [row._asdict() for row in report.dearest],
        "collectives": [found._asdict() for found in report.collectives],
        "reductions": schedule.summary(report.collectives)._asdict(),
    }
