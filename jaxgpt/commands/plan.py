"""`run.py --plan-for DEVICE:COUNT`: what a run would need on devices that aren't there.

1. Complete the configuration's sizes, without its text.
2. Estimate each device's memory at each ZeRO stage and recompute level (`training/estimate.py`), and count the bytes
   that a step sends (`parallel/traffic.py`).
3. Of what fits take the one with the least time in products and network, and print it as a command to paste.

Nothing is compiled, no device is asked for anything, and nothing is written.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jaxgpt.commands import configuration, other_times
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import quoted
from jaxgpt.kernels.choose import attention_of_card
from jaxgpt.models import family
from jaxgpt.models.blocks import ELSEWHERE, MOST_UNROLLED, RECOMPUTE_LEVELS
from jaxgpt.optimizers.matrices import operations
from jaxgpt.options import fit as fit_options
from jaxgpt.options.command_line import nearest
from jaxgpt.options.config import Config
from jaxgpt.options.settings import changed
from jaxgpt.parallel.traffic import NETWORK, seconds, sent
from jaxgpt.terminal import command, say
from jaxgpt.training import candidates, fit, fit_words, flops, memory_plan
from jaxgpt.training.candidates import Place
from jaxgpt.training.device_memory import CARDS, Capacity, Card, capacity, capacity_of
from jaxgpt.training.estimate import Estimate, estimate
from jaxgpt.training.state import layout_without_devices
from jaxgpt.training.step_time import network_bytes, speeds_of

MARGIN = 1.1  # an estimate may be a tenth too small
MOST_DEVICES = 1 << 16
STAGES = (0, 1, 2, 3)
GIB = 2**30


class Target(NamedTuple):
    """Devices to plan for."""

    words: str  # as they are typed
    card: Card | None  # None for a CPU's simulated devices
    devices: int
    has: Capacity  # each of them

    def fits(self, found: Estimate) -> bool:
        return self.has.bytes is None or MARGIN * found.total <= self.has.bytes


class Candidate(NamedTuple):
    """A configuration for these devices, and what it would need."""

    config: Config
    needs: Estimate
    products: float | None  # seconds of a step's products at the device's peak
    network: float | None  # seconds of its collectives, one behind the other


def run(config: Config, devices: str, words: Sequence[str]) -> int:
    """Prints the plan; returns 0 where something fits and 1 where nothing does.

    Args:
        config: The run's configuration.
        devices: What --plan-for says.
        words: The command line without --plan-for, to be pasted.
    """
    target = _target(devices, config)
    config = _complete(config, target)
    if config.compute.fit:
        return _fit(config, target, words)
    candidates = _candidates(config, target)
    lines = [*_introduction(config, target), *_memory_table(candidates, target), *_network_table(config, target)]
    for variant in _variants(config, target):
        candidates += _candidates(variant, target) if variant != config else []
        if best := _best([one for one in candidates if target.fits(one.needs)], config):
            say("\n".join([*lines, *_recommendation(best, config, target, words)]))
            return 0
    least = min(one.needs.total for one in candidates) / GIB
    why = (
        f"{least:,.1f} GiB is the least, with parameters in bfloat16 and the smallest micro-batches. Take more devices"
    )
    say("\n".join([*lines, "", f"Nothing fits: {why}, or larger ones"]))
    return 1


def _fit(config: Config, target: Target, words: Sequence[str]) -> int:
    """Prints what `compute.fit` would choose there, by estimates alone; returns the status as `run` does."""
    has = fit.granted(target.has, config)
    speeds = speeds_of(target.card, config.compute.dtype)
    place = Place(target.devices, gpu=target.card is not None, hosts=target.card is not None, speeds=speeds)
    found = candidates.candidates(
        config, place, lambda one: other_times.elsewhere(one, target.devices, cpu=target.card is None)
    )
    fitting = [one for one in found if has.bytes is None or MARGIN * one.bytes <= has.bytes]
    if not fitting:
        least = min(found, key=lambda one: one.bytes)
        raise fit_words.refused(config, least.config, least.bytes, has, place, 1.0)
    lines = fit_words.said(config, place, found, fitting[0], {}, has)
    note = f"          estimated from shapes, with {MARGIN - 1:.0%} to spare; the run itself compiles what it chooses"
    devices = f" --parallel.devices {target.devices}" if target.devices > 1 else ""
    say("\n".join([*_introduction(config, target), *lines, note, "", f"{command(*words)}{devices}"]))
    return 0


def _target(text: str, config: Config) -> Target:
    """Returns the devices that --plan-for names. UserError for others than there are."""
    found = re.fullmatch(r"([\w.-]+)(?::([0-9]{1,5}))?", text)
    name, count = (found[1], int(found[2] or 1)) if found else (text, 0)
    names = [*CARDS, "cpu"]
    if name not in names:
        raise UserError(
            f"--plan-for {quoted(text)}: no such device{nearest(name, names)} There are: {', '.join(names)}"
        )
    if not 0 < count <= MOST_DEVICES:
        raise UserError(f"--plan-for {quoted(text)} must be DEVICE:COUNT, such as h100:8, of at most {MOST_DEVICES:,}")
    sequences, words = fit_options.undivided(config)
    if sequences % count:
        raise UserError(
            f"{words}, and must be divisible by the {count} devices of --plan-for: each takes the same number of a "
            "micro-batch's sequences"
        )
    card = CARDS.get(name)
    if card is not None:
        return Target(text, card, count, capacity_of(card, config.compute))
    has = capacity(config.compute)
    if config.compute.memory_limit_gib or has.bytes is None or count == 1:
        return Target(text, None, count, has)
    return Target(text, None, count, Capacity(has.bytes // count, f"a device's share of {has.source}"))


def _complete(config: Config, target: Target) -> Config:
    """Returns the configuration with its sizes, and with what a run on these devices would choose for them."""
    if config.model.vocabulary_size:  # the tokenizer isn't needed
        start = config.model.document_start
        start = max(start, 0) if config.data.document_mask else start
        model = dataclasses.replace(config.model, document_start=start)
        family(model).check(model)
        length = config.training.sequence_length or model.context
        config = changed(config, model=model, training={"sequence_length": length})
    else:
        config = configuration.without_text(config)
    compute, length = config.compute, config.training.sequence_length
    if target.card:
        compute = attention_of_card(config.model, compute, length, target.card.capability)
    else:
        compute = dataclasses.replace(compute, attention="blocks")
    return dataclasses.replace(config, compute=compute)


def _stages(target: Target) -> tuple[int, ...]:
    return STAGES if target.devices > 1 else (0,)


def _candidates(config: Config, target: Target) -> list[Candidate]:
    return [_candidate(config, target, zero, level) for zero in _stages(target) for level in RECOMPUTE_LEVELS]


def _candidate(config: Config, target: Target, zero: int, recompute: str) -> Candidate:
    layers = _layers(config, target, zero)
    config = changed(
        config,
        compute={"recompute": recompute, "layers": layers},
        parallel={"zero": zero, "devices": target.devices},
    )
    needs = estimate(config, target.devices, gpu=target.card is not None)
    reference = other_times.reference_of(config, memory_plan.measure(config, target.devices))
    needs = needs._replace(parts=needs.parts | {"reference of the policy": reference})
    if target.card is None:
        return Candidate(config, needs, None, None)
    model, training = config.model, config.training
    tokens = training.micro_batches * training.batch_size * training.sequence_length / target.devices
    peak = flops.known_peak(target.card.kind, config.compute.dtype)
    of_token = family(model).flops_per_token(model, training.sequence_length, recompute=recompute)
    layout = layout_without_devices(changed(config, compute={"layers": "scanned"}), target.devices)
    of_muon = operations(layout.matrices, target.devices if zero else 1)
    network = seconds(_tensors(config, target, zero), target.devices, target.card.link, NETWORK)
    return Candidate(config, needs, (tokens * of_token + of_muon) / peak if peak else None, network)


def _layers(config: Config, target: Target, zero: int) -> str:
    """Returns the form of the layers: what "auto" takes, but a loop where a GPU's program would keep all gradients."""
    if config.compute.layers != "auto":
        return config.compute.layers
    if target.card and zero >= 2:
        return "scanned"
    most = MOST_UNROLLED["gpu"] if target.card else ELSEWHERE
    return "unrolled" if config.model.layers <= most else "scanned"


def _best(fitting: list[Candidate], config: Config) -> Candidate | None:
    """Returns the one with the least time, then with the least to compute again, then of the lowest stage."""
    level = config.compute.recompute
    wished = [one for one in fitting if level in ("auto", one.config.compute.recompute)]

    def cost(one: Candidate) -> tuple[float, int, int]:
        again = RECOMPUTE_LEVELS.index(one.config.compute.recompute)
        return (one.products or 0.0) + (one.network or 0.0), again, one.config.parallel.zero

    return min(wished or fitting, key=cost, default=None)


def _variants(config: Config, target: Target) -> Iterator[Config]:
    """Yields the configuration, and ever smaller ones: micro-batches cut in halves, then parameters in bfloat16."""
    size = config.training.batch_size
    while size:
        yield (smallest := changed(config, training=fit_options.split(config, size)))
        size = size // 2 if size % (2 * target.devices) == 0 else 0
    if config.compute.parameters == "float32":
        yield changed(smallest, compute={"parameters": "bfloat16"})


def _tensors(config: Config, target: Target, zero: int) -> dict[str, int]:
    """Returns the bytes of the tensors that cross the network in a step."""
    return network_bytes(changed(config, parallel={"zero": zero}), target.devices)


# For people


def _introduction(config: Config, target: Target) -> list[str]:
    model, training = config.model, config.training
    kind = target.card.kind if target.card else "CPU"
    each, rest = divmod(training.batch_size, target.devices)
    at_once = "" if rest else f", {each:,} on each device at once"  # what fit is to split may not divide
    return [
        f"plan      for {target.devices} x {kind}, estimated from shapes: none of them is needed",
        f"model     {family(model).describe(model)}",
        f"step      {training.micro_batches:,} x {training.batch_size:,} sequences of {training.sequence_length:,} "
        f"tokens{at_once}; {config.compute.dtype}, attention by {config.compute.attention}",
    ]


def _memory_table(candidates: list[Candidate], target: Target) -> list[str]:
    has = target.has
    limit = "" if has.bytes is None else f" of {has.bytes / GIB:,.1f}, {has.source}; what is in brackets doesn't fit"
    rows = {zero: [one for one in candidates if one.config.parallel.zero == zero] for zero in _stages(target)}
    lines = [f"memory    GiB on each device{limit}", f"  {'zero':<6}" + "".join(f"{x:>13}" for x in RECOMPUTE_LEVELS)]
    for zero, row in rows.items():
        cells = (f"{one.needs.total / GIB:,.1f}" for one in row)
        marked = (cell if target.fits(one.needs) else f"({cell})" for cell, one in zip(cells, row, strict=True))
        lines.append(f"  {zero:<6}" + "".join(f"{cell:>13}" for cell in marked))
    return lines


def _network_table(config: Config, target: Target) -> list[str]:
    if target.devices == 1:
        return []
    muon = ("all-to-all",) if config.optimizer.name == "muon" else ()
    kinds = ("all-reduce", "reduce-scatter", "all-gather", *muon)
    lines = [
        "network   GB that each device sends in a step",
        f"  {'zero':<6}" + "".join(f"{kind:>16}" for kind in kinds),
    ]
    for zero in _stages(target):
        tensors = _tensors(config, target, zero)
        found = sent(tensors, target.devices)
        line = f"  {zero:<6}" + "".join(f"{found.get(kind, 0) / 1e9:>16,.2f}" for kind in kinds)
        if target.card:
            line += f"{seconds(tensors, target.devices, target.card.link, NETWORK):>12,.3f} s"
        lines.append(line)
    return lines


def _recommendation(best: Candidate, config: Config, target: Target, words: Sequence[str]) -> list[str]:
    lines = [f"fits      {best.needs.total / GIB:,.1f} GiB on each device, when it is most ({best.needs.time})"]
    lines += [f"  {name:<24}{size / GIB:>10,.2f} GiB" for name, size in best.needs.parts.items() if size]
    if best.products is not None:
        lines.append(
            f"  a step: {best.products:,.2f} s of products at the card's peak, {best.network:,.3f} s of network"
        )
    options = " ".join(_changes(best.config, config, target))
    return [*lines, "", f"{command(*words)} {options}".rstrip()]


def _changes(best: Config, config: Config, target: Target) -> Iterator[str]:
    """Yields the options to be added on the command line."""
    if target.devices > 1:
        yield f"--parallel.devices {target.devices}"
        if best.parallel.zero != config.parallel.zero:
            yield f"--parallel.zero {best.parallel.zero}"
    keys: dict[str, Any] = {"compute": ("recompute", "parameters"), "training": ("batch_size", "micro_batches")}
    for section, names in keys.items():
        for name in names:
            value = getattr(getattr(best, section), name)
            if value != getattr(getattr(config, section), name):
                yield f"--{section}.{name.replace('_', '-')} {value}"
    if config.compute.layers == "auto" and target.card and best.parallel.zero >= 2:
        yield "--compute.layers scanned"
