"""Processes find each other; here they are threads."""

import contextlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxgpt.errors import JaxgptError, RunError, UserError
from jaxgpt.parallel import meeting
from jaxgpt.parallel.cluster import Place
from tests.parallel.several import free_port


@pytest.fixture
def port():
    return free_port()


@pytest.fixture
def soon(monkeypatch):
    """Shortens the waiting times."""
    monkeypatch.setattr(meeting, "START_SECONDS", 0.5)
    monkeypatch.setattr(meeting, "GREETING_SECONDS", 0.2)


def met(port: int, *processes: tuple[int, int]) -> list[JaxgptError | None]:
    """Returns the error that each of the processes (count, number) ends with; None where it has met the others."""

    def one(process):
        count, number = process
        try:
            meeting.meet(Place(f"localhost:{port}", count, number, "options"))
        except JaxgptError as error:
            return error
        return None

    with ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(one, processes))


def test_all_meet_and_the_port_is_free_again(port):
    """Process 0 comes last, and a stranger in between."""
    with ThreadPoolExecutor(1) as pool:
        others = pool.submit(met, port, *[(9, number) for number in range(8, 0, -1)])
        time.sleep(0.1)
        with ThreadPoolExecutor(1) as first:
            found = first.submit(met, port, (9, 0))
            for _ in range(100):
                with contextlib.suppress(OSError), socket.create_connection(("localhost", port), 1) as stranger:
                    stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
                    break
            assert found.result() == [None]
        assert others.result() == [None] * 8
    socket.create_server(("", port)).close()


def test_one_alone_waits_for_nobody(port):
    assert met(port, (1, 0)) == [None]


def assert_all(found, kind, message):
    assert {type(error) for error in found} == {kind}
    assert {str(error).removeprefix("process 0 says: ") for error in found} == {message}


def test_two_with_one_number(port):
    """All three learn of it, and none waits for the process that is missing."""
    found = met(port, (3, 0), (3, 1), (3, 1))
    assert_all(found, UserError, "two processes were started as number 1 of 3: each needs a number of its own")


def test_two_counts(port):
    message = "process 1 was started as one of 2 processes, and process 0 as one of 3: give all of them the same "
    assert_all(met(port, (3, 0), (2, 1)), UserError, f"{message}--parallel.processes")


def test_who_is_missing_is_named(port, soon):
    found = met(port, (12, 0), (12, 3))
    message = f"process 0 of 12 (options) waited 0.5 seconds at localhost:{port} for processes 1, 2, 4, 5, 6, 7, 8, 9 "
    message += "and 2 more. Were all of them started, with that address, and is the port open to them?"
    assert_all(found, RunError, message)


def come(port: int, number: int) -> socket.socket:
    """Connects to process 0 of 4 as this one."""
    while True:
        with contextlib.suppress(OSError):
            link = socket.create_connection(("localhost", port), 5)
            assert link.recv(7) == meeting.GREETING
            link.sendall(f"4 {number}\n".encode())
            return link


def test_one_that_ends_before_all_have_met(port):
    """It says who it is, and its connection is closed."""
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(met, port, (4, 0))
        with come(port, 2) as other:
            come(port, 1).close()
            assert_all(found.result(), RunError, "process 1 has ended before all 4 had met")
            assert other.recv(meeting.LINE) == b"1 process 1 has ended before all 4 had met\n"


@contextlib.contextmanager
def listening(port: int, answer: bytes, seconds: float):
    """Answers whoever connects with this, and closes the connection after a while."""
    done = threading.Event()

    def serve():
        while not done.is_set():
            with contextlib.suppress(OSError):
                link, _ = server.accept()
                with link:
                    link.sendall(answer)
                    done.wait(seconds)

    with socket.create_server(("127.0.0.1", port)) as server:
        server.settimeout(0.05)
        thread = threading.Thread(target=serve)
        thread.start()
        yield
        done.set()
        thread.join()


def test_the_first_ends_before_all_have_met(port):
    with listening(port, meeting.GREETING, 0.1):
        assert_all(met(port, (3, 1)), RunError, "process 0 has ended before all 3 had met")


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\xff" * 5000])
def test_another_program_at_the_port(port, soon, answer):
    """Process 0 says that the port is taken; the others that it is not process 0 which they found."""
    with listening(port, answer, 1):
        (first,) = met(port, (2, 0))
        (other,) = met(port, (2, 1))
    assert (
        str(first)
        == f"process 0 of 2 (options) can't listen at localhost:{port}: Address already in use. Is the port free?"
    )
    assert isinstance(other, RunError)
    assert str(other).startswith(
        f"process 1 of 2 (options) waited 0.5 seconds for process 0 at localhost:{port}: another program listens there."
    )


def test_nobody_at_the_port(port, soon):
    (error,) = met(port, (2, 1))
    assert isinstance(error, RunError)
    assert f"for process 0 at localhost:{port}: Connection refused. Was it started" in str(error)


def test_the_time_to_start_in_is_the_users(port, monkeypatch):
    monkeypatch.setenv(meeting.SECONDS_VARIABLE, "1")
    (error,) = met(port, (2, 1))
    assert isinstance(error, RunError)
    assert "waited 1 seconds for process 0" in str(error)
    monkeypatch.setenv(meeting.SECONDS_VARIABLE, "soon")
    (error,) = met(port, (2, 1))
    assert isinstance(error, UserError)
    assert meeting.SECONDS_VARIABLE in str(error)
