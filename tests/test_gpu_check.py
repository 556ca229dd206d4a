"""scripts/gpu_check.sh: that it runs to its end without a GPU, and that a part that fails doesn't end the others."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_program import compile

ROOT = Path(__file__).parents[1]


def check(folder, python=sys.executable, **environment):
    """The script's status, and for each part how it ended."""
    own = {"TINY": "1", "JAX_PLATFORMS": "cpu", "PYTHON": str(python), **environment}
    # What conftest.py has set for this process would be another program there.
    inherited = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run([ROOT / "scripts/gpu_check.sh", folder], env=inherited | own, capture_output=True, text=True)
    lines = (folder / "summary.txt").read_text().splitlines()
    return done.returncode, {match[1]: match[2] for line in lines if (match := re.match(r"(\S+) +\d+ s  (.*)", line))}


@pytest.mark.slow
def test_it_runs_to_its_end(tmp_path):
    status, parts = check(tmp_path)
    without = {"compared": "left out: --compute.kernels pallas can't run here."}
    if compile.missing():
        without["bound"] = "left out: error: compiling for a GPU needs JAX's CUDA plugin"
    for name, ended in parts.items():
        assert ended.startswith(without.get(name, "ok")), (name, ended, (tmp_path / f"{name}.txt").read_text()[-2000:])
    assert status == 0
    assert list(parts)[:3] == ["machine", "compared", "gradients"]
    assert list(parts)[-2:] == ["bench_1x32", "bench_large"]
    assert "the same bits in every tensor" in (tmp_path / "same.txt").read_text()
    assert (tmp_path / "runs/trained/loss.png").exists()
    kinds = json.loads((tmp_path / "kernels.json").read_text())["kinds"]
    assert sum(kind["milliseconds"] for kind in kinds) > 0
    (ours, automatic) = json.loads((tmp_path / "bench_large.json").read_text())
    assert (ours["who"], automatic["who"]) == ("ours", "jax.grad")


def stand_in(folder, lines):
    """A program in the place of Python."""
    path = folder / "python"
    path.write_text(f"#!/bin/bash\n{lines}\n")
    path.chmod(0o755)
    return path


def test_a_part_that_fails_does_not_end_the_others(tmp_path):
    python = stand_in(tmp_path, '[[ "$*" == *gradcheck* ]] && { echo "it is wrong"; exit 1; }; exit 0')
    status, parts = check(tmp_path, python)
    assert status == 1
    assert parts.pop("gradients") == "failed with status 1: it is wrong"
    assert set(parts.values()) == {"ok"}
    assert len(parts) == 14


@pytest.mark.slow
def test_the_time_for_all_parts_is_limited(tmp_path):
    python = stand_in(tmp_path, '[[ "$*" == *gradcheck* ]] && exec sleep 60; exit 0')
    status, parts = check(tmp_path, python, BUDGET="6")
    assert status == 1
    assert re.match("stopped after [56] s", parts["gradients"])
    assert parts["bench_large"] == "not begun: the 6 s are over"


def test_one_part_alone(tmp_path):
    status, parts = check(tmp_path, stand_in(tmp_path, "exit 0"), PARTS="generate")
    assert (status, parts) == (0, {"generate": "ok"})
