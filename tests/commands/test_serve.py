"""The command that serves: what it refuses, and how it ends."""

import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jaxgpt.commands import cli, serve
from jaxgpt.errors import UserError


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        *(
            ("127.0.0.1", True),
            ("127.1.2.3:80", True),
            ("[::1]:8000", True),
            ("localhost", True),
            ("LocalHost:1", True),
        ),
        *(("0.0.0.0", False), ("[::]", False), ("192.168.1.2", False), ("example.org", False), ("", False)),
        *(("localhost.example.org", False), ("a@localhost", False), ("localhost/", False), ("[::1", False)),
    ],
)
def test_what_is_this_machine_alone(host, loopback):
    gate = pytest.importorskip("jaxgpt.generation.gate", reason="starlette is not installed: the extra test has it")
    assert gate.is_this_machine(host) is loopback


def test_other_addresses_need_a_key(fails, monkeypatch, tmp_path):
    monkeypatch.delenv(serve.KEY_VARIABLE, raising=False)
    message = fails("serve", "--run", "x", "--host", "0.0.0.0")
    assert message.startswith("error: --host 0.0.0.0: others could reach the server, so an API key is needed")
    (tmp_path / "key").write_text("\n")
    assert "there is no key in it" in fails("serve", "--run", "x", "--key-file", str(tmp_path / "key"))
    assert "--key-file gone: can't be read" in fails("serve", "--run", "x", "--key-file", "gone")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("clé", "can't be sent in a header, U+00E9 at position 2"),
        ("one\ntwo", "can't be sent in a header, U+000A at position 3"),
        ("a" * 5000, "5,000 bytes, where no more than 4,096 are expected"),
    ],
)
def test_keys_that_no_client_could_send(fails, tmp_path, monkeypatch, key, message):
    (tmp_path / "key").write_text(key, encoding="utf-8")
    assert message in fails("serve", "--run", "x", "--key-file", str(tmp_path / "key"))
    if len(key) < 100:
        monkeypatch.setenv(serve.KEY_VARIABLE, key)
        assert f"{serve.KEY_VARIABLE}: the key has a character that {message}" in fails("serve", "--run", "x")


def test_few_open_files_leave_few_connections(monkeypatch):
    resource = pytest.importorskip("resource", reason="Windows has no such limit")
    connections = pytest.importorskip("jaxgpt.generation.connections", reason="uvicorn or h11 is not installed")
    for files, most in ((10_000, 100), (60 + connections.SPARE_FILES + connections.CROWD + connections.ON_THE_WAY, 50)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, files=files: (files, files))
        monkeypatch.setattr(connections, "_open_files", lambda: 10)
        assert connections.most_connections(100) == most
    monkeypatch.setattr(resource, "getrlimit", lambda _: (20, 20))
    with pytest.raises(UserError, match="the limit of open files is 20"):
        connections.most_connections(100)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port", "70000"], "--port is 70000, and must be from 0 to 65535"),
        (["--slots", "0"], "--slots is 0, and must be greater than 0"),
        (["--port", "0"], "--run x: not a run's folder"),
        (["--port", "0", "--host", "127.0.0.2"], "--run x: not a run's folder"),
        (["--host", "nowhere.invalid"], "--host nowhere.invalid: there is no such address"),
        (["--host", "\x1b[31m"], "--host \\x1b[31m: there is no such address"),
    ],
)
def test_options_that_cannot_be(fails, words, message):
    assert message in fails("serve", "--run", "x", *words)


def test_two_runs_of_one_name(fails):
    message = fails("serve", "--run", "x", "--beside", "y", "elsewhere/x", "--port", "0")
    assert "--beside elsewhere/x: x has the name x too: give --run another by --name" in message
    message = fails("serve", "--run", "x", "--beside", "a/y", "b/y", "--port", "0", "--name", "z")
    assert "--beside b/y: a/y has the name y too" in message
    assert "--run x: not a run's folder" in fails(
        "serve", "--run", "x", "--beside", "y/x", "--port", "0", "--name", "z"
    )


def test_a_port_that_is_taken(fails):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port {port}: can't listen there (" in fails("serve", "--run", "x", "--port", str(port))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_finishes_what_has_begun_and_ends(work, number):
    """Trained for one step, served by the command, and stopped in the middle of an answer."""
    tiny = [
        "--model.family=gpt2",
        "--model.layers=1",
        "--model.heads=2",
        "--model.width=8",
        "--model.context=512",
        "--data.text=text.txt",
    ]
    tiny += ["--data.tokenizer=bytes", "--training.steps=1", "--sampling.tokens=1", "--run.name=tiny"]
    tiny += ["--training.sequence-length=16", "--training.batch-size=2"]
    openai = pytest.importorskip("openai", reason="openai is not installed: the extra test has it")
    assert cli.main(tiny) == 0
    command = [sys.executable, Path(cli.__file__).resolve().parents[2] / "run.py", "serve", "--run", "runs/tiny"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*command, "--port", "0"], text=True, **pipes) as process:
        assert process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
        assert found is not None
        with openai.OpenAI(base_url=f"{found[0]}/v1", api_key="none", max_retries=0, timeout=120) as client:
            stream = client.completions.create(model="tiny", prompt="a", max_tokens=500, stream=True)
            chunks = iter(stream)
            first = next(chunks)
            process.send_signal(number)
            text = first.choices[0].text + "".join(chunk.choices[0].text for chunk in chunks)
        assert len(text) > 100
        _, err = process.communicate(timeout=60)
        assert "Traceback" not in err
    assert process.returncode == (130 if number == signal.SIGINT else 143)
