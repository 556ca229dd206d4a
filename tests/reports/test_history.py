"""metrics.jsonl as it grows, is cut and is damaged; and curves thinned out, and drawn."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes

from jaxgpt.reports import page
from jaxgpt.reports.history import History, loss_curve, smoothed, thinned
from jaxgpt.runs.metrics_file import read_metrics
from tests.reports import runs


def line(step, **values):
    return json.dumps({"step": step, "loss": 2.0, "learning_rate": 1e-3, "skipped": 0, **values}) + "\n"


def test_read_as_it_grows_it_is_what_it_is_read_at_once(tmp_path):
    whole = (runs.write(tmp_path / "run") / "metrics.jsonl").read_bytes()
    path = tmp_path / "growing.jsonl"
    path.write_bytes(b"")
    history = History(path)
    for end in range(0, len(whole) + 5000, 5000):  # in the middle of lines
        path.write_bytes(whole[:end])
        history.read_all()
    metrics = read_metrics(path)
    steps = [one for one in metrics if "loss" in one]
    assert list(history.steps) == [one["step"] for one in steps]
    for name, column in history.columns.items():
        expected = [math.nan if one[name] is None else one[name] for one in steps]
        np.testing.assert_array_equal(np.array(column), expected)
    assert history.validation == {one["step"]: one["val_loss"] for one in metrics if "val_loss" in one}
    assert [step for step, _ in history.skipped] == [133, 200]


def test_a_file_that_a_resumed_run_cut_is_read_anew(tmp_path):
    """The file may be longer again by the time it is looked at."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(line(step, loss=1.0) for step in range(1, 10)))
    history = History(path).read_all()
    path.write_text("".join(line(step, loss=3.0 if step > 5 else 1.0) for step in range(1, 15)))
    history.read_all()
    assert list(history.steps) == list(range(1, 15))
    assert list(history.columns["loss"]) == [1.0] * 5 + [3.0] * 9


def test_lines_that_are_no_metrics_are_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    bad = ["{", "[]", "null", '{"step": "x", "learning_rate": 1}', '{"step": -1, "learning_rate": 1}', "\xff", ""]
    bad += [
        line(1e400),
        line(10**30),
        line(True)[:-2],
        line(4, mfu=10**400),
        "[" * 9999,
        '{"step": 3, "task": {"a": 1}, "accuracy": "high"}',
    ]
    path.write_bytes(("\n".join(bad) + "\n" + line(2, loss="<b>", grad_norm=[1], mfu=1e400)).encode("latin-1"))
    history = History(path).read_all()
    assert list(history.steps) == [2]
    assert math.isnan(history.columns["loss"][0])
    assert math.isnan(history.columns["mfu"][0])


@given(st.lists(st.floats(-1e6, 1e6), max_size=400), st.integers(1, 40))
def test_thinned_keeps_order_ends_and_extremes_and_makes_nothing_up(values, buckets):
    steps, values = np.arange(len(values)), np.array(values)
    kept, shown = thinned((steps, values), buckets)
    assert len(kept) <= 2 * buckets + 2
    assert (np.diff(kept) > 0).all()
    np.testing.assert_array_equal(shown, values[kept])
    if len(values):
        assert (kept[0], kept[-1]) == (0, len(values) - 1)
        assert (shown.min(), shown.max()) == (values.min(), values.max())


def test_smoothed_is_the_mean_of_the_last_fiftieth():
    values = np.random.default_rng(0).standard_normal(5000)
    steps, means = smoothed((np.arange(5000), values), 50)
    assert len(steps) <= 50
    np.testing.assert_allclose(means, [values[max(0, step - 99) : step + 1].mean() for step in steps])


def test_half_a_million_steps_are_a_small_page_that_is_quickly_made(tmp_path):
    folder = runs.write(tmp_path / "long", steps=100)
    history = History(folder / "metrics.jsonl").read_all()
    random = np.random.default_rng(0)
    history.steps = type(history.steps)("q", range(500_000))
    for name in history.columns:
        history.columns[name] = type(history.columns[name])("d", random.standard_normal(500_000))
    page.plotly()  # which is compressed once in a process
    before = time.process_time()
    made = page.render([page.of_run(folder, history)])
    assert len(made) < 3e6
    assert time.process_time() - before < 2  # 0.2 s where nothing else runs


def test_a_spike_is_seen_among_half_a_million():
    values = np.ones(500_000)
    values[123_456] = 50.0
    steps, shown = thinned((np.arange(500_000), values))
    assert list(steps[shown == 50.0]) == [123_456]


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
    loss_curve(METRICS, "a run", path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    picture = matplotlib.image.imread(path)
    height, width, _ = picture.shape
    assert (height, width) == (540, 960)
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 10  # colours


def test_train_and_validation_loss_by_step(tmp_path, plotted):
    loss_curve(METRICS, "a run", tmp_path / "loss.png")
    assert plotted["train, each step"] == (list(range(1, 101)), [5 / step for step in range(1, 101)])
    assert plotted["validation (0.250)"] == ([0, 100], [5.5, 0.25])


def test_the_smoothed_curve_is_the_mean_of_the_last_fiftieth(tmp_path, plotted):
    loss_curve(METRICS, "a run", tmp_path / "loss.png")
    steps, losses = plotted["train, smoothed"]
    assert steps == list(range(1, 101))
    assert losses[0] == 5.0
    assert losses[1:] == pytest.approx([(5 / (step - 1) + 5 / step) / 2 for step in range(2, 101)])


def test_steps_without_a_finite_loss_are_left_out(tmp_path, plotted):
    """Null in metrics.jsonl: the curve has a straight line there."""
    metrics = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 1.0}]
    loss_curve(metrics, "a run", tmp_path / "loss.png")
    assert plotted["train, each step"] == ([1, 3], [2.0, 1.0])


@pytest.mark.parametrize("metrics", [[], [{"step": 1, "loss": None}], METRICS[:1], METRICS[1:2]])
def test_a_run_that_ended_early_has_a_picture_too(tmp_path, metrics):
    loss_curve(metrics, "a run", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size


@pytest.mark.parametrize("title", ["", "a$b$c", "cost $5", r"\frac{", "x_1^2", "a\nb", "実験"])
def test_a_runs_name_may_be_any(tmp_path, title):
    """It is no formula, and its letters may be missing in the font."""
    loss_curve(METRICS, title, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size


def test_a_folder_that_is_gone_is_an_os_error(tmp_path):
    """The run's folder reports such an error."""
    with pytest.raises(OSError, match="No such file"):
        loss_curve(METRICS, "a run", tmp_path / "gone" / "loss.png")


@pytest.mark.parametrize("variables", [{"MPLBACKEND": "nonsense"}, {"MPLCONFIGDIR": "/proc/nowhere"}])
def test_what_the_environment_says_of_matplotlib_does_not_matter(tmp_path, variables):
    """The picture is drawn at the end of a run, and nothing is printed."""
    code = "import pathlib; from jaxgpt.reports import history; history.loss_curve([], 'a', pathlib.Path('loss.png'))"
    environment = os.environ | variables | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
