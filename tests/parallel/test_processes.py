"""Real processes on this machine that train together, and what happens when one of them fails."""

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxgpt.commands import cli
from jaxgpt.options.config import Model
from jaxgpt.runs import checkpoints
from tests.parallel.several import ROOT, Several, environment, free_port, losses, metrics, words

MINUTE = 60
IPV6 = pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")


@pytest.fixture(scope="module", autouse=True)
def work(tmp_path_factory):
    """A folder with text.txt, which is the current folder of these tests."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "text.txt").write_text("the cat sat on the mat and saw a red hat\n" * 50)
    with contextlib.chdir(folder):
        yield folder


def alone(name: str, devices: int = 1, *more: str, **changes) -> None:
    """Trains the same run in this process, on so many devices."""
    assert cli.main([*words(**changes | {"run__name": name}), f"--parallel.devices={devices}", *more]) == 0


def params(name: str):
    found, _ = checkpoints.load_params(
        Path("runs", name), Model(layers=1, heads=1, width=9, context=8, vocabulary_size=0)
    )
    return [np.asarray(leaf) for leaf in jax.tree.leaves(found)]


def assert_same_run(name: str, other: str) -> None:
    """Asserts that two runs are the same, but for the rounding of sums in another order."""
    steps, values = zip(*losses(name), strict=True)
    other_steps, other_values = zip(*losses(other), strict=True)
    assert steps == other_steps
    np.testing.assert_allclose(values, other_values, rtol=1e-4)
    for a, b in zip(params(name), params(other), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_two_processes_train_as_one_with_two_devices():
    """Each reads its own half of every micro-batch; only the first writes and prints."""
    with Several(2, "two", script="tests/parallel/one_of_several.py", parallel__zero=1) as two:
        assert two.wait() == [0, 0], two.output()
    assert "parallel  2 devices of 2 processes, ZeRO stage 1" in two.output(0)
    assert two.output(1) == ""
    alone("one", 2, parallel__zero=1)
    assert_same_run("two", "one")
    assert len(metrics("two")) == 8 + 4  # losses, and validation losses at 0, 3, 6 and 8
    assert Path("runs/two/samples.txt").read_text().count("--- step") == 2
    assert 'processes = 0\nprocess = -1\ncoordinator = ""' in Path("runs/two/config.toml").read_text()
    reads = [json.loads(Path(f"reads.{process}.json").read_text()) for process in range(2)]
    windows = [{start for start, stop in part if stop - start == 8 + 1} for part in reads]  # with the last target
    # Of each step its 2 micro-batches' 4 sequences, and of some steps that are read ahead; no window twice in an epoch.
    assert all(len(own) == len(part) >= 8 * 2 * 4 for own, part in zip(windows, reads, strict=True))
    assert windows[0].isdisjoint(windows[1])


@pytest.mark.slow
def test_one_that_is_killed_ends_all_and_fewer_go_on():
    """Four processes in stage 2, of which the third is killed; two in stage 3 go on as one alone would have."""
    same = {"training__evaluate_every": 0, "optimizer__schedule": "constant", "optimizer__learning_rate": 0.001}
    with Several(4, "killed", parallel__zero=2, training__steps=100000, **same) as four:
        four.until_step(8)
        four.processes[2].send_signal(signal.SIGKILL)
        statuses = four.wait(MINUTE)
    assert statuses == [1, 1, -signal.SIGKILL, 1], four.output()
    assert "another process has ended, or can't be reached" in four.output(0)
    assert "--resume goes on from the last checkpoint, on fewer processes too" in four.output(0)
    assert "Traceback" not in four.output()
    last = checkpoints.whole_steps(Path("runs/killed/checkpoints"))[-1]
    same["training__steps"] = last + 8
    with Several(2, "killed", "--resume", parallel__zero=3, **same) as two:
        assert two.wait() == [0, 0], two.output()
    assert f"resuming after step {last}, from runs/killed/checkpoints/{last}" in two.output(0)
    alone("whole", **same)
    assert_same_run("killed", "whole")


@pytest.mark.slow
def test_the_first_that_is_killed_ends_all():
    """The coordination service ends with it; JAX says so if the others' next step doesn't."""
    with Several(2, "first", training__steps=100000) as two:
        two.until_step(4)
        two.processes[0].send_signal(signal.SIGKILL)
        killed, other = two.wait(MINUTE)
    assert (killed, other) == (-signal.SIGKILL, 1)
    assert two.output(1).count("error: another process has ended, or can't be reached") == 1
    assert "stack trace" not in two.output(1)


@pytest.mark.slow
def test_one_that_hangs_ends_all():
    """Its heartbeats stop, as when its machine is lost."""
    with Several(2, "hangs", training__steps=100000) as two:
        two.until_step(4)
        two.processes[1].send_signal(signal.SIGSTOP)
        assert two.processes[0].wait(MINUTE) == 1
    assert two.output(0).count("error: another process has ended, or can't be reached") == 1
    assert "stack trace" not in two.output(0)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_one_of_them_stops_all_at_the_same_step(number, status):
    name = number.name
    with Several(2, name, training__steps=100000, checkpoint__every_minutes=0) as two:
        two.until_step(4)
        two.processes[1].send_signal(number)
        assert two.wait() == [status, status], two.output()
    last = metrics(name)[-1]["step"]
    assert checkpoints.whole_steps(Path("runs", name, "checkpoints"))[-1] == last
    assert f"after step {last} of 100000; saved in runs/{name}/checkpoints/{last}" in two.output(0)
    assert two.output(1) == ""


@pytest.mark.parametrize("address", ["127.0.0.1", pytest.param("::", marks=IPV6)])
def test_a_port_that_is_taken(address, capsys):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family, dualstack_ipv6=family == socket.AF_INET6) as taken:
        port = taken.getsockname()[1]
        options = ["--parallel.processes=2", "--parallel.process=0", f"--parallel.coordinator=127.0.0.1:{port}"]
        assert cli.main([*words(run__name="vain"), *options]) == 2
    message = capsys.readouterr().err
    assert message == (
        f"error: process 0 of 2 (options) can't listen at 127.0.0.1:{port}: Address already in use. Is the port free?\n"
    )
    assert not Path("runs/vain").exists()


@pytest.mark.slow
def test_two_with_one_number_end_at_once():
    with Several(3, "twice", own=[[], [], ["--parallel.process=1"]]) as three:
        assert three.wait(MINUTE) == [2, 2, 2], three.output()
    for process in range(3):
        assert "two processes were started as number 1 of 3" in three.output(process)
        assert three.output(process).count("\n") == 0


@pytest.mark.slow
def test_the_first_that_is_killed_before_all_have_met_ends_the_others():
    """Two of three: when process 0 greets a stranger, so that it listens, it is killed."""
    port = free_port()
    options = ["--parallel.processes=3", f"--parallel.coordinator=127.0.0.1:{port}"]
    begun = [
        subprocess.Popen(
            [sys.executable, ROOT / "run.py", *words(run__name="early"), *options, f"--parallel.process={process}"],
            stderr=subprocess.PIPE,
            env=environment(),
            text=True,
        )
        for process in range(2)
    ]
    until = time.monotonic() + MINUTE
    while time.monotonic() < until:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as link:
            link.recv(7)
            break
        time.sleep(0.1)
    begun[0].kill()
    _, message = begun[1].communicate(timeout=MINUTE)
    begun[0].communicate()
    assert begun[1].returncode == 1
    assert message.startswith("error: process ")
    assert message.count("\n") == 1


@pytest.mark.slow
def test_a_mistake_in_one_of_them_ends_all_with_its_message(work):
    (work / "other.txt").write_text("the cat sat on the mat and saw a red cap\n" * 50)
    own = [["--data.text=text.txt"], ["--data.text=other.txt"]]
    with Several(2, "mistake", own=own) as two:
        assert two.wait() == [2, 2], two.output()
    message = "process 1 is to train other than process 0: --data.text is text.txt there and other.txt here; "
    message += "--data.text other.txt is another text: it differs between the byte offsets 0 and 2050"
    assert f"error: process 1 failed: {message}" in two.output(0)
    assert f"error: {message}" in two.output(1)
    assert not Path("runs/mistake").exists()


@pytest.mark.slow
def test_a_loss_that_is_not_a_number_ends_all(work):
    with Several(2, "nan", optimizer__learning_rate=1e30, optimizer__clip_norm=0) as two:
        assert two.wait() == [1, 1], two.output()
    assert "so the run stops here; the last good state is in runs/nan/checkpoints/" in two.output(0)
    assert two.output(1) == ""
    assert Path("runs/nan/loss.png").exists()


@pytest.mark.slow
def test_reproducible_on_several_processes(monkeypatch):
    """Two processes of two devices each have one device's bits, compiled as users have it."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    with Several(2, "bits", "--parallel.reproducible", devices=2) as two:
        assert two.wait() == [0, 0], two.output()
    with Several(1, "bit", "--parallel.reproducible") as one:
        assert one.wait() == [0], one.output()
    for a, b in zip(params("bits"), params("bit"), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_the_script_for_one_node(work):
    """Two processes on a CPU; started again, there is nothing left to do."""
    command = [str(ROOT / "scripts/one_node.sh"), *words(run__name="node", run__folder=work / "runs")]
    command.append(f"--data.text={work}/text.txt")
    own = environment() | {"PROCESSES": "2", "PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}
    for said in ("parallel  2 devices of 2 processes", "resuming after step 8"):
        done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        assert said in done.stdout
    alone("one_node", 1)
    assert_same_run("node", "one_node")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("mpirun"), reason="Open MPI is not installed")
def test_open_mpi_says_who_is_who(work):
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, str(ROOT / "run.py")]
    done = subprocess.run(
        [*command, *words(run__name="mpi")], env=environment(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "parallel  2 devices of 2 processes" in done.stdout
