"""Commands whose standard streams are closed, full or without a reader, and words that are no text: no traceback."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxgpt import terminal
from jaxgpt.commands import cli

ROOT = Path(cli.__file__).resolve().parents[2]
FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
POSIX = pytest.mark.skipif(os.name != "posix", reason="a shell's redirections")


def shell(line: str) -> subprocess.CompletedProcess:
    """Runs a line of the shell's in which jaxgpt is the command."""
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    command = f'jaxgpt() {{ "{sys.executable}" "{ROOT / "run.py"}" "$@"; }}; set -o pipefail; {line}'
    return subprocess.run(["bash", "-c", command], env=buffered, capture_output=True, text=True, timeout=60)


@POSIX
@pytest.mark.parametrize("line", ["jaxgpt --version >&-", "jaxgpt --help >&-", "jaxgpt --version <&- >&- 2>&-"])
def test_what_is_closed_is_written_to_nowhere(line):
    done = shell(line)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@FULL
@pytest.mark.parametrize("line", ["jaxgpt --version >/dev/full", "jaxgpt --help >/dev/full"])
def test_a_full_output_is_said(line):
    done = shell(line)
    assert done.returncode == 1
    assert done.stderr == "error: the output can't be written: No space left on device\n"


@FULL
def test_an_error_that_cannot_be_written_keeps_its_status():
    done = shell("jaxgpt nonsense 2>/dev/full")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


@POSIX
def test_a_reader_that_has_left_ends_the_command_silently():
    done = shell("jaxgpt --help | true")
    assert (done.returncode, done.stderr) == (1, "")


@POSIX
def test_a_closed_stream_gives_its_number_to_no_file():
    """The first file opened would else be the standard output, and get what libraries print there."""
    program = "import sys, tempfile; from jaxgpt import terminal; terminal.prepare(); "
    program += "sys.exit(10 + tempfile.TemporaryFile().fileno())"
    done = shell(f"PYTHONPATH='{ROOT}' '{sys.executable}' -c '{program}' <&- >&-")
    assert done.returncode >= 13
    assert done.stderr == ""


def test_standard_input_that_is_closed_is_at_its_end(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    terminal.prepare()
    with sys.stdin as nothing:
        assert nothing.read() == ""
        assert not nothing.isatty()


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--run.note=caf\udce9", r"--run.note=caf\xe9: its byte 0xe9 isn't UTF-8"),
        ("--data.text=\udcff\udcfe.txt", r"--data.text=\xff\xfe.txt: its byte 0xff isn't UTF-8"),
    ],
)
def test_a_byte_that_is_not_utf_8_is_called_that(word, said, capsys):
    assert cli.main([word]) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")


def test_half_a_surrogate_pair_is_no_byte(capsys):
    assert cli.main(["--run.note=\ud83d"]) == 2
    assert "half a surrogate pair" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(13, "Permission denied", "runs/a"), "error: runs/a: Permission denied\n"),
        (OSError(24, "Too many open files"), "error: Too many open files\n"),
        (OSError(5, "Input/output error"), "error: the output can't be written: Input/output error\n"),
        (ConnectionError("lost"), "error: lost\n"),
    ],
)
def test_what_the_system_refuses_is_one_line(error, message, monkeypatch, capfd):
    def refused(words):
        raise error

    monkeypatch.setattr(terminal, "discard", lambda stream: None)  # it would be that of the tests
    monkeypatch.setattr("jaxgpt.commands.report.run", refused)
    assert cli.main(["report"]) == 1
    assert capfd.readouterr().err == message


@POSIX
def test_ctrl_c_that_a_package_swallows_while_it_is_imported_ends_the_process():
    program = """
import os, signal
from jaxgpt import terminal
with terminal.ending_at_once():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        pass
print("went on")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\nstopped with Ctrl-C\n")


def test_ctrl_c_is_as_it_was_after_the_imports():
    before = signal.getsignal(signal.SIGINT)
    with terminal.ending_at_once():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
