"""Words of `compute.fit`: its choice with what was tried, or what the least would need and what would help."""

from collections.abc import Iterator, Mapping

from jaxgpt.errors import UserError
from jaxgpt.options import fit
from jaxgpt.options.config import Config
from jaxgpt.options.settings import changed
from jaxgpt.training.candidates import Candidate, Place, candidates, open_options
from jaxgpt.training.device_memory import Capacity

ROWS = 6  # of the table, about
RANK = 16  # of the adapters that a message names


def said(
    config: Config,
    place: Place,
    found: list[Candidate],
    best: Candidate,
    compiled: Mapping[Candidate, int],
    has: Capacity,
) -> list[str]:
    """Returns what was chosen and why: the candidates in their order up to the chosen one, with what they need.

    Args:
        config: The configuration that was asked for.
        place: The devices.
        found: All candidates, the fastest first.
        best: The one that was chosen.
        compiled: Bytes that the compiled ones need.
        has: What there is.
    """
    up_to = found[: found.index(best) + 1]
    measured = [one for one in up_to if one in compiled or one == best]
    chosen = dict.fromkeys([*up_to[: max(1, ROWS - len(measured))], *measured])
    shown = [one for one in up_to if one in chosen]
    width = max(len(describe(one.config)) for one in shown)
    rows = [f"          {describe(one.config):<{width}}  {_verdict(one, best, compiled)}" for one in shown]
    if left_out := len(up_to) - len(shown):
        rows.insert(len(rows) - 1, f"          and {left_out:,} more that are too large")
    limit = "" if has.bytes is None else f" in {gigabytes(has.bytes)}, {has.source}"
    return [f"fit       the fastest that fits{limit}:", *rows, f"          {_free(config, place)}"]


def refused(config: Config, least: Config, needs: int, has: Capacity, place: Place, wrong: float) -> UserError:
    """Returns the error where nothing fits.

    Args:
        config: The configuration that was asked for.
        least: The candidate that needs least.
        needs: Bytes that it needs.
        has: What there is.
        place: The devices.
        wrong: The factor by which estimates were too small.
    """
    assert has.bytes is not None
    rows = [
        (words, size)
        for words, changed in _help(config, place.devices)
        if (size := int(wrong * min(one.bytes for one in candidates(changed, _with_devices(place, changed))))) < needs
    ]
    free = _free(config, place)
    message = (
        f"--compute.fit {config.compute.fit}: the least that this run needs on a device is {gigabytes(needs)}, with "
        f"{describe(least)}; {gigabytes(has.bytes)} is {has.source}. {free[0].upper()}{free[1:]}."
    )
    if not rows:
        return UserError(f"{message} Take a smaller model, or a larger device")
    width = max(len(words) for words, _ in rows)
    return UserError(
        "\n".join(
            [f"{message} What would help, and the least then, about:"]
            + [f"  {words:<{width}}  {gigabytes(size)}" for words, size in rows]
        )
    )


def _help(config: Config, devices: int) -> Iterator[tuple[str, Config]]:
    """Yields what would need less, which fit doesn't choose since it is another run: in words, and as options."""
    training, compute = config.training, config.compute
    if compute.fit_keeps:
        yield "leaving those away that are kept", changed(config, compute={"fit_keeps": ()})
    if devices * 2 <= training.batch_size * training.micro_batches:
        twice = changed(config, parallel={"devices": 2 * devices})
        yield f"{2 * devices} devices", changed(twice, training=fit.split(config, 2 * devices))
    if training.sequence_length > 1:
        half = training.sequence_length // 2
        yield f"--training.sequence-length {half}", changed(config, training={"sequence_length": half})
    if compute.dtype == "float32":
        yield "--compute.dtype bfloat16", changed(config, compute={"dtype": "bfloat16"})
    if compute.parameters == "float32":
        yield "--compute.parameters bfloat16", changed(config, compute={"parameters": "bfloat16"})
    if not config.lora.rank and config.training.init_from:
        yield f"--lora.rank {RANK}", changed(config, lora={"rank": RANK})


def _with_devices(place: Place, config: Config) -> Place:
    return place._replace(devices=max(place.devices, config.parallel.devices))


def _free(config: Config, place: Place) -> str:
    """Returns which options were free, and which were not."""
    free = ", ".join(name.partition(".")[2] for name in open_options(config, place))
    kept = ", ".join(f"{name} = {fit.value(config, name)}" for name in config.compute.fit_keeps)
    return f"free to choose: {free or 'nothing'}{f'; kept as given: {kept}' if kept else ''}"


def describe(config: Config) -> str:
    """Returns the choices of a configuration in words."""
    compute, parallel, training = config.compute, config.parallel, config.training
    parts = [
        f"{training.micro_batches:,} x {training.batch_size:,} sequences",
        f"recompute {compute.recompute}",
        f"chunk {compute.classifier_chunk:,}",
    ]
    if parallel.zero:
        parts.append(f"zero {parallel.zero}")
    if parallel.moments == "host":
        parts.append("moments on the host")
    return ", ".join(parts)


def _verdict(one: Candidate, best: Candidate, compiled: Mapping[Candidate, int]) -> str:
    if one in compiled:
        return f"{gigabytes(compiled[one])} compiled, {'fits' if one == best else 'too large'}"
    return f"{gigabytes(one.bytes)} estimated, {'fits' if one == best else 'too large'}"


def gigabytes(size: int) -> str:
    """Returns a size for people, in the units that `compute.fit` takes."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
