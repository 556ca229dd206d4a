"""Fuzzes every reader of files from outside with damaged and hostile files.

python -m benchmarks.fuzz [--inputs 100000] [--engine mutations|atheris] [--seed 0] [--processes 1] [--output FILE]

Valid files are truncated, flipped, given wrong magic numbers, lying counts, huge and negative sizes, hostile names and
JSON without end (`mutations.py`); files become links, pipes and devices. With atheris (pip install -e .[fuzz]) the
coverage of the readers' code guides what is tried next. A reader may end with UserError or read the input. Anything
else counts as a failure: another exception, more than LIMIT_SECONDS, or more memory than the input's size and CONSTANT
bytes.
"""

import argparse
import base64
import collections
import concurrent.futures
import contextlib
import json
import multiprocessing
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import fuzz_llama, fuzz_readers, fuzz_tasks, fuzz_texts
from benchmarks.fuzz_readers import Input, Reader
from benchmarks.machine import cpu_name, versions
from benchmarks.mutations import Mutated, lay_out, mutate
from jaxgpt.errors import UserError

READERS = [*fuzz_readers.READERS, *fuzz_llama.READERS, *fuzz_texts.READERS, *fuzz_tasks.READERS]
LIMIT_SECONDS = 5.0  # of the processor's time
WAITING_SECONDS = 120.0  # of the clock's: a pipe that nobody writes into takes no other
CONSTANT = 64 << 20  # beside a file's size: Python's objects for its parts, and the padding of a token table
SPACE = 1 << 30  # what the process may map beside what it has at the start, for allocations that Python doesn't see


class Hang(BaseException):
    """Raised when an input takes too long, by the processor's time or by the clock's."""


class Trial:
    """Tries inputs, and counts what came of them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.slowest = self.largest = 0.0
        self.failures: list[dict[str, Any]] = []

    def add(self, other: "Trial") -> None:
        """Adds the counts of another's inputs."""
        for name, counts in other.counts.items():
            self.counts[name].update(counts)
        self.slowest, self.largest = max(self.slowest, other.slowest), max(self.largest, other.largest)
        self.failures += other.failures

    def try_one(self, reader: Reader, mutated: Mutated) -> str:
        """Tries one input and returns its outcome: "read", "refused", or what is wrong with the reader."""
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        size = lay_out(mutated, self.folder)
        reset_peak()
        resident = peak_resident()
        before = tracemalloc.get_traced_memory()[0]
        began = time.process_time()
        try:
            with time_limit(LIMIT_SECONDS):
                reader.read(self.folder)
            ended = "read"
        except UserError:
            ended = "refused"
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # pyo3's panics are no Exceptions
            ended = f"{type(error).__name__}: {error}"[:300]
        seconds = time.process_time() - began
        allocated = max(tracemalloc.get_traced_memory()[1] - before, peak_resident() - resident)
        if allocated > size + CONSTANT:
            ended = f"{allocated:,} bytes allocated for {size:,}"
        self.slowest, self.largest = max(self.slowest, seconds), max(self.largest, allocated - size)
        failed = ended not in ("read", "refused")
        self.counts[reader.name]["failed" if failed else ended] += 1
        if failed:
            self.failures.append({"reader": reader.name, "ended": ended, "input": _printable(mutated)})
            print(f"{reader.name}: {ended}", file=sys.stderr, flush=True)
        return ended


def reset_peak() -> None:
    """Resets the peaks of Python's memory and of the process's."""
    tracemalloc.reset_peak()
    Path("/proc/self/clear_refs").write_text("5")


def peak_resident() -> int:
    """Returns the most bytes that the process had in memory since `reset_peak`: those of C and C++ code too."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang("too long")

    timers = {
        signal.SIGPROF: (signal.ITIMER_PROF, seconds),
        signal.SIGALRM: (signal.ITIMER_REAL, WAITING_SECONDS),
    }
    before = {number: signal.signal(number, stop) for number in timers}
    for timer, limit in timers.values():
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


@contextlib.contextmanager
def trial() -> Iterator[Trial]:
    """Yields a trial in a folder that is deleted in the end, with memory traced."""
    memory = Path("/dev/shm")  # where a file costs little
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        tracemalloc.start()
        try:
            yield Trial(Path(name))
        finally:
            tracemalloc.stop()


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Limits the address space to SPACE more than it is now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + SPACE, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _printable(mutated: Mutated) -> dict[str, str]:
    return {
        name: content if isinstance(content, str) else base64.b64encode(content[:4000]).decode()
        for name, content in mutated.items()
    }


def by_mutations(inputs: int, seed: int) -> Trial:
    choose = random.Random(seed)
    seeds = {reader.name: reader.seeds() for reader in READERS}
    with limited(), trial() as result:
        for number in range(inputs):
            reader = READERS[number % len(READERS)]
            result.try_one(reader, mutate(choose.choice(seeds[reader.name]), choose))
            if number % 10000 == 9999:
                print(
                    f"seed {seed}: {number + 1:,} inputs, {len(result.failures)} failures", file=sys.stderr, flush=True
                )
        return result


def in_processes(inputs: int, seed: int, processes: int) -> Trial:
    """Runs `by_mutations` in several processes, each with a share of the inputs and a seed of its own."""
    if processes == 1:
        return by_mutations(inputs, seed)
    shares = [inputs // processes + (number < inputs % processes) for number in range(processes)]
    result = Trial(Path())
    with concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for part in pool.map(by_mutations, shares, range(seed, seed + processes)):
            result.add(part)
    return result


def by_atheris(inputs: int, seed: int) -> Trial:
    """The first byte of an input names the reader and the second which of its files is the rest."""
    import atheris

    for module in sorted(name for name in sys.modules if name.startswith("jaxgpt.interop")):
        for value in vars(sys.modules[module]).values():
            if getattr(value, "__module__", None) == module and callable(value) and hasattr(value, "__code__"):
                atheris.instrument_func(value)  # type: ignore[attr-defined]
    cases: list[tuple[Reader, Input, str]] = [
        (reader, files, name) for reader in READERS for files in reader.seeds() for name in sorted(files)
    ]
    with tempfile.TemporaryDirectory() as corpus, limited(), trial() as result:
        for number, (_, files, name) in enumerate(cases):
            (Path(corpus) / str(number)).write_bytes(bytes([number]) + files[name])

        def one(data: bytes) -> None:
            if data:
                reader, files, name = cases[data[0] % len(cases)]
                result.try_one(reader, {**files, name: data[1:]})

        limits = [f"-atheris_runs={inputs}", f"-seed={seed + 1}", "-max_len=60000", f"-artifact_prefix={corpus}/"]
        atheris.Setup([sys.argv[0], *limits, corpus], one)
        with contextlib.suppress(SystemExit):
            atheris.Fuzz()
        return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--engine", choices=("auto", "mutations", "atheris"), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="number of processes that try mutations")
    parser.add_argument("--output", type=Path, help="write the counts to this JSON file")
    options = parser.parse_args()
    engine = options.engine
    if engine == "auto":
        import importlib.util

        engine = "atheris" if importlib.util.find_spec("atheris") else "mutations"
    began = time.perf_counter()
    if engine == "atheris":
        result = by_atheris(options.inputs, options.seed)
    else:
        result = in_processes(options.inputs, options.seed, options.processes)
    figures = {
        "engine": engine,
        "inputs": sum(counts.total() for counts in result.counts.values()),
        "failures": len(result.failures),
        "readers": {name: dict(sorted(counts.items())) for name, counts in sorted(result.counts.items())},
        "slowest_seconds": round(result.slowest, 3),
        "most_bytes_beyond_the_input": int(result.largest),
        "seconds": round(time.perf_counter() - began, 1),
        "machine": cpu_name(),
        "versions": versions("numpy", "safetensors", "pyarrow"),
    }
    print(json.dumps(figures, indent=2))
    for failure in result.failures[:20]:
        print(json.dumps(failure))
    if options.output:
        known = json.loads(options.output.read_text()) if options.output.exists() else {}
        options.output.write_text(json.dumps(known | {engine: figures}, indent=2) + "\n")
    return 1 if result.failures else 0


if __name__ == "__main__":
    sys.exit(main())
