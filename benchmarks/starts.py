"""Starts of runs on simulated devices, several side by side so that all cores are busy: how many succeed.

python -m benchmarks.starts [--count 100] [--at-once 2] [--stages 0,1,2,3] [--devices 8] [--config NAME] [OPTION ...]

Each is a run of four steps in a folder that is removed. What comes behind these options goes to `run.py`.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

LONGEST = 300  # seconds, after which a start counts as one that stands still


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in {"count": 100, "at-once": 2, "devices": 8}.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--stages", default="0,1,2,3")
    parser.add_argument("--config", default="quickstart")
    options, more = parser.parse_known_args()
    failures = 0
    for stage in options.stages.split(","):
        words = ["--config", options.config, "--training.steps", "4", "--parallel.zero", stage, *more]
        with ThreadPoolExecutor(options.at_once) as pool:
            found = list(pool.map(lambda _, words=words: start(words, options.devices), range(options.count)))
        bad = [message for _, message in found if message]
        failures += len(bad)
        print(
            f"stage {stage}: {len(found) - len(bad)} of {len(found)} starts ended well, {options.at_once} at once, "
            f"median {statistics.median(seconds for seconds, _ in found):.1f} s",
            flush=True,
        )
        for message in bad:
            print(f"  {message}", flush=True)
    return min(failures, 1)


def start(words: list[str], devices: int) -> tuple[float, str]:
    """Returns the seconds that a run took, and why it failed; "" if it didn't."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    root = Path(__file__).parent.parent
    with tempfile.TemporaryDirectory(prefix="jaxgpt-starts-") as folder:
        command = [sys.executable, root / "run.py", *words, "--run.folder", folder, "--run.name", "start"]
        began = time.perf_counter()
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LONGEST)
            message = f"status {done.returncode}: {done.stderr[:300]}" if done.returncode else ""
        except subprocess.TimeoutExpired:
            message = f"stood still for {LONGEST} s"
        return time.perf_counter() - began, message


if __name__ == "__main__":
    sys.exit(main())
