"""That no loop fills the devices' queues."""

import os
import subprocess
import sys

import numpy as np
import pytest

from jaxgpt.evaluation.loss import make_validation_loss
from jaxgpt.evaluation.scoring import ScoringRequest, make_scorer
from jaxgpt.options.config import Compute, Config, Model, Parallel, Training
from jaxgpt.parallel import in_flight
from jaxgpt.parallel.sharding import Layout
from tests.parallel.several import ROOT

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


@pytest.mark.parametrize("count", [0, 1, in_flight.MOST - 1, in_flight.MOST, 100])
def test_results_come_in_order_and_few_are_in_flight(count):
    queue = Queue()
    found = list(in_flight.in_turn(queue.run(number) for number in range(count)))
    assert [int(value) for value in found] == list(range(count))
    assert queue.dispatched == count
    assert queue.most == min(count, in_flight.MOST)


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
    assert queue.most == in_flight.MOST


def test_scoring_keeps_few_programs_in_flight(queue):
    """Each gives two arrays, which count apart here."""
    requests = [ScoringRequest([a, b], [c, d]) for a in range(8) for b in range(8) for c in range(8) for d in range(2)]
    make_scorer(CONFIG, 1)(None, requests)  # type: ignore[arg-type]
    assert queue.dispatched == 2 * 128
    assert queue.most == 2 * in_flight.MOST


MANY = """
import jax, numpy as np
from jax.sharding import PartitionSpec as P
from jaxgpt.parallel.in_flight import in_turn
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
