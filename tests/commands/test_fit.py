"""Whole runs with `compute.fit`: what they print, what they train, resuming with another size, and under a limit."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxgpt.commands import cli, other_times
from jaxgpt.options import settings
from jaxgpt.options.config import Compute, Config, Model, Training
from jaxgpt.training import fit, resharding
from tests import small_run
from tests.small_run import run

ROOT = Path(cli.__file__).resolve().parents[2]
OPTIONS = {"training.steps": 3, "training.batch-size": 8, "sampling.tokens": 4, "training.evaluation-batches": 2}
MEMORY = Path("/sys/fs/cgroup/memory")  # of Linux's control groups, version 1


@pytest.fixture(scope="module", autouse=True)
def work(tmp_path_factory):
    """A folder with text.txt, which is the current folder of these tests."""
    with small_run.in_folder(tmp_path_factory.mktemp("work")) as folder:
        yield folder


def words(**changes) -> list[str]:
    return small_run.words(OPTIONS, **changes)


def chosen(printed: str) -> str:
    """Returns the choice, as the table on the terminal has it."""
    (line,) = (line for line in printed.splitlines() if line.endswith("compiled, fits"))
    return line.split("  ")[5]


def plan_of(folder: Path) -> dict:
    return json.loads((folder / "memory_plan.json").read_text())


@pytest.mark.slow
def test_a_run_that_fits_is_the_same_run():
    """A run with memory for half of its micro-batch has the losses of the run without a limit, but for rounding."""
    plain, ample = run(words(), "plain"), run(words(compute_fit="1GB"), "ample")
    small = (plan_of(ample.folder)["need"] - 1) / 0.97 / 1e6  # too little for what is the fastest
    found = run(words(compute_fit=f"{small:.6f}MB"), "fits")
    assert (found.status, found.errors) == (0, "")
    assert chosen(ample.printed).startswith("1 x 8 sequences, recompute none, chunk 2,048")
    assert not chosen(found.printed).startswith("1 x 8 sequences, recompute none, chunk 2,048")
    for one in (ample, found):
        for name in ("loss", "val_loss"):
            values = [[line[name] for line in of.metrics if name in line] for of in (one, plain)]
            assert values[0] == pytest.approx(values[1], rel=1e-5)
    plan = plan_of(found.folder)
    assert plan["need"] <= plan["capacity"] == pytest.approx(0.97 * small * 1e6, abs=1)  # whole bytes
    assert plan["source"] == "97% of --compute.fit"
    kept = settings.read(found.folder / "config.toml")
    assert (kept.training.batch_size, kept.training.micro_batches) == (8, 1)  # what was asked for


@pytest.mark.slow
def test_a_run_is_resumed_with_another_size():
    """It chooses anew and says so; options that were given stay the same."""
    begun = run(words(compute_fit="1GB", compute_recompute="gelu", training_steps=2), "resumed")
    assert "kept as given: compute.recompute = gelu" in begun.printed
    small = plan_of(begun.folder)["need"] / 1e6
    on = run(["--resume", "runs/resumed", "--compute.fit", f"{small:.6f}MB", "--training.steps", "3"], "resumed")
    assert on.status == 2  # --resume FOLDER says already which run goes on
    assert cli.main(["--resume", "runs/resumed", "--compute.fit", f"{small:.6f}MB", "--training.steps", "3"]) == 0
    start = (begun.folder / "start.txt").read_text()
    assert "resuming after step 2" in start
    assert "changed   --compute.fit was 1GB" in start
    assert "recompute gelu" in chosen(start)
    assert not chosen(start).startswith("1 x 8")


def test_a_run_that_fits_nowhere_is_refused_before_anything_is_written(work, fails):
    message = fails(*words(compute_fit="0.1MB"), "--run.name", "refused")
    assert message.startswith("error: --compute.fit 0.1MB: the least that this run needs on a device is ")
    assert "What would help, and the least then, about:" in message
    assert not (work / "runs" / "refused").exists()


# What else a run needs


CONFIG = Config(
    model=Model(layers=2, heads=2, width=32, context=16, vocabulary_size=130),
    compute=Compute(dtype="bfloat16", classifier_chunk=32, attention_block=16, attention="blocks"),
    training=Training(batch_size=4, sequence_length=16),
)


def else_of(config: Config, devices: int = 1, *, cpu: bool = False, **sections):
    return other_times.elsewhere(settings_with(config, **sections), devices, cpu=cpu)


def settings_with(config: Config, **sections) -> Config:
    from jaxgpt.options.fit import changed

    return changed(config, **sections)


def test_drawing_text_needs_the_parameters_whole():
    """A device has an eighth of them at stage 3, and needs all of them, in the dtype of drawing, to draw."""
    numbers = sum(x.size for x in parameters())
    alone = else_of(CONFIG, 8, parallel={"zero": 0}).times["drawing text"]
    sharded = else_of(CONFIG, 8, parallel={"zero": 3}).times["drawing text"]
    assert alone - 12 * numbers == pytest.approx(sharded - 12 * numbers / 8, rel=0.05)  # both have a copy in bfloat16
    assert alone > (12 + 2) * numbers


def parameters() -> list:
    from jaxgpt.training.state import layout_without_devices

    return jax.tree.leaves(layout_without_devices(CONFIG, 1).shapes)


def test_a_policy_has_its_reference_beside_it_throughout():
    """The reference is a second copy of the trained parameters, sharded alike; without a divergence there is none."""
    numbers = sum(x.size for x in parameters())
    for section, devices in (({"kl_penalty": 0.1}, 1), ({"kl_coefficient": 0.1}, 8)):
        asked = {"objective": {"name": "policy", "reward": "exact"} | section, "parallel": {"zero": 1}}
        without = {"objective": {"name": "policy", "reward": "exact"}, "parallel": {"zero": 1}}
        near, free = else_of(CONFIG, devices, **asked), else_of(CONFIG, devices, **without)
        reference = near.beside["the reference"]
        assert reference == pytest.approx(4 * numbers / devices, rel=0.02)
        assert "the reference" not in free.beside
        assert {name: size - free.times[name] for name, size in near.times.items()} == dict.fromkeys(
            free.times, reference
        )


def test_a_cpu_has_a_checkpoint_beside_a_step():
    numbers = sum(x.size for x in parameters())
    assert else_of(CONFIG, cpu=True).beside["a checkpoint that is written"] == 12 * numbers
    assert "a checkpoint that is written" not in else_of(CONFIG).beside


def test_tasks_are_scored_beside_the_state():
    few, many = (
        else_of(CONFIG, evaluation={"tasks": "piqa=x", "batch_size": size}).times["scoring tasks"] for size in (1, 16)
    )
    assert many > few
    assert "scoring tasks" not in else_of(CONFIG).times


@pytest.mark.parametrize(("zero", "devices"), [(0, 2), (1, 2), pytest.param(3, 4, marks=pytest.mark.slow)])
def test_saving_takes_what_its_program_takes(zero, devices):
    """The state and its copy in a checkpoint's layout, at least as much as the compiled program needs."""
    config = settings_with(CONFIG, parallel={"zero": zero, "devices": devices})
    program = resharding.Resharding(config)
    placed = jax.tree.map(
        lambda sharding, part: jax.tree.map(lambda shape: shape.update(sharding=sharding), part),
        program._own,
        resharding.state_shapes(config),
    )
    memory: Any = program._join.lower(placed).compile().memory_analysis()
    needs = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    slack = 4096  # counters and the spikes' windows, which aren't counted
    assert needs <= else_of(config, devices).times["saving"] + slack


# Under a limit


OBSERVED = """
import json, sys
from jaxgpt import environment
from jaxgpt.commands import cli
from jaxgpt.training import fit

environment.restart_with_allocator()
seen = {"steps": []}

def resident():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmRSS"))
    return 1024 * int(line.split()[1])

capacity = fit.capacity
def noted(config):
    seen["before"] = resident()
    return capacity(config)

fit.capacity = noted
status = cli.main(sys.argv[1:], [lambda trainer, values: seen["steps"].append(resident())])
print("SEEN", json.dumps(seen))
sys.exit(status)
"""
LIMITED = [
    "--data.text=text.txt", "--data.tokenizer=bytes", "--run.no-report", "--model.layers=4", "--model.width=256",
    "--model.heads=4", "--model.feed-forward=704", "--model.context=256", "--training.batch-size=16",
    "--training.steps=60", "--training.evaluate-every=20", "--training.evaluation-batches=1", "--run.sample-every=20",
    "--checkpoint.every-steps=15", "--sampling.tokens=8",
]  # fmt: skip


@pytest.fixture
def control_group():
    """Makes a control group, and returns a function that runs a command in it with so many bytes."""
    lines = Path("/proc/self/cgroup").read_text().splitlines() if Path("/proc/self/cgroup").exists() else []
    own = next((line.split(":", 2)[2] for line in lines if line.split(":")[1] == "memory"), None)
    group = MEMORY / (own or "").lstrip("/") / f"jaxgpt-{os.getpid()}"
    try:
        if own is None:
            raise OSError
        group.mkdir()
    except OSError:
        pytest.skip("needs the right to make control groups of version 1")

    def run_in(limit: int, *more: str) -> subprocess.CompletedProcess:
        (group / "memory.limit_in_bytes").write_text(str(limit))
        variables = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
        return subprocess.run(
            ["sh", "-c", 'echo $$ > "$0/tasks"; exec "$@"', group, sys.executable, "-c", OBSERVED, *LIMITED, *more],
            env=variables | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )

    yield run_in
    group.rmdir()


@pytest.mark.slow
def test_a_run_stays_within_its_limit_and_what_cannot_is_refused(control_group):
    """60 steps with evaluations, samples and checkpoints, in a control group whose limit the plan takes up.

    The process has what it had when the plan was made, what the plan says, and no more than what is set aside for a
    CPU's compiler and libraries. The fastest way needs more than there is: the kernel would kill such a run.
    """
    limit = 1_100_000_000
    done = control_group(limit, "--compute.fit=device", "--run.name=limited")
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads(done.stdout.split("SEEN ")[1])
    plan = plan_of(Path("runs/limited"))
    assert plan["need"] > 0.5 * plan["capacity"]
    assert "1 x 16 sequences, recompute none" not in chosen(done.stdout)
    assert max(seen["steps"][1:]) <= seen["before"] + plan["need"] + fit.OF_A_CPU
    assert max(seen["steps"][1:]) < limit
    fastest = ("--training.micro-batches=1", "--compute.recompute=none", "--compute.classifier-chunk=2048")
    refused = control_group(limit, "--compute.fit=device", "--run.name=refused", *fastest)
    assert refused.returncode == 2
    assert "kept as given" in refused.stderr
    assert not Path("runs/refused").exists()
