"""The specification of a measurement that a peer is given, and the peer's answer.

    python -m benchmarks.peers.ours --spec spec.json

A peer makes the model with the weights it is given, takes WARM_UP untimed and then `steps` timed optimizer steps on one
batch, and prints one JSON object as its last line. JAX isn't imported here, because a PyTorch peer's memory is measured
too.
"""

import argparse
import json
import resource
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxgpt.options.config import Compute, Model, Optimizer

STEP = "measured step"
WARM_UP = 2  # steps before the timed ones; the first is the one whose loss and gradient norm are reported


@dataclass(frozen=True)
class Spec:
    model: Model
    batch: int
    sequence: int
    dtype: str  # of the computation: float32 or bfloat16; masters and moments are float32 always
    steps: int
    weights: str  # an .npz file: the parameters by name ("blocks.qkv.weight"), and tokens and targets, int32 (B, T)
    optimizer: Optimizer
    compute: Compute  # how this project's model is computed; the others have no such options
    compile: bool = False  # PyTorch: whether torch.compile is used

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))


def read() -> Spec:
    """Returns the spec named on the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--spec", type=Path, required=True)
    return from_file(parser.parse_args().spec)


def from_file(path: Path) -> Spec:
    """Returns the spec that `write` wrote, with the computation's dtype among the options of compute."""
    fields = json.loads(path.read_text())
    fields["compute"]["dtype"] = fields["dtype"]
    kinds = {"model": Model, "optimizer": Optimizer, "compute": Compute}
    return Spec(**fields | {name: _options(kind, fields[name]) for name, kind in kinds.items()})


def _options(kind: Any, fields: dict[str, Any]) -> Any:
    """Returns options from JSON, which has lists in the place of tuples; a jitted function's must be hashable."""
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()})


def progress(seconds: list[float]) -> None:
    """Tell of the last of these steps, on stderr: all that is known of a peer that is stopped before it answers."""
    print(f"{STEP} {len(seconds)}: {seconds[-1]:.3f} s", file=sys.stderr, flush=True)


def report(
    spec: Spec,
    who: str,
    *,
    seconds: list[float],
    loss: float,
    grad_norm: float,
    compile_seconds: float,
    peak_bytes: int,
    temp_bytes: int | None = None,
    device: str,
    peak_flops: float | None = None,
    note: str = "",
) -> None:
    """Print the answer. `seconds` are the timed steps'; `peak_flops` is the device's peak at this dtype, if known; the
    note is a line for the reader."""
    median = statistics.median(seconds)
    answer = {
        "who": who,
        "dtype": spec.dtype,
        "batch": spec.batch,
        "sequence": spec.sequence,
        "step_seconds": median,
        "tokens_per_second": spec.batch * spec.sequence / median,
        "temp_bytes": temp_bytes,
        "peak_bytes": peak_bytes,
        "compile_seconds": compile_seconds,
        "loss": loss,
        "grad_norm": grad_norm,
        "device": device,
        "peak_flops": peak_flops,
        "note": note,
    }
    print(json.dumps(answer), flush=True)


def peak_resident_bytes() -> int:
    """Returns the most memory that this process has had, in bytes.

    Linux's own figure, because getrusage's there starts from what the process that started this one had.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
