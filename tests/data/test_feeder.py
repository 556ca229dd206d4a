"""Batches made in the background: in order, ahead of time, and with the errors of their making."""

import threading
import time

import numpy as np
import pytest

from jaxgpt.data.feeder import AHEAD, Feeder
from jaxgpt.data.loader import Batch
from jaxgpt.errors import UserError


def batch(step: int) -> Batch:
    return Batch(np.array(step), np.array(step + 1))


def test_batches_come_in_order():
    with Feeder(batch, 5) as feeder:
        assert [int(feeder.next().tokens) for _ in range(20)] == list(range(5, 25))


def test_they_are_made_while_the_step_runs():
    made = threading.Semaphore(0)

    def make(step):
        made.release()
        return batch(step)

    with Feeder(make, 0) as feeder:
        for _ in range(AHEAD):
            assert made.acquire(timeout=30)  # before anyone asked
        feeder.next()
        assert made.acquire(timeout=30)


def test_the_wait_is_told():
    def make(step):
        if step == 1:
            time.sleep(0.3)
        return batch(step)

    with Feeder(make, 0) as feeder:
        feeder.next()
        feeder.next()
        assert feeder.waited > 0.1
        time.sleep(0.2)
        feeder.next()
        assert feeder.waited < 0.1


def test_an_error_is_raised_in_its_turn_and_the_thread_ends():
    def make(step):
        if step == 2:
            raise UserError("step 2 has no data")
        return batch(step)

    with Feeder(make, 0) as feeder:
        assert [int(feeder.next().tokens) for _ in range(2)] == [0, 1]
        with pytest.raises(UserError, match="step 2 has no data"):
            feeder.next()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]
