"""Faults as they happen: processes that are killed, a disk that is full, a reader that leaves. `make test-slow`."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import faults
from jaxgpt.commands import cli
from jaxgpt.runs import checkpoints

pytestmark = pytest.mark.slow

ENTRY = Path(cli.__file__).resolve().parents[2] / "run.py"
KILLS = 32
IN_A_SMALL_DISK = """
set -eu
mkdir -p runs
mount -t tmpfs -o size="$1" tmpfs runs
shift
status=0
"$@" --run.name full >out 2>err || status=$?
echo $status >status
"$1" "$2" generate --run runs/full --prompt the --tokens 3 >text
ls runs/full/checkpoints >kept
mount -o remount,size=100m runs
"$@" --run.name full --resume >resumed
cp -r runs/full after
"""


@pytest.fixture(scope="module")
def killer(tmp_path_factory):
    before = dict(os.environ)
    yield faults.Killer(tmp_path_factory.mktemp("faults"))
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def whole(killer) -> Path:
    """The run that was left alone."""
    return killer.finish("whole")


def command(killer, *more: str) -> list[str]:
    options = faults.OPTIONS | {"data.text": killer.folder / "text.txt", "run.folder": killer.folder}
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    return [sys.executable, str(ENTRY), *words, *more]


def start(killer, name: str, *more: str) -> subprocess.Popen[str]:
    words = command(killer, "--run.name", name, *more)
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(killer, whole):
    """It is killed at random moments, while it starts, trains and saves."""
    doing = killer.kill("killed", KILLS)
    assert doing.total() == KILLS
    assert doing["saving"] >= 5
    assert doing["starting"] >= 1
    assert faults.difference(killer.finish("killed"), whole) == ""


def test_sigterm_ends_a_run_with_its_status_and_it_goes_on_to_the_same_bits(killer, whole):
    with start(killer, "terminated", "--training.evaluate-every", "500") as process:
        assert process.stdout is not None
        while "validation loss" not in process.stdout.readline():
            pass
        while not (killer.folder / "terminated" / "checkpoints").exists():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate()
    assert process.returncode == 143
    assert "stopping by SIGTERM: saving" in out
    assert err.startswith("stopped by SIGTERM after step ")
    assert faults.difference(killer.finish("terminated"), whole) == ""


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such terminals")
def test_closing_the_terminal_saves_the_run(not_under_nohup, killer, whole):
    """The run can no longer print, and receives SIGHUP."""
    import pty

    master, terminal = pty.openpty()
    words = ["setsid", "--ctty", *command(killer, "--run.name", "hung-up", "--training.evaluate-every", "500")]
    with subprocess.Popen(words, stdin=terminal, stdout=terminal, stderr=subprocess.PIPE, text=True) as process:
        os.close(terminal)
        while not (killer.folder / "hung-up" / "checkpoints").exists():
            os.read(master, 4096)
            assert process.poll() is None
        os.close(master)
        _, err = process.communicate()
    assert process.returncode == 129
    assert err.startswith("stopped by SIGHUP after step ")
    assert faults.difference(killer.finish("hung-up"), whole) == ""


def test_a_run_whose_folder_is_deleted_stops_within_a_step(killer):
    folder = killer.folder / "deleted"
    with start(killer, "deleted", "--checkpoint.every-steps", "0", "--training.steps", "1000000") as process:
        while "learning_rate" not in faults._text(folder / "metrics.jsonl"):
            assert process.poll() is None
            time.sleep(0.05)
        shutil.rmtree(folder)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith(f"error: {folder}")  # or its metrics.jsonl, which may be the first to go
    assert err.endswith(" was deleted or moved while the run trains, so the run stops here\n")
    assert err.count("\n") == 1
    assert not folder.exists()


def test_killed_at_each_operation_a_run_ends_with_the_same_bits(killer):
    """The operations are those on files: in a start, the first save, a resumed run and a later save."""
    for what, found in killer.kill_at_each_operation().items():
        assert found["different"] == [], what
        assert found["kills"] > 40


def test_a_reader_that_leaves_stops_the_run_which_is_saved(killer, whole):
    """The reader is like `grep -m 1 "validation loss"`, after which nobody reads what training prints."""
    with start(killer, "piped", "--run.sample-every", "10") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        while "validation loss" not in process.stdout.readline():
            assert process.poll() is None
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 1
    assert "error: stopped after step " in err
    assert "because the output can't be written: Broken pipe" in err
    assert "Traceback" not in err
    assert 0 < checkpoints.find(killer.folder / "piped" / "checkpoints").about["step"] < faults.STEPS


def namespaces_work() -> bool:
    words = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
    try:
        return subprocess.run(words, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not namespaces_work(), reason="a small disk can't be made here without being root")
def test_a_full_disk_leaves_the_last_good_checkpoint(killer, whole, tmp_path):
    """The run goes on or stops, and says why; the model can be used, and the run goes on when there is room again."""
    keep = ["--checkpoint.keep-last", "100", "--checkpoint.every-steps", "20", "--run.folder", "runs"]
    words = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", IN_A_SMALL_DISK, "sh", "800k"]
    ended = subprocess.run([*words, *command(killer, *keep)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.stderr == ""
    assert ended.returncode == 0
    out, err = (tmp_path / "out").read_text(), (tmp_path / "err").read_text()
    assert (tmp_path / "status").read_text() == "1\n"
    assert "No space left on device" in out + err
    assert "Traceback" not in out + err
    assert err.count("\n") == 1
    assert (tmp_path / "text").read_text().startswith("the")
    kept = (tmp_path / "kept").read_text().split()
    assert kept
    assert f"resuming after step {max(map(int, kept))}" in (tmp_path / "resumed").read_text()
    assert faults.difference(tmp_path / "after", whole) == ""
