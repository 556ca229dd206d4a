"""Time that a run's steps lose to writing the run report while it trains.

python -m benchmarks.report [--config quickstart] [--steps 800] [--rounds 3] [--output F]

The same run with and without its report, in turn, each in a process of its own: the median time of a step, and the
processor time that the report's thread takes during the steps, of which a step can lose no more than that.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import machine
from jaxgpt import environment
from jaxgpt.runs.metrics_file import read_metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="quickstart")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", choices=["with", "without"], help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.config, options.steps, report=options.one == "with")))
        return
    found: dict[str, list[dict[str, float]]] = {"with": [], "without": []}
    for _ in range(options.rounds):
        for which, rounds in found.items():
            command = [sys.executable, "-m", "benchmarks.report", *sys.argv[1:], "--one", which]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")
            rounds.append(json.loads(done.stdout.splitlines()[-1]))
    median = {which: statistics.median(one["step_seconds"] for one in rounds) for which, rounds in found.items()}
    share = max(one["report_seconds"] / one["steps_seconds"] for one in found["with"])
    print(f"{options.config}, {options.steps} steps, {options.rounds} rounds, {machine.cpu_name()}")
    print(f"a step with the report {median['with'] * 1e3:.2f} ms, without {median['without'] * 1e3:.2f} ms (medians)")
    print(f"the report's thread took {share:.2%} of the steps' time, at most of the rounds")
    if options.output:
        about: dict[str, Any] = {"command": " ".join(["python", "-m", "benchmarks.report", *sys.argv[1:]])}
        about |= {"machine": machine.cpu_name(), "versions": machine.versions("jax", "numpy")}
        options.output.write_text(json.dumps(about | {"rounds": found, "share": share}, indent=1) + "\n")


def measure(config: str, steps: int, *, report: bool) -> dict[str, float]:
    """Runs training once, by the command that its users type; returns seconds."""
    environment.restart_with_allocator()
    from jaxgpt.commands import cli
    from jaxgpt.commands.trainer import Trainer
    from jaxgpt.reports import live_report

    marks: dict[str, float] = {}
    taken = 0.0

    def counted(method: Callable[..., Any]) -> Callable[..., Any]:
        """Adds up the time that it takes during the steps."""

        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal taken
            before = time.thread_time()
            result = method(*arguments, **options)
            if "begun" in marks and "ended" not in marks:
                taken += time.thread_time() - before
            return result

        return call

    def observe(trainer: Trainer, values: dict[str, Any]) -> None:
        if "loss" in values:
            marks.setdefault("begun", time.perf_counter())  # after the first step, which is compiled
            if values["step"] == steps:
                marks["ended"] = time.perf_counter()

    live_report.Report.read, live_report.Report.write = map(
        counted, (live_report.Report.read, live_report.Report.write)
    )
    with tempfile.TemporaryDirectory() as folder:
        words = ["--config", config, "--training.steps", str(steps), "--run.folder", folder, "--run.name", "one"]
        status = cli.main([*words, "--run.report" if report else "--run.no-report"], [observe])
        if status:
            raise SystemExit(status)
        lines = read_metrics(Path(folder) / "one" / "metrics.jsonl")
    seconds = [line["step_seconds"] for line in lines if "step_seconds" in line][1:]
    return {
        "step_seconds": statistics.median(seconds),
        "steps_seconds": marks["ended"] - marks["begun"],
        "report_seconds": taken,
    }


if __name__ == "__main__":
    main()
