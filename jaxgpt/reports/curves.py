"""A run's loss curve as a picture."""

import contextlib
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figure(**options: Any) -> "Figure":
    """Returns a new figure. Nothing in the user's environment keeps it from being drawn into a file.

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


def loss_curve(metrics: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draws train and validation loss by step from the objects of a metrics.jsonl; writes a PNG."""
    picture = figure(figsize=(8, 4.5), layout="constrained")
    axes = picture.add_subplot()
    train = [(line["step"], line["loss"]) for line in metrics if line.get("loss") is not None]
    validation = [(line["step"], line["val_loss"]) for line in metrics if line.get("val_loss") is not None]
    if train:
        axes.plot(*zip(*train, strict=True), color="tab:blue", alpha=0.35, linewidth=0.8, label="train, each step")
        axes.plot(*_smoothed(train), color="tab:blue", label="train, smoothed")
    if validation:
        label = f"validation ({validation[-1][1]:.3f})"
        axes.plot(*zip(*validation, strict=True), "o-", color="tab:orange", label=label)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.set_title(title, parse_math=False)  # a name, in which a $ is a $
    axes.grid(alpha=0.3)
    if train or validation:
        axes.legend()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name in letters that the font hasn't got
        picture.savefig(path, format="png", dpi=120)  # whatever the file's name ends with


def _smoothed(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """Returns a running mean whose window is a fiftieth of the curve."""
    window = max(1, len(points) // 50)
    means = []
    for end in range(1, len(points) + 1):
        recent = points[max(0, end - window) : end]
        means.append(sum(loss for _, loss in recent) / len(recent))
    return [step for step, _ in points], means
