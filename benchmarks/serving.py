"""The server under load: 64 clients on this machine, with and without hostile ones.

    python -m benchmarks.serving

A model of 4 layers and width 128 with random weights is served by `run.py serve`. Each client asks for a text of 24
tokens, and for the next one as soon as it has it. Meanwhile /health is asked every 20 ms, each time on a new
connection. This goes on for 15 seconds, and again for 15 with 40 connections that send a byte a second, and with bodies
of a megabyte, one after the other, that hold as many prompts, lists or chunks as they can.

Prints requests a second, the times that half and 99 in 100 of them took at most, and the slowest answer of /health;
1 where that took 0.2 s or more, or a request of a client wasn't answered. Writes results/serving.json.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from benchmarks import machine

RESULT = Path(__file__).parent / "results" / "serving.json"
RUN = Path(__file__).resolve().parent.parent / "run.py"
CLIENTS, TOKENS, SLOW = 64, 24, 40
MOST_HEALTH_SECONDS = 0.2
JSON = "Host: localhost\r\nContent-Type: application/json\r\n"


def with_body(body: bytes, more: str = "") -> bytes:
    return f"POST /v1/completions HTTP/1.1\r\n{JSON}{more}Content-Length: {len(body)}\r\n\r\n".encode() + body


HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
HOSTILE = [
    with_body(json.dumps({"model": "tiny", "prompt": prompt}).encode(), "Connection: close\r\n")
    for prompt in (["a"] * 200_000, [[]] * 250_000, [1] * 340_000, "a" * 1_000_000, [{}] * 250_000)
]
HOSTILE.append(
    f"POST /v1/completions HTTP/1.1\r\n{JSON}Transfer-Encoding: chunked\r\n\r\n".encode() + 99_999 * b"1\r\na\r\n"
)


class Client:
    """A connection on which one request follows the other."""

    def __init__(self, port: int):
        self._port = port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def ask(self, request: bytes) -> int:
        """Returns the status of the answer, once it has come whole."""
        if self._reader is None or self._writer is None:
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._writer.write(request)
        await self._writer.drain()
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: (\d+)", head)
        await self._reader.readexactly(int(length[1]) if length else 0)
        return int(head.split()[1])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None


async def until(end: float, act: Callable[[], Awaitable[None]]) -> None:
    while time.monotonic() < end:
        await act()


class Load:
    """Measurements that clients make of a server over some seconds."""

    def __init__(self, port: int):
        self._port = port
        self.seconds: list[float] = []
        self.health: list[float] = []
        self.failed = 0

    async def run(self, seconds: float, hostile: bool) -> None:
        end = time.monotonic() + seconds
        tasks = [self._client(number, end) for number in range(CLIENTS)] + [until(end, self._ask_health)]
        if hostile:
            tasks += [until(end, self._slow) for _ in range(SLOW)] + [until(end, self._hostile)]
        await asyncio.gather(*tasks)

    async def _client(self, number: int, end: float) -> None:
        client = Client(self._port)
        prompt = "to be or not to be "[: 1 + number % 19]

        async def act() -> None:
            body = json.dumps({"model": "tiny", "prompt": prompt, "max_tokens": TOKENS}).encode()
            started = time.perf_counter()
            try:
                self.failed += await client.ask(with_body(body)) != 200
            except (OSError, EOFError):
                self.failed += 1
                client.close()
            self.seconds.append(time.perf_counter() - started)

        await until(end, act)
        client.close()

    async def _ask_health(self) -> None:
        client, started = Client(self._port), time.perf_counter()
        self.failed += await client.ask(HEALTH) != 200
        self.health.append(time.perf_counter() - started)
        client.close()
        await asyncio.sleep(0.02)

    async def _slow(self) -> None:
        """Sends a header byte by byte, until it is cut off."""
        _, writer = await asyncio.open_connection("127.0.0.1", self._port)
        with contextlib.suppress(OSError):
            for byte in b"GET /health HTTP/1.1":
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(1)
        writer.close()

    async def _hostile(self) -> None:
        for request in HOSTILE:
            client = Client(self._port)
            with contextlib.suppress(OSError, EOFError):  # cut off while it sent
                await client.ask(request)
            client.close()

    def figures(self, seconds: float) -> dict[str, float]:
        percentiles = statistics.quantiles(self.seconds, n=100)
        return {
            "requests_per_second": len(self.seconds) / seconds,
            "p50_seconds": percentiles[49],
            "p99_seconds": percentiles[98],
            "slowest_health_seconds": max(self.health),
            "failed": self.failed,
        }


def train(folder: Path) -> None:
    """Trains a run of one step."""
    (folder / "text.txt").write_text("to be or not to be, that is the question\n" * 500)
    words = ["--config", "quickstart", "--data.text", "text.txt", "--training.steps", "1", "--run.name", "tiny"]
    subprocess.run([sys.executable, RUN, *words], cwd=folder, check=True, stdout=subprocess.DEVNULL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15.0, help="seconds of each of the two loads")
    seconds = parser.parse_args().seconds
    result: dict[str, object] = {"clients": CLIENTS, "tokens": TOKENS, "seconds": seconds}
    passed = True
    with tempfile.TemporaryDirectory(prefix="jaxgpt-serving-") as name:
        train(Path(name))
        command = [sys.executable, RUN, "serve", "--run", "runs/tiny", "--port", "0", "--per-minute", "0"]
        with subprocess.Popen(command, cwd=name, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            found = re.search(r":(\d+)/v1 ", server.stdout.readline())
            assert found is not None, "the server didn't start"
            port = int(found[1])
            try:
                asyncio.run(Load(port).run(seconds / 3, False))  # compiles
                for load, hostile in (("clients", False), ("with_hostile_ones", True)):
                    measured = Load(port)
                    asyncio.run(measured.run(seconds, hostile))
                    figures = measured.figures(seconds)
                    passed &= not measured.failed and figures["slowest_health_seconds"] < MOST_HEALTH_SECONDS
                    result[load] = figures
                    print(f"{load:18} " + ", ".join(f"{key} {value:.3g}" for key, value in figures.items()), flush=True)
            finally:
                server.terminate()
    result |= {
        "passed": passed,
        "cpu": machine.cpu_name(),
        "cores": os.cpu_count(),
        "versions": machine.versions("jax", "jaxlib", "uvicorn", "starlette", "h11"),
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{'passed' if passed else 'FAILED'}; written to {RESULT}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
