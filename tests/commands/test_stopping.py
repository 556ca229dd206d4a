"""The reasons for which a run ends early."""

import signal

import pytest

from jaxgpt.commands import stopping
from jaxgpt.commands.stopping import SLURM_END, Stop
from jaxgpt.errors import HungUp, Interrupted, Terminated


@pytest.mark.parametrize(
    ("number", "reason", "error", "status"),
    [
        (signal.SIGINT, "with Ctrl-C", Interrupted, 130),
        (signal.SIGTERM, "by SIGTERM", Terminated, 143),
        (signal.SIGHUP, "by SIGHUP", HungUp, 129),
    ],
)
def test_a_signal_is_a_request(not_under_nohup, number, reason, error, status):
    before = signal.getsignal(number)
    with Stop() as stop:
        assert not stop.requested()
        signal.raise_signal(number)
        assert stop.requested()
        assert stop.ending == (reason, error)
        assert error.status == status
    assert signal.getsignal(number) is before


def test_only_a_second_ctrl_c_ends_the_process():
    """Schedulers send SIGTERM more than once."""
    with Stop() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert stop.ending == stopping.SIGTERM
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL


def test_under_nohup_a_closed_terminal_is_no_reason():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_some_minutes_before_the_end_of_the_allocation(monkeypatch):
    now = [1_000_000.0]
    monkeypatch.setattr(stopping.time, "time", lambda: now[0])
    monkeypatch.setenv(SLURM_END, "1000600")
    stop, other = Stop(minutes_before_end=5), Stop(minutes_before_end=0)
    now[0] += 299
    assert not stop.requested()
    now[0] += 1
    assert stop.requested()
    assert stop.ending == stopping.ALLOCATION
    assert not other.requested()


@pytest.mark.parametrize("end", [None, "", "soon", "-1"])
def test_without_an_allocation_there_is_no_end(monkeypatch, end):
    monkeypatch.delenv(SLURM_END, raising=False)
    if end is not None:
        monkeypatch.setenv(SLURM_END, end)
    assert not Stop(minutes_before_end=5).requested()


class Waits:
    """Stands in for the writer, the display and the stop that `Decisions` asks."""

    lost, late, idle = "", False, True

    def __init__(self):
        self.wanted = False

    def due(self, step):
        self.wanted |= step % 10 == 0
        return self.wanted

    def wishes(self):
        return [True, False, False, False]


def test_steps_that_belong_together_are_not_torn_apart():
    """A save that falls due within such steps waits for their end, and is not forgotten."""
    waits = Waits()
    decisions = stopping.Decisions(None, waits, waits, waits, every=4)  # type: ignore[arg-type]
    assert [step for step in range(1, 17) if decisions.ends(step)] == [4, 8, 12, 16]
    assert [step for step in range(1, 17) if decisions.save_is_due(step)] == [12, 16]
