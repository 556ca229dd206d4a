"""`run.py report`: its files, its server, and what it refuses."""

import contextlib
import http.client
import json
import socket
import struct
import threading
import time
import urllib.error
import urllib.request

import pytest

from jaxgpt.commands import cli
from jaxgpt.reports import live_report, page
from jaxgpt.reports.history import History
from tests.reports import runs


def test_it_writes_the_runs_own_page_and_of_several_one_in_the_current_folder(work, capsys):
    one, two = runs.write(work / "runs" / "one", steps=5), runs.write(work / "runs" / "two", steps=5)
    assert cli.main(["report", str(one)]) == 0
    assert cli.main(["report", str(one), str(two)]) == 0
    assert capsys.readouterr().out == f"report  {one / 'report.html'}\nreport  report.html\n"
    assert (work / "report.html").read_bytes().count(b"<!doctype html>") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name a run's folder"),
        (["runs/on"], "runs/on: there is no such folder; did you mean one?"),
        (["."], "has no metrics.jsonl"),
        (["runs/one", "--port", "70000"], "--port 70000"),
        (["runs/one", "--live", "--output", "a.html"], "--live writes no file"),
        ([f"runs/{index}" for index in range(17)], "at most 16"),
    ],
)
def test_mistakes(work, fails, words, said):
    runs.write(work / "runs" / "one", steps=2)
    assert said in fails("report", *words)


@pytest.mark.parametrize("name", ["config.toml", "memory_plan.json", "machine.json"])
@pytest.mark.parametrize("damage", [b"{", b"\xff\xfe", b'x = "'])
def test_a_damaged_file_is_named(work, fails, name, damage):
    (runs.write(work / "one", steps=2) / name).write_bytes(damage)
    assert f"one/{name}: not " in fails("report", "one")


def test_a_page_that_cannot_be_written(work, capsys):
    runs.write(work / "one", steps=2)
    assert cli.main(["report", "one", "--output", "gone/page.html"]) == 1
    assert "--output gone/page.html: writing failed (No such file or directory)" in capsys.readouterr().err


def test_a_port_that_is_taken(work, fails):
    server = live_report.listen([runs.write(work / "one", steps=2)], 0)
    with server:
        assert "Another port may be free" in fails("report", "one", "--live", "--port", str(server.server_port))


@pytest.mark.parametrize(
    ("text", "task", "expected"),
    [
        ("fineweb-10B", "", ["GPT-2 124M"]),
        ("fineweb-edu-10B", "", []),  # another validation split
        ("tinyshakespeare", "", []),
        ("tinyshakespeare", "hellaswag", ["GPT-2 124M", "GPT-3 125M"]),
    ],
)
def test_published_results_belong_to_their_data(tmp_path, text, task, expected):
    folder = runs.write(tmp_path / "one", steps=2, text=text)
    history = History(folder / "metrics.jsonl").read_all()
    history.tasks = {task: history.tasks["hellaswag"]} if task else {}
    assert [line["name"] for line in page.of_run(folder, history)["baselines"]] == expected


@pytest.mark.parametrize(("parameters", "name"), [(1, "124M"), (345e6, "350M"), (8e8, "774M"), (1e12, "1558M")])
def test_the_nearest_size_is_compared_with(tmp_path, parameters, name):
    folder = runs.write(tmp_path / "one", steps=2)
    (folder / "machine.json").write_text(json.dumps({"parameters": parameters}))
    baseline, *_ = page.of_run(folder, History(folder / "metrics.jsonl").read_all())["baselines"]
    assert baseline["name"] == f"GPT-2 {name}"


def test_the_data_survive_the_page_and_none_of_it_is_markup(tmp_path):
    folder = runs.write(tmp_path / "one", steps=2, note=runs.HOSTILE, sample=runs.HOSTILE)
    shown = page.of_run(folder, History(folder / "metrics.jsonl").read_all())
    text = page.render([shown]).decode()
    data = text.split('id="data">')[1].split("</script>")[0]
    assert not set("<>&\u2028\u2029") & set(data)
    assert json.loads(data)["runs"] == [json.loads(json.dumps(shown))]


def test_many_long_samples_are_some_of_them_cut_short(tmp_path):
    folder = runs.write(tmp_path / "one", steps=500, of=500)
    (folder / "samples.txt").write_text("".join(f"--- step {step}\n{'é' * 9000}\n\n" for step in range(300)))
    samples = page.of_run(folder, History(folder / "metrics.jsonl").read_all())["samples"]
    assert len(samples) == page.SAMPLES
    assert samples[-1] == {"step": 299, "text": "é" * page.SAMPLE_CHARACTERS}


@pytest.fixture
def server(tmp_path):
    opened = live_report.listen([runs.write(tmp_path / "one", steps=5)], 0)
    thread = threading.Thread(target=opened.serve_forever)
    thread.start()
    yield opened
    opened.shutdown()
    opened.server_close()
    thread.join()


def get(url, **headers):
    """Returns status and body."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def test_head_has_the_same_answer_without_its_body(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    with contextlib.closing(connection):
        for path in ("/", "/data.json", "/nothing"):  # on one connection, which a body would put out of step
            connection.request("GET", path)
            answer = connection.getresponse()
            expected = answer.status, answer.headers["Content-Type"]
            assert len(answer.read()) == int(answer.headers["Content-Length"])
            connection.request("HEAD", path)
            answer = connection.getresponse()
            assert (answer.status, answer.headers["Content-Type"]) == expected
            assert int(answer.headers["Content-Length"]) > 0  # not the same: the page tells how old the data are
            assert answer.read() == b""


def test_addresses_that_are_none_and_clients_that_leave_are_no_tracebacks(server, capsys):
    with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
        connection.sendall(b"GET http://[ HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n" % server.server_port)
        assert connection.recv(1000).startswith(b"HTTP/1.0 400")
    for _ in range(3):
        connection = socket.create_connection(("127.0.0.1", server.server_port))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing resets it
        connection.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n" % server.server_port)
        connection.close()
    assert get(server.url)[0] == 200
    assert "Traceback" not in capsys.readouterr().err


def test_a_slow_client_is_cut_off(server, monkeypatch):
    monkeypatch.setattr(live_report.Handler, "timeout", 0.3)
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as connection:
        with contextlib.suppress(OSError):
            for byte in b"GET / HTTP/1.1":
                connection.sendall(bytes([byte]))
                time.sleep(0.1)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(100) == b""


def test_the_server_is_this_machines_alone_and_answers_to_no_other_name(server):
    assert server.server_address[0] == "127.0.0.1"
    assert get(server.url, Host="evil.example")[0] == 403
    assert get(f"{server.url}data.json", Host=f"evil.example:{server.server_port}")[0] == 403


def test_the_server_serves_the_page_and_its_data_and_no_file(server):
    assert get(server.url)[1].startswith(b"<!doctype html>")
    status, body = get(f"{server.url}data.json")
    assert status == 200
    known = json.loads(body)
    assert known["runs"][0]["step"] == 5
    assert get(f"{server.url}data.json?version={known['version']}") == (204, b"")
    for path in ("config.toml", "../one/config.toml", "%2e%2e/config.toml", "report.html", "data.json/"):
        assert get(server.url + path)[0] == 404


def test_the_server_says_what_is_damaged_and_goes_on(server):
    folder = server.runs.folders[0]
    kept = (folder / "config.toml").read_bytes()
    (folder / "config.toml").write_bytes(b"x = ")
    status, body = get(server.url)
    assert status == 500
    assert b"not a TOML file" in body
    (folder / "config.toml").write_bytes(kept)
    assert get(server.url)[0] == 200
