"""The number of devices that a run takes, whole runs on several of them, and that no loop fills their queues."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxgpt.commands import cli
from jaxgpt.errors import UserError
from jaxgpt.evaluation.scoring import ScoringRequest, make_scorer, make_validation_loss
from jaxgpt.options.config import Compute, Config, Model, Parallel, Training
from jaxgpt.parallel import mesh
from jaxgpt.parallel.sharding import Layout
from jaxgpt.runs import checkpoints
from tests.parallel import several
from tests.parallel.several import ROOT

STEPS = several.OPTIONS["training.steps"]


@pytest.fixture(scope="module", autouse=True)
def work(tmp_path_factory):
    """A folder with text.txt, which is the current folder of these tests."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "text.txt").write_text("the cat sat on the mat and saw a red hat\n" * 50)
    with contextlib.chdir(folder):
        yield folder


def run(name: str, devices: int, zero: int, *more: str) -> Path:
    of_run = {"run__name": name, "parallel__devices": devices, "parallel__zero": zero}
    seldom = {"training__micro_batches": 1, "training__evaluate_every": 0, "training__evaluation_batches": 2}
    assert cli.main([*several.words(**seldom, **of_run), *more]) == 0
    return Path("runs", name)


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line.get("loss", line.get("val_loss")) for line in lines]


def params(folder: Path):
    return checkpoints.load_params(folder, Model(layers=1, heads=1, width=9, context=8, vocabulary_size=0))[0]


@pytest.mark.slow
def test_a_run_goes_on_with_other_devices_and_another_stage(capsys):
    """It goes from 8 devices in stage 3 to 2 in stage 1 and to one, as if it had never stopped, but for rounding."""
    whole = run("whole", 1, 0)
    part = run("part", 8, 3)
    assert "8 devices, ZeRO stage 3" in capsys.readouterr().out
    for devices, zero in [(2, 1), (1, 0)]:
        last = sorted(int(path.name) for path in (part / "checkpoints").iterdir())[-1]
        assert last == STEPS
        for name in ("params", "optimizer", "about", "SHA256SUMS"):
            path = part / "checkpoints" / str(last) / name
            assert path.exists()
        (part / "checkpoints" / str(last) / "SHA256SUMS").unlink()  # so that the one of step 4 is the last
        run("part", devices, zero, "--resume")
        assert f"changed   --parallel.devices was 8 and is {devices}" in capsys.readouterr().out
        np.testing.assert_allclose(losses(part), losses(whole), rtol=1e-4)
        for a, b in zip(*map(jax.tree.leaves, (params(part), params(whole))), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-4)


def test_a_micro_batch_that_cannot_be_divided_is_refused(fails):
    words = ["--data.text", "text.txt", "--parallel.devices", "3", "--training.batch-size", "8"]
    message = fails(*words, "--run.name", "uneven")
    assert "--training.batch-size is 8, and must be divisible by the number of devices, 3" in message
    assert not Path("runs/uneven").exists()


def test_more_devices_than_there_are():
    with pytest.raises(UserError, match=r"--parallel.devices is 9, and there are 8 \(cpu\)"):
        mesh.make(Parallel(devices=9))


def test_devices_are_taken_in_their_order(monkeypatch):
    assert list(mesh.make(Parallel(devices=2)).devices.flat) == jax.devices()[:2]
    monkeypatch.undo()
    monkeypatch.setattr(mesh, "available", lambda: len(jax.devices()))
    assert mesh.make(Parallel()).size == 8


CONFIG = Config(
    model=Model(layers=1, heads=1, width=8, context=8, vocabulary_size=11),
    compute=Compute(layers="scanned"),
    parallel=Parallel(devices=8),
    training=Training(batch_size=8, sequence_length=8),
)


class Queue:
    """Stands in for the devices: counts the programs that were dispatched and not waited for."""

    def __init__(self):
        self.dispatched, self.unread, self.most = 0, 0, 0

    def run(self, value=0.0):
        self.dispatched, self.unread = self.dispatched + 1, self.unread + 1
        self.most = max(self.most, self.unread)
        return Result(self, value)


class Result:
    def __init__(self, queue: Queue, value):
        self.queue, self.value, self.ready = queue, value, False

    def block_until_ready(self):
        self.queue.unread -= not self.ready
        self.ready = True

    def __array__(self, dtype=None, copy=None):
        assert self.ready
        return np.asarray(self.value, dtype)


@pytest.mark.parametrize("count", [0, 1, mesh.MOST_IN_FLIGHT - 1, mesh.MOST_IN_FLIGHT, 100])
def test_results_come_in_order_and_few_are_in_flight(count):
    queue = Queue()
    found = list(mesh.in_turn(queue.run(number) for number in range(count)))
    assert [int(value) for value in found] == list(range(count))
    assert queue.dispatched == count
    assert queue.most == min(count, mesh.MOST_IN_FLIGHT)


@pytest.fixture
def queue(monkeypatch):
    """Each program that is jitted for several devices only counts its calls."""
    queue = Queue()
    zeros = np.zeros(8, np.float32)

    def jit(layout, function, *, out_specs, **_):
        scores = isinstance(out_specs, tuple)
        return lambda *arguments: (queue.run(zeros), queue.run(zeros)) if scores else queue.run()

    monkeypatch.setattr(Layout, "jit", jit)
    return queue


def test_the_validation_loss_keeps_few_programs_in_flight(queue):
    make_validation_loss(CONFIG, np.zeros(8 * 8 * 100 + 1, np.uint16), 8)(None)  # type: ignore[arg-type]
    assert queue.dispatched == 100
    assert queue.most == mesh.MOST_IN_FLIGHT


def test_scoring_keeps_few_programs_in_flight(queue):
    """Each gives two arrays, which count apart here."""
    requests = [ScoringRequest([a, b], [c, d]) for a in range(8) for b in range(8) for c in range(8) for d in range(2)]
    make_scorer(CONFIG, 1)(None, requests)  # type: ignore[arg-type]
    assert queue.dispatched == 2 * 128
    assert queue.most == 2 * mesh.MOST_IN_FLIGHT


MANY = """
import jax, numpy as np
from jax.sharding import PartitionSpec as P
from jaxgpt.parallel.mesh import in_turn
from jaxgpt.training.state import layout_of
from jaxgpt.options.config import Config, Model, Parallel
layout = layout_of(Config(model=Model(layers=1, heads=1, width=8, context=8, vocabulary_size=11), parallel=Parallel(8)))
def slow(x):
    return layout.total((x @ x.T @ x).sum()), layout.total(x.sum())
program = layout.jit(slow, in_specs=P("data"), out_specs=(P(), P()))
x = np.ones((8 * 512, 64), np.float32)
assert {float(b) for _, b in in_turn(program(x) for _ in range(300))} == {8.0 * 512 * 64}
"""


def test_eight_simulated_devices_do_not_stand_still():
    """300 programs with two collectives each, in threads as few as devices: dispatched at once they never end."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "PJRT_NPROC": "2"}
    environment |= {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", MANY], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
