"""The loss curve as a picture."""

import os
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.axes import Axes

from jaxgpt.reports import curves

METRICS = [
    {"step": 0, "val_loss": 5.5},
    *({"step": step, "loss": 5 / step, "learning_rate": 1e-3} for step in range(1, 101)),
    {"step": 100, "val_loss": 0.25},
]


@pytest.fixture
def plotted(monkeypatch):
    """The curves that were drawn: label to (steps, losses)."""
    drawn = {}
    original = Axes.plot

    def plot(axes, steps, values, *args, label, **kwargs):
        drawn[label] = (list(steps), list(values))
        return original(axes, steps, values, *args, label=label, **kwargs)

    monkeypatch.setattr(Axes, "plot", plot)
    return drawn


def test_it_is_a_png_with_something_on_it(tmp_path):
    path = tmp_path / "loss.png"
    curves.loss_curve(METRICS, "a run", path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    picture = matplotlib.image.imread(path)
    height, width, _ = picture.shape
    assert (height, width) == (540, 960)
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 10  # colours


def test_train_and_validation_loss_by_step(tmp_path, plotted):
    curves.loss_curve(METRICS, "a run", tmp_path / "loss.png")
    assert plotted["train, each step"] == (list(range(1, 101)), [5 / step for step in range(1, 101)])
    assert plotted["validation (0.250)"] == ([0, 100], [5.5, 0.25])


def test_the_smoothed_curve_is_the_mean_of_the_last_fiftieth(tmp_path, plotted):
    curves.loss_curve(METRICS, "a run", tmp_path / "loss.png")
    steps, losses = plotted["train, smoothed"]
    assert steps == list(range(1, 101))
    assert losses[0] == 5.0
    assert losses[1:] == pytest.approx([(5 / (step - 1) + 5 / step) / 2 for step in range(2, 101)])


def test_steps_without_a_finite_loss_are_left_out(tmp_path, plotted):
    """Null in metrics.jsonl: the curve has a straight line there."""
    metrics = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 1.0}]
    curves.loss_curve(metrics, "a run", tmp_path / "loss.png")
    assert plotted["train, each step"] == ([1, 3], [2.0, 1.0])


@pytest.mark.parametrize("metrics", [[], [{"step": 1, "loss": None}], METRICS[:1], METRICS[1:2]])
def test_a_run_that_ended_early_has_a_picture_too(tmp_path, metrics):
    curves.loss_curve(metrics, "a run", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size


@pytest.mark.parametrize("title", ["", "a$b$c", "cost $5", r"\frac{", "x_1^2", "a\nb", "実験"])
def test_a_runs_name_may_be_any(tmp_path, title):
    """It is no formula, and its letters may be missing in the font."""
    curves.loss_curve(METRICS, title, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size


def test_a_folder_that_is_gone_is_an_os_error(tmp_path):
    """Which the run's folder reports."""
    with pytest.raises(OSError, match="No such file"):
        curves.loss_curve(METRICS, "a run", tmp_path / "gone" / "loss.png")


@pytest.mark.parametrize("variables", [{"MPLBACKEND": "nonsense"}, {"MPLCONFIGDIR": "/proc/nowhere"}])
def test_what_the_environment_says_of_matplotlib_does_not_matter(tmp_path, variables):
    """The picture is drawn at the end of a run, and nothing is printed."""
    code = "import pathlib; from jaxgpt.reports import curves; curves.loss_curve([], 'a', pathlib.Path('loss.png'))"
    environment = os.environ | variables | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
