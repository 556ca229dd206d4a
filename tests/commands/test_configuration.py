"""`--init-from`: the state begins with the weights, sharded in any way, and a mismatch is refused.

Processes that would not train the same are refused too.
"""

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import writing
from jaxgpt.commands import cli, configuration
from jaxgpt.data import tokenizers
from jaxgpt.data.corpus import Corpus
from jaxgpt.errors import UserError
from jaxgpt.interop import huggingface, llmc, tensors
from jaxgpt.models import blocks
from jaxgpt.options import settings
from jaxgpt.options.config import Compute, Config, Model, Parallel, Training
from jaxgpt.parallel import processes
from jaxgpt.runs.metrics_file import read_metrics
from jaxgpt.training.resharding import Resharding
from tests import whole
from tests.interop.weights import assert_same_bits, random_params

pytestmark = pytest.mark.usefixtures("work")

MODEL = Model(layers=2, heads=2, width=12, context=8, vocabulary_size=256)
TRAIN = ["--data.text=text.txt", "--training.steps=2", "--sampling.tokens=2", "--init-from", "hf"]


@pytest.mark.parametrize(
    ("devices", "zero", "layers", "parameters"),
    [
        pytest.param(1, 0, "scanned", "float32", marks=pytest.mark.slow),
        (1, 0, "unrolled", "bfloat16"),
        (8, 3, "unrolled", "bfloat16"),
        pytest.param(2, 0, "auto", "float32", marks=pytest.mark.slow),
        pytest.param(2, 1, "unrolled", "bfloat16", marks=pytest.mark.slow),
        pytest.param(4, 2, "scanned", "float32", marks=pytest.mark.slow),
        pytest.param(8, 3, "scanned", "float32", marks=pytest.mark.slow),
    ],
)
def test_the_first_state_has_these_parameters(devices, zero, layers, parameters):
    """The parameters may be sharded in any way; the rest of the state is as it is without them."""
    config = Config(
        model=MODEL,
        compute=Compute(layers=layers, parameters=parameters),
        parallel=Parallel(devices=devices, zero=zero),
        training=Training(batch_size=8, sequence_length=8, seed=3),
    )
    placement = Resharding(config)
    given = random_params(MODEL)
    state = placement.first_state(given)
    without = placement.first_state()
    assert jax.tree.map(lambda array: array.sharding, state) == jax.tree.map(lambda array: array.sharding, without)
    whole = blocks.stacked(placement.whole_params_on_each(state)[0])
    expected = jax.tree.map(lambda array: array.astype(tensors.DTYPES[parameters]), given)
    assert_same_bits(jax.tree.map(np.asarray, whole), expected)
    for ours, theirs in zip(jax.tree.leaves(state[1:]), jax.tree.leaves(without[1:]), strict=True):
        assert ours.dtype == theirs.dtype
        if not jnp.issubdtype(ours.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(ours, theirs)


@pytest.fixture
def hf(work):
    """A Hugging Face folder, hf, with the tokenizer bytes."""
    with writing.new_folder(Path("hf")) as folder:
        huggingface.write_folder(folder, random_params(MODEL), MODEL, "float32", tokenizers.Bytes(), 1 << 30)


def first_loss(run: str) -> float:
    return next(row["val_loss"] for row in read_metrics(Path("runs") / run / "metrics.jsonl") if row["step"] == 0)


def test_training_begins_with_the_weights_and_is_resumed_without_them(hf, capsys):
    """The shape and the tokenizer are theirs: the default config has others."""
    assert cli.main([*TRAIN, "--run.name=a", "--compute.layers=scanned", "--training.steps=1"]) == 0
    assert (
        "weights   from hf: a Hugging Face folder, float32, GPT-2, 6,960 parameters: 2 layers"
        in capsys.readouterr().out
    )
    config = settings.read(Path("runs/a/config.toml"))
    assert (config.model, config.data.tokenizer, config.training.init_from) == (MODEL, "bytes", "hf")
    text = np.frombuffer(Path("text.txt").read_bytes(), np.uint8).astype(np.int32)
    validation = text[int(len(text) * 0.9) :]
    count = (len(validation) - 1) // 8 * 8  # of the targets, but for a last window that is not full
    tokens, targets = validation[:count].reshape(-1, 8), validation[1 : count + 1].reshape(-1, 8)
    loss = jax.jit(lambda *of: whole.loss(*of, MODEL, Compute()))(random_params(MODEL), tokens, targets)
    assert first_loss("a") == pytest.approx(float(loss), rel=0.02)
    shutil.rmtree("hf")
    resumed = replace(config, model=Model(), run=replace(config.run, resume="always"))
    assert configuration.with_weights(resumed, set()) == replace(resumed, model=MODEL)
    assert configuration.weights(resumed, tokenizers.Bytes()) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--model.layers", "3"],
            "--init-from hf: these weights are of another shape: --model.layers is 3 and they have 2.",
        ),
        (["--model.width=24", "--model.context=9"], "--model.width is 24 and they have 12; --model.context is 9"),
        (["--config", "shakespeare_char"], "--model.layers is 4 and they have 2"),
        (["--data.tokenizer", "gpt2"], "these weights are of the tokenizer bytes, and --data.tokenizer is gpt2"),
        (["--init-from=nix/nix/nix"], "nix/nix/nix: there is no such file or folder"),
        (["--init-from=runs/x", "--run.name=x"], "there is no such file or folder"),
        (["--init-from=m.bin", "--data.tokenizer=characters"], "are of a vocabulary of 256 tokens, and the tokenizer"),
        (["--init-from=m.bin", "--data.tokenizer=gpt2"], "--data.text text.txt: token"),
    ],
)
def test_what_does_not_fit(hf, fails, words, message):
    llmc.write_model(Path("m.bin"), random_params(MODEL), MODEL, "float32")
    assert message in fails(*TRAIN, *words)
    assert not Path("runs").exists()


def test_a_run_does_not_replace_what_it_begins_with(hf, fails):
    assert cli.main(["convert", "hf", "runs/a"]) == 0
    message = fails(*TRAIN[:-1], "runs/a", "--run.name=a", "--run.overwrite")
    assert "--init-from runs/a: in the folder that this run would replace" in message
    assert Path("runs/a/checkpoints/0/params").is_dir()


@pytest.fixture
def package(tmp_path):
    package = tmp_path / "package"
    (package / "layers").mkdir(parents=True)
    for name in ("a.py", "layers/b.py", "layers/c.py"):
        (package / name).write_text("x = 1\n")
    return package


def test_sources_are_the_code_alone(package):
    before = configuration.sources(package)
    assert list(before) == ["package/a.py", "package/layers/b.py", "package/layers/c.py"]
    (package / "layers" / "b.pyc").write_text("compiled")
    (package / ".#a.py").symlink_to("user@machine.123:456")  # what Emacs leaves beside a file that is edited
    (package / ".ipynb_checkpoints").mkdir()
    (package / ".ipynb_checkpoints" / "a-checkpoint.py").write_text("x = 1\n")
    assert configuration.sources(package) == before
    (package / "layers" / "b.py").write_text("x = 2\n")
    after = configuration.sources(package)
    assert {name for name in before if before[name] != after[name]} == {"package/layers/b.py"}


def difference(monkeypatch, change):
    """Returns the message of process 1 when process 0 has sent something else."""

    def broadcast(make):
        first = copy.deepcopy(make())
        change(first)
        return first

    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "index", lambda: 1)
    monkeypatch.setattr(processes.talk, "broadcast", broadcast)
    data = Corpus.__new__(Corpus, *[{} if name == "fingerprint" else None for name in Corpus._fields])
    try:
        configuration.check_processes(Config(), data)
    except UserError as error:
        return str(error)
    return ""


def test_the_same_is_allowed(monkeypatch):
    assert difference(monkeypatch, lambda first: None) == ""


@pytest.mark.parametrize("hash_there", ["0123456789abcdef", None])
def test_other_code_of_the_same_version_is_named(monkeypatch, hash_there):
    """One file was changed, and one exists only here."""

    def change(first):
        if hash_there:
            first["code"]["jaxgpt/layers/gelu.py"] = hash_there
        else:
            del first["code"]["jaxgpt/layers/gelu.py"]

    message = difference(monkeypatch, change)
    assert message == ("process 1 is to train other than process 0: the code is not the same in jaxgpt/layers/gelu.py")


def test_another_version_is_named(monkeypatch):
    message = difference(monkeypatch, lambda first: first["versions"].update(jax="0.0.1"))
    assert message.endswith(f"process 0: jax is 0.0.1 there and {settings.versions()['jax']} here")
