"""The memory that a run may have: what the device or the system has left, or what the user grants.

And the memory of cards that aren't there, for a plan.
"""

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

import jax
import psutil

from jaxgpt import environment
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import quoted
from jaxgpt.options.config import Compute
from jaxgpt.parallel import processes

CGROUPS = Path("/sys/fs/cgroup")


class Card(NamedTuple):
    """A graphics card by what a plan needs of it, from NVIDIA's data sheets."""

    kind: str  # as JAX names such a device
    capability: tuple[int, int]
    memory: int  # bytes
    bandwidth: float  # bytes a second
    link: float  # bytes a second to the other cards of its machine, one way: NVLink, or PCIe


CARDS = {
    "a100": Card("NVIDIA A100-SXM4-80GB", (8, 0), 85_095_874_560, 2.039e12, 300e9),
    "h100": Card("NVIDIA H100 80GB HBM3", (9, 0), 84_942_979_072, 3.35232e12, 450e9),
    "h200": Card("NVIDIA H200", (9, 0), 150_121_545_728, 4.8e12, 450e9),
    "b200": Card("NVIDIA B200", (10, 0), 191_503_532_032, 8.0e12, 900e9),
    "4090": Card("NVIDIA GeForce RTX 4090", (8, 9), 25_386_352_640, 1.008e12, 32e9),
}
# The share of a card's memory that JAX takes at its start, unless the environment says another.
FRACTION = 0.75
FRACTION_VARIABLES = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION")


class Capacity(NamedTuple):
    bytes: int | None  # None where it isn't known
    source: str  # what the bytes are, for messages


def capacity(compute: Compute, sharing: int = 1) -> Capacity:
    """Returns the memory that a run may have: `compute.memory_limit_gib`, or what the device or the system has left.

    That of a CPU is shared by so many of this process's simulated devices. All processes get the least of theirs, so
    that they compile the same program.
    """
    all_of_them = [Capacity(*found) for found in processes.talk.all_gather(_own_capacity(compute, sharing))]
    return min(all_of_them, key=lambda found: -1 if found.bytes is None else found.bytes)


def capacity_of(card: Card, compute: Compute) -> Capacity:
    """Returns the memory that a run may have on a card that isn't there."""
    if compute.memory_limit_gib:
        return Capacity(int(compute.memory_limit_gib * 2**30), "--compute.memory-limit-gib")
    for name in FRACTION_VARIABLES:
        if given := os.environ.get(name):
            try:
                return Capacity(int(card.memory * min(float(given), 1.0)), f"${name} of the card's memory")
            except (ValueError, OverflowError):
                raise UserError(f"${name} is {quoted(given)}, and must be a share such as 0.9") from None
    words = f"the {FRACTION:.0%} of the card that JAX takes (${FRACTION_VARIABLES[0]})"
    return Capacity(int(card.memory * FRACTION), words)


def _own_capacity(compute: Compute, sharing: int) -> Capacity:
    if compute.memory_limit_gib:
        return Capacity(int(compute.memory_limit_gib * 2**30), "--compute.memory-limit-gib")
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}  # None on a CPU
    if "bytes_limit" in stats:
        return Capacity(
            stats["bytes_limit"] - stats.get("bytes_in_use", 0), f"what JAX has of the {device.device_kind}"
        )
    if device.platform == "cpu":
        left = [*_system_left(), *_cgroups_left(CGROUPS, Path("/proc/self/cgroup"))]
        if left:
            words = "what is available to this process"
            return Capacity(min(left) // sharing, words if sharing == 1 else f"a device's share of {words}")
    return Capacity(None, f"{device.device_kind} doesn't say what it has")


def _system_left() -> list[int]:
    """Returns the bytes that the system has left, and those of the address space under a limit of the shell's."""
    with contextlib.suppress(Exception):  # of many types: where there is no /proc, or half of one
        limit, used = environment.address_space(), psutil.Process().memory_info().vms
        return [psutil.virtual_memory().available, *([] if limit is None else [max(limit - used, 0)])]
    return []


def _cgroups_left(root: Path, membership: Path) -> list[int]:
    """Returns the bytes left under each memory limit that Linux control groups set this process, of version 1 or 2.

    A limit holds for all groups below it, so those above this process's own count too. Inside a container the path that
    the kernel tells may be the host's; the root of what is mounted there is then the container's own group.
    """
    left = []
    for line in _text(membership).splitlines():
        _, _, named = line.partition(":")
        controllers, _, path = named.partition(":")
        if "memory" in controllers.split(","):
            top, limit, usage, reclaimable = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        elif not controllers:
            top, limit, usage, reclaimable = root, "memory.max", "memory.current", ""
        else:
            continue
        group = Path(os.path.normpath(f"/{path.strip('/')}")).relative_to("/")
        for folder in (group, *group.parents):
            found = _number(top / folder / limit)
            if found is not None:
                used = (_number(top / folder / usage) or 0) - _cached(top / folder, f"{reclaimable}inactive_file")
                left.append(max(found - used, 0))
    return left


def _number(path: Path) -> int | None:
    """The number in the file; None where there is no such file, or no limit in it ("max")."""
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _cached(group: Path, key: str) -> int:
    """Bytes of files that the kernel keeps for the group and gives up when memory is asked for."""
    lines = _text(group / "memory.stat").splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{key} ")), 0)


def _text(path: Path) -> str:
    """The text of one of the system's files; empty where there is no such file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
