"""`run.py verify` on files with PyTorch's logits, loss and gradients, from transformers' GPT-2."""

import jax
import numpy as np
import pytest

from jaxgpt.commands import cli, verify
from jaxgpt.interop import gpt2_tables, llmc
from tests.interop.weights import MODEL, random_params

REASON = "the states are made with PyTorch and transformers, which the parity extra installs: pip install -e .[parity]"
torch = pytest.importorskip("torch", reason=REASON)
pytest.importorskip("transformers", reason=REASON)

from tests.parity import transformers_model  # noqa: E402


@pytest.fixture(scope="module")
def state():
    """Returns the debug state of transformers' model with these weights."""
    params = random_params()
    arrays = {tensor.ours: array for tensor, array in gpt2_tables.paired(params)}
    theirs = transformers_model.make_model(MODEL, arrays)
    tokens, targets = np.random.default_rng(1).integers(MODEL.vocabulary_size, size=(2, 3, 9), dtype=np.int32)
    x, y = torch.from_numpy(tokens).long(), torch.from_numpy(targets).long()
    loss = transformers_model.loss(theirs, x, y)
    loss.backward()
    logits = theirs(input_ids=x).logits.detach().numpy()
    grads = gpt2_tables.from_named(transformers_model.gradients(theirs, MODEL))
    return llmc.State(tokens, targets, logits, loss.item(), grads)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, with m.bin in it."""
    monkeypatch.chdir(tmp_path)
    llmc.write_model(tmp_path / "m.bin", random_params(), MODEL, "float32")
    return tmp_path


@pytest.fixture(scope="module")
def computed(state):
    return verify.computed(random_params(), state, MODEL)


@pytest.fixture
def failed(computed):
    """A function that compares ours with a state, and returns what is outside its bounds."""

    def run(state) -> list[str]:
        return [row.name for row in verify.rows(computed, state) if not row.passed]

    return run


def test_transformers_numbers_are_ours(here, state, failed, computed, monkeypatch, capsys):
    """The command says so too, and ends with 0; it ends with 1 where a number is wrong."""
    assert failed(state) == []
    monkeypatch.setattr(verify, "computed", lambda *_: computed)  # not compiled again
    words = ["verify", "--model", "m.bin", "--state", "s.bin"]
    llmc.write_state(here / "s.bin", state)
    assert cli.main(words) == 0
    assert "18 of 18 agree with llm.c\n" in capsys.readouterr().out
    llmc.write_state(here / "s.bin", state._replace(loss=state.loss + 3e-5))
    assert cli.main(words) == 1
    assert "17 of 18 agree with llm.c; 1 FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("tensor", gpt2_tables.TENSORS, ids=lambda tensor: tensor.llmc)
def test_one_wrong_number_in_any_gradient_is_found(failed, state, tensor):
    named = {other.ours: array.copy() for other, array in gpt2_tables.paired(state.grads)}
    flat = named[tensor.ours].reshape(-1)
    flat[np.argmax(np.abs(flat))] *= 1.05
    assert failed(state._replace(grads=gpt2_tables.from_named(named))) == [tensor.llmc]


def test_a_gradient_that_is_a_little_wrong_everywhere_is_found(failed, state):
    """Each number is within its bounds, but all of them together are not."""
    assert failed(state._replace(grads=jax.tree.map(lambda array: 1.001 * array, state.grads))) == [
        tensor.llmc for tensor in gpt2_tables.TENSORS
    ]


@pytest.mark.parametrize("wrong", [0.002, np.nan, np.inf])
def test_wrong_logits_are_found(failed, state, wrong):
    logits = state.logits.copy()
    logits[2, 8, 149] += wrong
    assert failed(state._replace(logits=logits)) == ["logits"]


def test_a_loss_that_is_no_number_is_found(failed, state):
    assert failed(state._replace(loss=float("nan"))) == ["loss"]


def test_what_cannot_be_verified(here, fails, state):
    llmc.write_model(here / "b.bin", random_params(), MODEL, "bfloat16")
    llmc.write_state(here / "s.bin", state)
    assert "weights in bfloat16; the bounds are for float32" in fails("verify", "--model", "b.bin", "--state", "s.bin")
    message = fails("verify", "--model", "m.bin", "--state", "m.bin")
    assert "m.bin: not an llm.c debug state: it begins with 20240326" in message
    assert "no.bin: can't be read" in fails("verify", "--model", "m.bin", "--state", "no.bin")
