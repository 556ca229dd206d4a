"""The benchmark: its words, and what it makes of the answers. No implementation is started."""

import itertools
import time

import pytest

from benchmarks import bench, compare
from benchmarks import step_profile as profile
from benchmarks.compare import agree, combine
from benchmarks.peers.spec import Spec, from_file
from jaxgpt.errors import RunError
from jaxgpt.options.config import Compute, Model, Optimizer


def answer(who="ours", **values):
    """Returns a peer's answer."""
    base = {
        "who": who,
        "dtype": "float32",
        "batch": 2,
        "sequence": 8,
        "step_seconds": 0.5,
        "tokens_per_second": 32.0,
        "temp_bytes": 100,
        "peak_bytes": 1000,
        "compile_seconds": 3.0,
        "loss": 4.0,
        "grad_norm": 2.0,
        "device": "cpu",
        "peak_flops": None,
    }
    return base | values


# Words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "--steps is 0, and must be greater than 0"),
        (["--minutes", "0"], "--minutes is 0.0, and must be greater than 0"),
        (["--rounds", "-1"], "--rounds is -1, and must be greater than 0"),
        (["--sizes", "2*512"], "--sizes 2*512: give sequences x length, such as 2x512"),
        (["--sizes", "0x8"], "--sizes 0x8: give at least 1 sequence, and a length from 1 to 1024 for this model"),
        (["--sizes", "1x8", "1x1025"], "--sizes 1x1025: give at least 1 sequence, and a length from 1 to 1024"),
        (["--sizes", "1x1025", "--profile", "trace"], "--sizes 1x1025: give at least 1 sequence"),
        (["--config", "quikstart"], "did you mean quickstart?"),
        (["--who", "theirs"], "invalid choice"),
        (["--compute.attention-block", "0"], "--compute.attention-block is 0, and must be greater than 0"),
        (["--recompute", "none"], "did you mean --compute.recompute?"),
        (["--compute.recompute", "auto"], "--compute.recompute auto: name the level to measure"),
    ],
)
def test_a_mistake_in_the_words(fails, monkeypatch, words, message):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(compare, "compare", None)  # nothing is measured
    assert message in fails(*words, command=bench.run)


def test_the_words_reach_the_benchmark(monkeypatch):
    seen = {}
    monkeypatch.setattr(compare, "compare", lambda model, **options: seen.update(model=model, **options) or 7)
    words = ["--sizes", "2x16", "4x8", "--dtypes", "bfloat16", "--steps", "3", "--rounds", "2"]
    assert bench.run(["--config", "quickstart", *words, "--compute.recompute", "none"]) == 7
    assert seen["sizes"] == [(2, 16), (4, 8)]
    assert seen["dtypes"] == ["bfloat16"]
    assert (seen["steps"], seen["rounds"]) == (3, 2)
    assert seen["who"] == list(compare.MODULES)
    assert seen["compute"].recompute == "none"
    assert seen["model"].vocabulary_size > 0
    assert seen["output"] is None


def test_a_profile_is_of_the_first_size_and_dtype(monkeypatch):
    seen = []
    monkeypatch.setattr(profile, "report", lambda *args: seen.extend(args) or 0)
    words = ["--config", "quickstart", "--sizes", "2x16", "4x8", "--dtypes", "bfloat16", "float32"]
    assert bench.run([*words, "--profile", "trace"]) == 0
    config, batch, length, folder = seen
    assert (batch, length, folder.name, config.compute.dtype) == (2, 16, "trace", "bfloat16")


def test_as_a_command_of_the_package_it_is_said_where_it_is(fails):
    assert "make bench" in fails("bench", "--sizes", "2x512")


# Processes


def test_a_peer_reads_the_options_that_were_written(tmp_path):
    """They are static arguments of jitted functions there, and so are hashable."""
    compute = Compute(dtype="bfloat16", fit="8GB", fit_keeps=("compute.recompute",))
    written = Spec(Model(family="llama", kv_heads=2), 1, 8, "bfloat16", 1, "weights.npz", Optimizer(), compute)
    written.write(tmp_path / "spec.json")
    read = from_file(tmp_path / "spec.json")
    assert read == written
    assert hash(read) == hash(written)


@pytest.mark.parametrize(
    ("program", "had"),
    [
        ("print('measured step 1: 0.100 s', file=sys.stderr, flush=True)", "its last measured step 1: 0.100 s"),
        *(
            pytest.param(program, "no step was done", marks=pytest.mark.slow)
            for program in ("print('compiling', file=sys.stderr, flush=True)", "")
        ),
    ],
)
def test_a_process_that_takes_too_long_is_stopped(tmp_path, monkeypatch, program, had):
    peers = tmp_path / "benchmarks" / "peers"
    peers.mkdir(parents=True)
    for folder in (peers.parent, peers):
        (folder / "__init__.py").touch()
    (peers / "slow.py").write_text(f"import sys, time\n{program}\ntime.sleep(600)")
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    spec = Spec(Model(), 1, 8, "float32", 1, "", Optimizer(), Compute())
    began = time.monotonic()
    with pytest.raises(RunError, match=r"stopped after 0.05 minutes \(--minutes\), " + had):
        compare.start("slow", spec, tmp_path, 0.05)
    assert time.monotonic() - began < 60  # of the 600 that it sleeps


# Answers


@pytest.mark.parametrize(
    ("device", "dtype", "limit"),
    [("cpu", "float32", 1e-4), ("NVIDIA H100", "float32", 2e-3), ("cpu", "bfloat16", 2e-2)],
)
@pytest.mark.parametrize("key", ["loss", "grad_norm"])
def test_answers_agree_within_the_dtypes_limit(capsys, device, dtype, limit, key):
    first = answer(device=device, dtype=dtype)
    for sign, (factor, agreed) in itertools.product((1, -1), ((0.9, True), (1.1, False))):
        other = answer("torch", device=device, dtype=dtype) | {key: first[key] * (1 + sign * factor * limit)}
        assert agree([first, answer("jax.grad", device=device, dtype=dtype), other]) is agreed
        printed = capsys.readouterr().out
        assert ("all agree" in printed) is agreed
        assert (f"DISAGREEMENT: {key} of torch" in printed) is not agreed


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_disagrees(value):
    assert not agree([answer(), answer("torch", loss=value)])
    assert not agree([answer(loss=value), answer("torch", loss=4.0)])


def test_one_answer_agrees_with_itself():
    assert agree([answer()])


def test_rounds_are_combined():
    """The median time and what follows from it; the largest memory and compile time; the rest as first answered."""
    rounds = [
        answer(step_seconds=0.4, compile_seconds=9.0, peak_bytes=10),
        answer(step_seconds=2.0, compile_seconds=1.0, peak_bytes=30),
        answer(step_seconds=0.5, compile_seconds=1.0, peak_bytes=20),
    ]
    combined = combine(rounds)
    assert combined == rounds[0] | {"step_seconds": 0.5, "tokens_per_second": 32.0, "peak_bytes": 30}
