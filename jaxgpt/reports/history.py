"""A run's metrics.jsonl as columns of numbers, read as it grows, and thinned out for a picture; its loss curve.

`metrics_file.read_metrics` reads a whole file into objects; a run of 500,000 steps has 170 MB of them, and a report
that is written again and again reads only what is new.
"""

import contextlib
import itertools
import logging
import math
import os
import sys
import warnings
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxgpt import files
from jaxgpt.runs import metrics_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Names of the objectives' own metrics, as the pages show them; those of what is held out have val_ before them.
FURTHER = {
    "accuracy": "Pairs in the right order, %",
    "score_margin": "Score of the better text over the worse",
    "margin": "Reward of the chosen answer over the rejected",
    "chosen_reward": "Reward of chosen answers",
    "rejected_reward": "Reward of rejected answers",
    "reward": "Reward of answers",
    "right": "Right answers, %",
    "kl_of_answer": "Divergence of an answer from the reference, nats",
    "kl": "Divergence of a token from the reference, nats",
    "kl_penalty": "Coefficient of the divergence in the reward",
    "entropy": "Entropy at a token, nats",
    "answer_tokens": "Tokens of an answer",
    "clip_fraction": "Tokens whose ratio is clipped, %",
    "value_loss": "Loss of the values",
    "fp8_error": "Error of the gradient by products of 8 bits, %",
    "fp8_error_largest": "The largest of a weight's, %",
    "fp8_error_qkv": "That of queries, keys and values, %",
    "fp8_error_attention_out": "That of attention's output, %",
    "fp8_error_mlp_in": "That of the MLP's first product, %",
    "fp8_error_mlp_out": "That of the MLP's last product, %",
    "fp8_clamped": "Tensors with numbers beyond 8 bits",
}
PERCENT = ("accuracy", "right", "clip_fraction", *(name for name in FURTHER if name.startswith("fp8_error")))
LOSSES = {  # units of the losses, by --objective.name
    "next_token": "nats per token",
    "reward": "nats per comparison",
    "preference": "per pair",
    "policy": "of the surrogate",
}
COLUMNS = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu", "step_seconds", "data_wait_seconds")
PIECE = 2**20  # bytes read at once
RECENT = 200  # values of which a mean is taken
BUCKETS = 700  # per curve; each keeps its smallest and its largest value
LAST = 256  # bytes before the place read up to: if they have changed, the file is another one

Curve = tuple[np.ndarray, np.ndarray]  # steps, values


class History:
    """Columns of a metrics.jsonl. Lines that can't be read are passed over: a run may be writing the last one."""

    def __init__(self, path: Path):
        self.path = path
        self._begin()

    def _begin(self) -> None:
        self.read, self._last = 0, b""
        self.tokens_per_step = 0.0
        self.steps = array("q")
        self.columns = {name: array("d") for name in COLUMNS}
        self.validation: dict[int, float] = {}
        self.further: dict[str, tuple[array, array]] = {}  # steps and values of FURTHER, and of val_ and their names
        self.tasks: dict[str, dict[int, float]] = {}  # accuracies by name and step
        self.skipped: list[tuple[int, float]] = []  # steps that changed nothing, with the gradient's norm
        self._skips = 0

    def update(self) -> bool:
        """Reads the next piece of what is new; returns whether there may be more. UserError where that fails."""
        with files.open_file(self.path, within=self.path.parent) as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, self.read - LAST))
            if size < self.read or file.read(min(self.read, LAST)) != self._last:  # cut back, or replaced
                self._begin()
                file.seek(0)
            piece = file.read(PIECE)
            whole = piece.rfind(b"\n") + 1 or (len(piece) if len(piece) == PIECE else 0)  # no line of ours is so long
            for line in piece[:whole].splitlines(keepends=True):
                self._take(metrics_file.parse(line))
            self.read += whole
            self._last = (self._last + piece[:whole])[-min(self.read, LAST) :] if self.read else b""
        return whole > 0 and self.read < size

    def read_all(self) -> "History":
        """Reads to the end of the file, and returns itself."""
        while self.update():
            pass
        return self

    def _take(self, values: dict[str, Any] | None) -> None:
        if values is None or (step := values["step"]) >= 2**63:
            return
        if "learning_rate" in values:
            self._take_step(step, values)
        if math.isfinite(loss := number(values.get("val_loss"))):
            self.validation[step] = loss
        if "task" not in values:
            self._take_further(step, values)
        else:
            normalised = values.get("accuracy_norm")
            accuracy = number(values.get("accuracy") if normalised is None else normalised)
            if math.isfinite(accuracy):
                self.tasks.setdefault(str(values["task"])[:100], {})[step] = accuracy

    def _take_step(self, step: int, values: dict[str, Any]) -> None:
        self.steps.append(step)
        for name, column in self.columns.items():
            column.append(number(values.get(name)))
        skips = int(number(values.get("skipped"), 0.0))
        if skips > self._skips:
            self.skipped.append((step, number(values.get("grad_norm"))))
        self._skips = skips
        if step:
            self.tokens_per_step = number(values.get("tokens"), 0.0) / step

    def _take_further(self, step: int, values: dict[str, Any]) -> None:
        for key in FURTHER:
            for name in (key, f"val_{key}"):
                if name in values and math.isfinite(value := number(values[name])):
                    steps, column = self.further.setdefault(name, (array("q"), array("d")))
                    steps.append(step)
                    column.append(100 * value if key in PERCENT else value)

    def further_curve(self, name: str) -> Curve:
        """Returns one of the curves of `further`, an empty one where there is none."""
        steps, values = self.further.get(name, ((), ()))
        return np.array(steps, np.int64), np.array(values, np.float64)

    def curve(self, name: str) -> Curve:
        """Returns a column by step, without the values that are not finite."""
        values = np.array(self.columns[name])
        kept = np.isfinite(values)
        return np.array(self.steps)[kept], values[kept]

    def recent(self, name: str) -> float:
        """Returns the mean of a column's last `RECENT` values; NaN where there are none.

        The first step is left out, since its time includes compiling.
        """
        values = np.array(self.columns[name][1:][-RECENT:])
        values = values[np.isfinite(values)]
        return float(values.mean()) if len(values) else math.nan


def number(value: Any, otherwise: float = math.nan) -> float:
    """Returns a value as a float if it is a finite number, and else `otherwise`."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    return float(value) if known else otherwise


def thinned(curve: Curve, buckets: int = BUCKETS) -> Curve:
    """Returns the smallest and the largest point of each of `buckets` equal parts, and the first and the last point.

    Unlike a mean it draws only points that exist, and unlike a random sample it keeps every spike.
    """
    steps, values = curve
    if len(values) <= 2 * buckets:
        return curve
    edges = np.linspace(0, len(values), buckets + 1).astype(int)
    kept = {0, len(values) - 1}
    for start, end in itertools.pairwise(edges):
        kept.add(start + int(np.argmin(values[start:end])))
        kept.add(start + int(np.argmax(values[start:end])))
    chosen = np.array(sorted(kept))
    return steps[chosen], values[chosen]


def smoothed(curve: Curve, buckets: int = BUCKETS) -> Curve:
    """Returns a running mean over the last fiftieth of the curve, at up to `buckets` steps, the last one included."""
    steps, values = curve
    if not len(values):
        return curve
    window = max(1, len(values) // 50)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.unique(np.linspace(1, len(values), min(len(values), buckets)).astype(int))
    starts = np.maximum(0, ends - window)
    return steps[ends - 1], (sums[ends] - sums[starts]) / (ends - starts)


def figure(**options: Any) -> "Figure":
    """Returns a new figure, which nothing in the user's environment keeps from being drawn into a file.

    A folder that matplotlib can't keep its fonts in is of no interest here, and a backend that MPLBACKEND names, and
    that isn't installed, isn't needed.
    """
    if "matplotlib" not in sys.modules:
        _import()
    from matplotlib.figure import Figure

    return Figure(**options)


def _import() -> None:
    """Imports matplotlib for the first time, without its warnings, and with a backend that may not exist."""
    logger = logging.getLogger("matplotlib")
    level, backend = logger.level, os.environ.pop("MPLBACKEND", "")
    logger.setLevel(logging.ERROR)
    try:
        import matplotlib
        import matplotlib.figure
    finally:
        logger.setLevel(level)
        if backend:
            os.environ["MPLBACKEND"] = backend
    if backend:  # a notebook's, which draws with it
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend


def loss_curve(metrics: list[dict[str, Any]], title: str, path: Path, unit: str = LOSSES["next_token"]) -> None:
    """Draws train and validation loss by step from the objects of a metrics.jsonl; writes a PNG."""
    axes = (picture := figure(figsize=(8, 4.5), layout="constrained")).add_subplot()
    train, validation = (
        [(line["step"], line[name]) for line in metrics if line.get(name) is not None] for name in ("loss", "val_loss")
    )
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=0.8, label="train, each step")
        axes.plot(*smoothed((np.array(steps), np.array(losses))), color="tab:blue", label="train, smoothed")
    if validation:
        label = f"validation ({validation[-1][1]:.3f})"
        axes.plot(*zip(*validation, strict=True), "o-", color="tab:orange", label=label)
    axes.set(xlabel="step", ylabel=f"loss ({unit})")
    axes.set_title(title, parse_math=False)  # a name, in which a $ is a $
    axes.grid(alpha=0.3)
    if train or validation:
        axes.legend()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name in letters that the font hasn't got
        picture.savefig(path, format="png", dpi=120)  # whatever the file's name ends with
