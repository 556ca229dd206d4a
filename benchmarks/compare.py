"""Speed and memory of a whole train step beside others', on the same weights and tokens.

Each implementation runs in a process of its own, by turns: in every round each runs once, so that a machine that gets
slower or faster does so for all. After the first round the losses and gradient norms are compared; what doesn't compute
the same thing isn't measured further.
"""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks import machine
from benchmarks.peers.spec import STEP, Spec
from jaxgpt.errors import RunError
from jaxgpt.options.config import Compute, Model, Optimizer
from jaxgpt.training import flops

ROOT = Path(__file__).resolve().parent.parent
MODULES = {"ours": "ours", "jax.grad": "jax_grad", "torch": "torch_peer", "torch.compile": "torch_peer"}
COLOURS = {"ours": "#1b6ca8", "jax.grad": "#e09f3e", "torch": "#9aa0a6", "torch.compile": "#5f6368"}
OPTIMIZER = Optimizer(schedule="constant")
# Largest relative difference of loss and gradient norm. A GPU multiplies float32 matrices as TF32, of 10 bits.
LIMITS = {"float32": 1e-4, "bfloat16": 2e-2}
GPU_LIMITS = {"float32": 2e-3, "bfloat16": 2e-2}
KEYS = (
    "who", "dtype", "batch", "sequence", "step_seconds", "tokens_per_second",
    "temp_bytes", "peak_bytes", "compile_seconds", "loss", "grad_norm",
)  # fmt: skip

Result = dict  # a peer's answer, see peers/spec.py


def compare(
    model: Model,
    *,
    sizes: list[tuple[int, int]],
    dtypes: list[str],
    steps: int,
    rounds: int,
    minutes: float,
    who: list[str],
    compute: Compute,
    output: Path | None,
    chart: Path,
) -> int:
    """Measure `who` for each dtype and each (B, T) of `sizes`: print tables, draw `chart`, write JSON to `output`.

    `steps` are timed in each of `rounds` processes, after untimed ones, and a process that takes more than so many
    `minutes` is stopped. Returns 1 where implementations disagree or one failed, and 0 otherwise. RunError where this
    project's own step fails.
    """
    who = available(who)
    for path in (output, chart):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
    results, passed = [], True
    with tempfile.TemporaryDirectory(prefix="jaxgpt-bench-") as folder:
        for batch, sequence in sizes:
            weights = Path(folder) / "weights.npz"
            spec = Spec(model, batch, sequence, "float32", steps, str(weights), OPTIMIZER, compute)
            start("weights", spec, Path(folder), minutes)
            for dtype in dtypes:
                measured, agreed = measure(replace(spec, dtype=dtype), who, rounds, Path(folder), minutes)
                passed &= agreed
                results += measured
                if measured:
                    print(table(model, measured), flush=True)
    if not results:
        raise RunError("none of the implementations ran; what each said is above")
    draw(results, model, chart)
    print(f"chart: {chart}")
    if output:
        output.write_text(json.dumps([{key: result[key] for key in KEYS} for result in results], indent=2) + "\n")
        print(f"figures: {output}")
    return 0 if passed else 1


def available(who: list[str]) -> list[str]:
    """Returns those whose packages are installed, and says what installs the others."""
    missing = [package for package in ("torch", "transformers") if importlib.util.find_spec(package) is None]
    if not missing:
        return who
    for name in who:
        if MODULES[name] == "torch_peer":
            print(f"{name} is left out: it needs {' and '.join(missing)}; pip install -e .[parity] (or: make bench)")
    return [name for name in who if MODULES[name] != "torch_peer"]


def measure(spec: Spec, who: list[str], rounds: int, folder: Path, minutes: float) -> tuple[list[Result], bool]:
    """Returns one result for each implementation, over all rounds, and whether all ran and agreed."""
    runs: dict[str, list[Result]] = {name: [] for name in who}
    complete = True
    for number in range(rounds):
        for name in list(runs):
            print(f"{spec.dtype} B={spec.batch} T={spec.sequence}, round {number + 1} of {rounds}: {name}", flush=True)
            try:
                answer = start(MODULES[name], replace(spec, compile=name == "torch.compile"), folder, minutes)
            except RunError as error:
                if name == "ours":
                    raise
                print(f"{name} is left out: {error}")
                complete = False
                del runs[name]
                continue
            runs[name].append(json.loads(answer.splitlines()[-1]))
            if number == 0 and runs[name][0]["note"]:
                print(f"{name}: {runs[name][0]['note']}", flush=True)
        if number == 0 and runs and not agree([first for (first,) in runs.values()]):
            return [first for (first,) in runs.values()], False
    return [combine(answers) for answers in runs.values()], complete


def start(module: str, spec: Spec, folder: Path, minutes: float) -> str:
    """Starts a program of `peers` and returns what it printed.

    RunError with its last words where it fails, and with what it had measured where it takes more than `minutes`.
    """
    path = folder / "spec.json"
    spec.write(path)
    command = [sys.executable, "-m", f"benchmarks.peers.{module}", "--spec", str(path)]
    # What torch.compile has compiled once is used again in later rounds of this benchmark, but not of an earlier one.
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder / "torch"), "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60 * minutes, check=False
        )
    except subprocess.TimeoutExpired as stopped:
        lines = (stopped.stderr or b"").decode(errors="replace").splitlines()  # bytes, whatever was asked for
        steps = [line for line in lines if line.startswith(STEP)]
        had = f"its last {steps[-1]}" if steps else "no step was done"
        raise RunError(f"stopped after {minutes:g} minutes (--minutes), {had}") from None
    if done.returncode:
        words = done.stderr.strip().splitlines()
        killed = "killed by the system, which may be out of memory" if done.returncode < 0 else "no message"
        raise RunError(f"{module} failed: {words[-1] if words else killed}")
    return done.stdout


def agree(results: list[Result]) -> bool:
    """Returns whether losses and gradient norms equal the first's, within the dtype's limit, and says so."""
    reference = results[0]
    limit = (LIMITS if reference["device"] == "cpu" else GPU_LIMITS)[reference["dtype"]]
    agreed = True
    for result in results[1:]:
        for key in ("loss", "grad_norm"):
            difference = abs(result[key] - reference[key]) / abs(reference[key])
            if not difference <= limit:  # NaN fails too
                agreed = False
                print(
                    f"DISAGREEMENT: {key} of {result['who']} is {result[key]:.6g}, of {reference['who']} "
                    f"{reference[key]:.6g}: {difference:.1e} apart, and {limit:g} is allowed"
                )
    if agreed and len(results) > 1:
        print(
            f"all agree within {limit:g}: loss {reference['loss']:.5f}, gradient norm {reference['grad_norm']:.5f}",
            flush=True,
        )
    return agreed


def combine(answers: list[Result]) -> Result:
    """Returns the median time and compile time over the rounds, and the largest memory.

    torch.compile's first round, which compiles everything, is the one whose compile time counts.
    """
    first = answers[0]
    seconds = statistics.median(answer["step_seconds"] for answer in answers)
    return first | {
        "step_seconds": seconds,
        "tokens_per_second": first["batch"] * first["sequence"] / seconds,
        "compile_seconds": max(answer["compile_seconds"] for answer in answers),
        "peak_bytes": max(answer["peak_bytes"] for answer in answers),
    }


def table(model: Model, results: list[Result]) -> str:
    """Returns one line for each implementation, with the ratio of its time to ours: above 1, ours is faster."""
    ours = next((result["step_seconds"] for result in results if result["who"] == "ours"), None)
    peak = next((result["peak_flops"] for result in results if result["peak_flops"]), None)
    rate = "MFU" if peak else "TFLOP/s"
    first = results[0]
    lines = [
        f"\nB={first['batch']} T={first['sequence']} {first['dtype']}, {device(first)}",
        f"{'':14}{'step ms':>10}{'ratio':>8}{'tokens/s':>11}{rate:>9}{'compile s':>11}{'temp MiB':>10}{'peak MiB':>10}",
    ]
    for result in results:
        work = result["tokens_per_second"] * flops.per_token(model, result["sequence"])
        lines.append(
            f"{result['who']:14}{1e3 * result['step_seconds']:10.1f}"
            f"{'' if ours is None else format(result['step_seconds'] / ours, '.2f'):>8}"
            f"{result['tokens_per_second']:11.0f}"
            f"{format(work / peak, '.1%') if peak else format(work / 1e12, '.3f'):>9}"
            f"{result['compile_seconds']:11.1f}{mebibytes(result['temp_bytes']):>10}{mebibytes(result['peak_bytes']):>10}"
        )
    return "\n".join(lines) + "\n"


def device(result: Result) -> str:
    """Returns the name of the device that the result was measured on."""
    return machine.cpu_name() if result["device"] == "cpu" else result["device"]


def mebibytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.0f}"


def draw(results: list[Result], model: Model, path: Path) -> None:
    """Draws bars of tokens per second, in a panel for each dtype and size."""
    panels = list(dict.fromkeys((result["dtype"], result["batch"], result["sequence"]) for result in results))
    figure = Figure(figsize=(1.5 + 2.6 * len(panels), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        shown = [result for result in results if (result["dtype"], result["batch"], result["sequence"]) == panel]
        names = [result["who"] for result in shown]
        bars = axis.bar(
            names, [result["tokens_per_second"] for result in shown], color=[COLOURS[name] for name in names]
        )
        axis.bar_label(bars, fmt="{:,.0f}", fontsize=8)
        axis.set_title("{}, B={}, T={}".format(*panel), fontsize=10)
        axis.tick_params(axis="x", labelrotation=30, labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.12)
    axes[0, 0].set_ylabel("tokens/s, whole train step")
    figure.suptitle(f"L={model.layers}, C={model.width}, V={model.vocabulary_size}: {device(results[0])}", fontsize=10)
    figure.savefig(path, dpi=150)
