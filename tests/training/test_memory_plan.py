"""The memory plan against the compiled programs and the process's own memory."""

import dataclasses
import functools
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxgpt.commands import cli
from jaxgpt.errors import UserError
from jaxgpt.models import gpt2
from jaxgpt.models.blocks import RECOMPUTE_LEVELS
from jaxgpt.options.config import SPIKE_WINDOW, Compute, Config, Model, Training
from jaxgpt.training import device_memory, fit, memory_plan, step
from jaxgpt.training.device_memory import Capacity
from tests import small_run
from tests.nightly import nightly

ROOT = Path(cli.__file__).resolve().parents[2]
MODEL = Model(layers=3, heads=2, width=16, context=32, vocabulary_size=130)
CONFIG = Config(
    model=MODEL,
    compute=Compute(classifier_chunk=32, attention_block=16),
    training=Training(batch_size=4, sequence_length=32),
)
PARAMETERS = 4 * gpt2.parameter_count(MODEL, padded=True)  # bytes


def change(config: Config = CONFIG, **sections) -> Config:
    """Returns the config with some options of some sections changed."""
    parts = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    return dataclasses.replace(config, **parts)


def limited(config: Config, size: float) -> Config:
    return change(config, compute={"memory_limit_gib": size / 2**30})


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Each program is compiled once for all tests; a limit changes none."""
    programs = functools.cache(step.compile_step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "compile_step", lambda config: programs(limited(config, 0)))
        yield


def plan(config: Config) -> memory_plan.Plan:
    """The plan of a configuration on a device whose memory isn't known."""
    return memory_plan.make(config, step.compile_step(config), Capacity(None, ""))


def prepare(config: Config) -> tuple[Config, jax.stages.Compiled, memory_plan.Plan]:
    found = fit.prepare(config, device_memory.capacity(config.compute))
    return found.config, found.program, found.plan


def test_the_total_is_the_compiled_programs():
    found: Any = step.compile_step(CONFIG).memory_analysis()
    expected = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    assert plan(CONFIG).total == expected - found.alias_size_in_bytes


def test_the_parts_are_the_arrays():
    """The bytes by hand for 4·32 tokens of 16 numbers in 3 float32 layers; LayerNorm has two statistics per token."""
    parts = plan(CONFIG).parts
    tokens, width, layers = 4 * 32, 16, 3
    assert parts["masters (float32)"] == parts["gradients"] == PARAMETERS
    assert parts["moments (float32)"] == 2 * PARAMETERS
    assert parts["weights in float32"] == 0
    spikes = 2 * 4 * (SPIKE_WINDOW + 1)
    assert 0 < parts["batch, counters, metrics"] - 2 * 4 * tokens - spikes < 2000  # with the table of the outputs
    assert plan(CONFIG).activations == {
        "attention_norm": 4 * tokens * (width + 2),
        "attention": 4 * tokens * (4 * width + 2),  # queries, keys, values, output; a number for each of two heads
        "mlp_norm": 4 * tokens * (width + 2),
        "gelu": 4 * tokens * 4 * width,
    }
    assert parts["saved activations of 3 layers"] == layers * sum(plan(CONFIG).activations.values())
    assert parts["classifier"] == 2 * 4 * 32 * 256  # of a chunk


@pytest.mark.slow
def test_each_level_keeps_less():
    levels = [plan(change(compute={"recompute": level})) for level in RECOMPUTE_LEVELS]
    for more, less in itertools.pairwise(levels):
        assert sum(less.activations.values()) < sum(more.activations.values())
        assert less.total < more.total
    assert levels[-1].activations == {"input": 4 * 4 * 32 * 16}


def test_micro_batches_keep_a_sum_of_gradients():
    two = change(training={"micro_batches": 2})
    assert plan(two).parts["gradients and their sum"] == 2 * PARAMETERS
    assert plan(two).activations == plan(CONFIG).activations


def test_bfloat16_halves_the_activations_and_copies_the_tables():
    """The blocks' weights are cast one after another, so that no copy of all of them is there."""
    half = plan(change(compute={"dtype": "bfloat16"}))
    assert half.parts["weights in bfloat16"] == 2 * (256 + 32) * 16
    assert half.parts["masters (float32)"] == PARAMETERS
    assert half.activations["gelu"] == plan(CONFIG).activations["gelu"] // 2


def test_parameters_kept_in_bfloat16_are_no_copy():
    sizes = memory_plan.measure(change(compute={"dtype": "bfloat16", "parameters": "bfloat16"}))
    assert sizes.parameters == PARAMETERS // 2
    assert sizes.weights == 0
    assert sizes.moments == 2 * PARAMETERS


def test_layers_that_are_not_stacked_count_the_same():
    """A tuple of blocks instead of one block with a leading axis."""
    shape = jax.ShapeDtypeStruct
    stacked = gpt2.BlockResiduals(*[(shape((3, 5, 2), "float32"),)] * 7)
    apart = (gpt2.BlockResiduals(*[(shape((5, 2), "float32"),)] * 7),) * 3
    assert memory_plan._by_name(apart) == memory_plan._by_name(stacked) == dict.fromkeys(stacked._fields, 120)


@pytest.mark.parametrize("level", RECOMPUTE_LEVELS)
def test_no_program_needs_less_than_the_least(level):
    config = change(compute={"recompute": level})
    assert memory_plan.least(config) <= plan(config).total


@pytest.mark.parametrize("layers", nightly(["scanned", "unrolled"], every_time=["unrolled"]))
@pytest.mark.parametrize(("batch", "holds"), [(4, 12), pytest.param(12, 4, marks=pytest.mark.slow)])
def test_the_largest_micro_batch_fits_and_is_nearly_the_largest(batch, holds, layers):
    """It is estimated from one compiled size, for a device that just holds another one."""
    room = plan(change(compute={"layers": layers}, training={"batch_size": holds})).total
    config = change(compute={"layers": layers}, training={"batch_size": batch})
    estimate = memory_plan.make(config, step.compile_step(config), Capacity(room, "")).largest_batch_size
    assert estimate is not None
    assert 0.75 * holds <= estimate <= holds


def test_auto_takes_the_fastest_level_that_fits():
    totals = {level: plan(change(compute={"recompute": level})).total for level in RECOMPUTE_LEVELS}
    auto = change(compute={"recompute": "auto"})
    for level in ("none", "norms", "block"):
        chosen, program, made = prepare(limited(auto, totals[level]))
        assert chosen.compute.recompute == level
        assert made.total == totals[level]
        assert program is step.compile_step(chosen)  # the loop runs what was measured


def test_auto_compiles_nothing_that_cannot_fit(monkeypatch):
    """The residuals of a model with many layers are enough to tell."""
    most = change(model={"layers": 12}, compute={"recompute": "auto", "layers": "scanned"}, training={"batch_size": 16})
    room = plan(change(most, compute={"recompute": "block"})).total
    compiled = []
    compile_step = step.compile_step
    monkeypatch.setattr(step, "compile_step", lambda config: compiled.append(config) or compile_step(config))
    prepare(limited(most, room))
    assert [config.compute.recompute for config in compiled] == ["block"]


# A plan that doesn't fit


def options_in(message: str) -> list[tuple[list[str], int, int]]:
    """Returns the rows of the refusal: options, MiB needed, MiB less."""
    rows = re.findall(r"^  (--.*?) +([\d,]+) MiB, ([\d,]+) less$", message, re.MULTILINE)
    return [(words.split(), int(total), int(less)) for words, total, less in rows]


@pytest.mark.slow
def test_a_refusal_names_what_would_make_it_fit():
    """Each option that is named, taken, gives a plan that fits."""
    large = change(
        model={"vocabulary_size": 5000},
        compute={"recompute": "none", "classifier_chunk": 1024},
        training={"batch_size": 32},
    )
    total = plan(large).total
    small = limited(large, 0.8 * total)
    with pytest.raises(UserError) as refused:
        prepare(small)
    message = str(refused.value)
    assert message.startswith(f"the train step needs {total / 2**20:,.0f} MiB, and {0.8 * total / 2**20:,.0f} MiB is")
    rows = options_in(message)
    assert len(rows) >= 2
    assert {words[0] for words, _, _ in rows} >= {"--compute.classifier-chunk", "--training.batch-size"}
    for words, needs, less in rows:
        assert needs <= 0.8 * total / 2**20 + 1
        assert needs + less == pytest.approx(total / 2**20, abs=2)
        changed = small
        for option, value in zip(words[::2], words[1::2], strict=True):
            section, key = option.removeprefix("--").replace("-", "_").split(".")
            kind = type(getattr(getattr(small, section), key))
            changed = change(changed, **{section: {key: kind(value)}})
        assert changed.training.batch_size * changed.training.micro_batches == 32
        prepare(changed)


@pytest.mark.slow
def test_a_refusal_where_only_everything_together_fits():
    large = change(compute={"recompute": "none"}, training={"batch_size": 16})
    everything = change(compute={"recompute": "block", "dtype": "bfloat16"}, training={"batch_size": 1})
    everything = change(everything, training={"micro_batches": 16})
    with pytest.raises(UserError) as refused:
        prepare(limited(large, plan(everything).total + 1000))
    (row,) = options_in(str(refused.value))
    options = "--compute.dtype --compute.recompute --training.batch-size --training.micro-batches"
    assert row[0][::2] == options.split()


def test_a_refusal_where_nothing_fits():
    with pytest.raises(UserError, match="No option makes this model fit"):
        prepare(limited(CONFIG, PARAMETERS))


# In a run


TINY = [*small_run.TINY, "--training.steps=1", "--sampling.tokens=1", "--data.tokenizer=bytes"]


def test_a_run_prints_its_plan_and_keeps_it(work, capsys):
    assert cli.main([*TINY, "--compute.recompute=auto"]) == 0
    printed = capsys.readouterr().out
    run = work / "runs/quickstart-text"
    kept, all_of_it = json.loads((run / "memory_plan.json").read_text()), (run / "start.txt").read_text()
    assert kept["fits"] is True
    assert kept["total"] == sum(kept["parts"].values()) < kept["capacity"]
    assert f"memory    {kept['total'] / 2**20:,.1f} MiB of {kept['capacity'] / 2**30:,.1f} GiB" in printed
    assert f"{kept['total'] / 2**20:,.1f} MiB of {kept['capacity'] / 2**20:,.1f} MiB" in all_of_it
    assert printed.index("memory ") < printed.index("step 0:")
    assert "recompute = none" in all_of_it
    assert len(printed.split("step 0:")[0].splitlines()) == 5
    assert kept["recompute"] == "none"


def test_verbose_prints_all_that_start_txt_says(work, capsys):
    assert cli.main([*TINY, "--verbose"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith((work / "runs/quickstart-text/start.txt").read_text())
    assert "FLOPs     per token: " in printed


def test_a_run_that_does_not_fit_leaves_no_folder(fails, work):
    assert "the train step needs" in fails(*TINY, "--compute.memory-limit-gib=1e-6")
    assert not (work / "runs").exists()


MEASURED = """
import ctypes, jax, numpy as np
from jaxgpt.options.config import *
from jaxgpt.data.loader import Batch
from jaxgpt.training import device_memory, fit
from jaxgpt.training.state import initial_state

def resident(which):
    line = next(line for line in open("/proc/self/status") if line.startswith(which))
    return 1024 * int(line.split()[1])

config = Config(
    model=Model(layers=8, heads=4, width=512, context=256, vocabulary_size=64000),
    training=Training(batch_size=2, sequence_length=128),
    compute=Compute(dtype="bfloat16"),
)
config, program, plan, _ = fit.prepare(config, device_memory.capacity(config.compute))
jax.block_until_ready(initial_state(config))  # compiles; what the compiler itself takes is not the program's
tokens = np.random.default_rng(0).integers(0, 64000, (1, 2, 128), dtype=np.int32)
ctypes.CDLL(None).malloc_trim(0)
open("/proc/self/clear_refs", "w").write("5")
before = resident("VmRSS")
state = initial_state(config)
for _ in range(2):
    state, metrics = program(state, None, Batch(tokens, tokens))
jax.block_until_ready(state)
print(plan.total, resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's account of the process")
def test_the_total_is_what_the_process_grows_by():
    """The two agree within 5% over making the state and two steps, under a C library that gives back freed memory."""
    environment = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURED], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    planned, grown = map(int, done.stdout.split())
    assert planned == pytest.approx(grown, rel=0.05)
