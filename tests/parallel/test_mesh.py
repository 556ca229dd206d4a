"""How many devices a run takes, and whole runs on several of them."""

import contextlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxgpt.commands import cli
from jaxgpt.errors import UserError
from jaxgpt.options.config import Model, Parallel
from jaxgpt.parallel import mesh
from jaxgpt.runs import checkpoints

pytestmark = pytest.mark.usefixtures("quickly_compiled")

STEPS = 8
OPTIONS = {
    "model.layers": 1,
    "model.heads": 1,
    "model.width": 9,
    "model.context": 8,
    "compute.recompute": "none",
    "data.text": "text.txt",
    "data.tokenizer": "bytes",
    "training.steps": STEPS,
    "training.batch-size": 8,
    "training.evaluate-every": 0,
    "training.evaluation-batches": 2,
    "optimizer.learning-rate": 0.01,
    "sampling.tokens": 4,
    "checkpoint.every-steps": 4,
}


@pytest.fixture(scope="module", autouse=True)
def work(tmp_path_factory):
    """A folder with text.txt, which is the current folder of these tests."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "text.txt").write_text("the cat sat on the mat and saw a red hat\n" * 50)
    with contextlib.chdir(folder):
        yield folder


def run(name: str, devices: int, zero: int, *more: str) -> Path:
    options = OPTIONS | {"run.name": name, "parallel.devices": devices, "parallel.zero": zero}
    assert cli.main([*(word for key, value in options.items() for word in (f"--{key}", str(value))), *more]) == 0
    return Path("runs", name)


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line.get("loss", line.get("val_loss")) for line in lines]


def params(folder: Path):
    return checkpoints.load_params(folder, Model(layers=1, heads=1, width=9, context=8, vocabulary_size=0))[0]


@pytest.mark.slow
def test_a_run_goes_on_with_other_devices_and_another_stage(capsys):
    """From 8 devices in stage 3 to 2 in stage 1, and from those to one: the run never stopped, but rounding."""
    whole = run("whole", 1, 0)
    part = run("part", 8, 3)
    assert "8 devices, ZeRO stage 3" in capsys.readouterr().out
    for devices, zero in [(2, 1), (1, 0)]:
        last = sorted(int(path.name) for path in (part / "checkpoints").iterdir())[-1]
        assert last == STEPS
        for name in ("params", "optimizer", "about", "SHA256SUMS"):
            path = part / "checkpoints" / str(last) / name
            assert path.exists()
        (part / "checkpoints" / str(last) / "SHA256SUMS").unlink()  # so that the one of step 4 is the last
        run("part", devices, zero, "--resume")
        assert f"changed   --parallel.devices was 8 and is {devices}" in capsys.readouterr().out
        np.testing.assert_allclose(losses(part), losses(whole), rtol=1e-4)
        for a, b in zip(*map(jax.tree.leaves, (params(part), params(whole))), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-4)


def test_a_micro_batch_that_cannot_be_divided_is_refused(fails):
    words = ["--data.text", "text.txt", "--parallel.devices", "3", "--training.batch-size", "8"]
    message = fails(*words, "--run.name", "uneven")
    assert "--training.batch-size is 8, and must be divisible by the number of devices, 3" in message
    assert not Path("runs/uneven").exists()


def test_more_devices_than_there_are():
    with pytest.raises(UserError, match=r"--parallel.devices is 9, and there are 8 \(cpu\)"):
        mesh.make(Parallel(devices=9))


def test_devices_are_taken_in_their_order(monkeypatch):
    assert list(mesh.make(Parallel(devices=2)).devices.flat) == jax.devices()[:2]
    monkeypatch.undo()
    monkeypatch.setattr(mesh, "available", lambda: len(jax.devices()))
    assert mesh.make(Parallel()).size == 8
