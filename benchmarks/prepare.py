"""The rate of `run.py prepare` beside tiktoken's own batch encoder, on the same text and the same cores.

    python -m benchmarks.prepare [--megabytes 200] [--output benchmarks/results/prepare.json]

The text is made of tiny Shakespeare or the embedded text: paragraphs drawn by a fixed seed, in documents of about 3 kB,
as JSON lines. tiktoken is given them as strings that are in memory already, and its lists are thrown away. `prepare` is
given the file, and does all of its work: it starts its processes, reads, parses, encodes, writes shards, makes their
checksums and syncs them to the disk. In turn, so that a drift of the machine's speed hits both alike.

Then the loader, on the token files just made: how long a batch of llm.c's 124M recipe takes to make.
"""

import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import tyro

from benchmarks.machine import cpu_name, versions
from jaxgpt.commands import prepare
from jaxgpt.data import corpora, corpus, encodings, loader, manifest

ROOT = Path(__file__).parent.parent
DOCUMENT_BYTES = 3000


@dataclass(frozen=True)
class Options:
    text: str = "embedded"
    """Text to prepare: embedded or tinyshakespeare."""
    megabytes: int = 100
    """Size of the text, in megabytes."""
    rounds: int = 3
    """Number of times that each is timed."""
    output: str = ""
    """Write the figures to this JSON file."""


def documents(name: str, size: int) -> list[str]:
    """Returns documents of `size` bytes together, of paragraphs in a random order."""
    paragraphs, draw = corpora.load(name).split("\n\n"), random.Random(0)
    made, total = [], 0
    while total < size:
        parts, length = [], 0
        while length < DOCUMENT_BYTES:
            parts.append(draw.choice(paragraphs))
            length += len(parts[-1])
        made.append("\n\n".join(parts))
        total += len(made[-1].encode())
    return made


class Clock:
    """A context manager: the seconds that passed in it, and those in which a processor was at work for it."""

    def __init__(self, who: int) -> None:
        self.who, self.seconds, self.cpu_seconds, self.peak_bytes = who, 0.0, 0.0, 0

    def _busy(self) -> float:
        usage = resource.getrusage(self.who)
        return usage.ru_utime + usage.ru_stime

    def __enter__(self) -> "Clock":
        self.seconds, self.cpu_seconds = -time.perf_counter(), -self._busy()
        return self

    def __exit__(self, *exception: object) -> None:
        self.seconds += time.perf_counter()
        self.cpu_seconds += self._busy()


def memory_of(pid: int) -> int:
    """Returns the bytes in memory of a process and all that it started; each counts the pages that they share."""
    try:
        process = psutil.Process(pid)
        return sum(part.memory_info().rss for part in (process, *process.children(recursive=True)))
    except psutil.NoSuchProcess:
        return 0


def time_tiktoken(made: list[str], cores: int) -> tuple[Clock, int]:
    """Returns its time, and the number of tokens."""
    encoding = encodings.gpt2()
    with Clock(resource.RUSAGE_SELF) as clock:
        encoded = encoding.encode_ordinary_batch(made, num_threads=cores)
    return clock, sum(map(len, encoded))


def time_prepare(source: Path, folder: Path, cores: int) -> tuple[Clock, int]:
    """Returns the time of the whole command, and the number of tokens without those that separate documents."""
    words = ["prepare", str(source), "--output", str(folder), "--processes", str(cores)]
    with Clock(resource.RUSAGE_CHILDREN) as clock:
        process = subprocess.Popen([sys.executable, "run.py", *words], cwd=ROOT, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            clock.peak_bytes = max(clock.peak_bytes, memory_of(process.pid))
            time.sleep(0.05)
    if process.returncode:
        raise SystemExit("prepare failed")
    made = manifest.read(folder)
    return clock, made.tokens("train") + made.tokens("val") - made.documents


def time_loader(folder: Path, batches: int = 20) -> float:
    """Returns the median seconds for a batch of 524,288 tokens."""
    found = corpus.find_token_files(str(folder))
    assert found is not None
    seconds = []
    for step in range(batches):
        started = time.perf_counter()
        loader.batch_at(found.train, step=step, micro_batches=8, batch_size=64, sequence_length=1024, seed=0)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    cores = prepare.cores()
    made = documents(options.text, options.megabytes * 10**6)
    size = sum(len(text.encode()) for text in made)
    theirs: list[Clock] = []
    ours: list[Clock] = []
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary, "text.jsonl")
        source.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in made))
        for number in range(options.rounds):
            clock, count = time_tiktoken(made, cores)
            theirs.append(clock)
            clock, own_count = time_prepare(source, Path(temporary, str(number)), cores)
            ours.append(clock)
            if count != own_count:
                raise SystemExit(f"tiktoken made {count:,} tokens, and prepare {own_count:,}")
            rates = [size / clock.seconds / 1e6 for clock in (theirs[-1], ours[-1])]
            print(f"round {number + 1}: tiktoken {rates[0]:.2f} MB/s, prepare {rates[1]:.2f} MB/s")
        batch_seconds = time_loader(Path(temporary, "0"))
    their_best, our_best = (min(clock.seconds for clock in clocks) for clocks in (theirs, ours))
    ratio = their_best / our_best
    figures = {
        "text": options.text,
        "bytes": size,
        "documents": len(made),
        "cores": cores,
        "tiktoken_seconds": [clock.seconds for clock in theirs],
        "tiktoken_cpu_seconds": [clock.cpu_seconds for clock in theirs],
        "prepare_seconds": [clock.seconds for clock in ours],
        "prepare_cpu_seconds": [clock.cpu_seconds for clock in ours],
        "tiktoken_bytes_per_second": size / their_best,
        "prepare_bytes_per_second": size / our_best,
        "prepare_of_tiktoken": ratio,
        "loader_seconds_per_batch_of_524288_tokens": batch_seconds,
        "prepare_peak_mib": max(clock.peak_bytes for clock in ours) / 2**20,
        "cpu": cpu_name(),
        "versions": versions("jaxgpt", "tiktoken", "numpy"),
    }
    print(
        f"prepare reaches {ratio:.1%} of tiktoken's rate; a batch of 524,288 tokens takes {1e3 * batch_seconds:.1f} ms"
    )
    if options.output:
        Path(options.output).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
