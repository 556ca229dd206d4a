"""The whole model and its train step beside Hugging Face's GPT-2 and torch.optim.AdamW.

An implementation that shares nothing with this one: its own forward, PyTorch's autodiff, PyTorch's optimizer.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.data.loader import Batch
from jaxgpt.layers.cross_entropy import IGNORED
from jaxgpt.models import gpt2
from jaxgpt.options.config import Compute, Config, Model, Training

REASON = "compares with PyTorch and transformers, which the parity extra installs: pip install -e .[parity]"
torch = pytest.importorskip("torch", reason=REASON)
pytest.importorskip("transformers", reason=REASON)

from benchmarks import parity_124m  # noqa: E402
from tests import whole  # noqa: E402
from tests.parity import transformers_model  # noqa: E402

TOLERANCE = 1e-4  # ‖a - b‖ / ‖b‖, float32

SHAPES = {
    "one token": (Model(layers=1, heads=1, width=32, context=8, vocabulary_size=128), 1, 1, Compute()),
    "odd vocabulary": (Model(layers=2, heads=4, width=64, context=32, vocabulary_size=301), 2, 32, Compute()),
    "shorter than the context": (Model(layers=3, heads=2, width=48, context=64, vocabulary_size=97), 3, 17, Compute()),
    "all layers unrolled": (
        Model(layers=2, heads=3, width=48, context=16, vocabulary_size=200),
        2,
        16,
        Compute(recompute="gelu"),
    ),
    "chunks that do not divide": (
        Model(layers=2, heads=2, width=32, context=40, vocabulary_size=500),
        3,
        37,
        Compute(classifier_chunk=25, attention_block=20),
    ),
}


def random_params(model: Model, seed: int = 0) -> gpt2.Params:
    """Noise on every tensor, so that no bias is 0 and no scale is 1; the token table's padding stays 0."""
    generator = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: gpt2.init(model, jax.random.key(0)))
    params = jax.tree.map(lambda like: jnp.asarray(0.1 * generator.normal(size=like.shape), like.dtype), shapes)
    token = np.array(params.embedding.token)
    token[model.vocabulary_size :] = 0
    norms = {"attention_norm": params.blocks.attention_norm, "mlp_norm": params.blocks.mlp_norm}
    around_one = {name: norm._replace(scale=1 + norm.scale) for name, norm in norms.items()}
    return gpt2.Params(
        embedding=params.embedding._replace(token=jnp.asarray(token)),
        blocks=params.blocks._replace(**around_one),
        final_norm=params.final_norm._replace(scale=1 + params.final_norm.scale),
    )


def random_batch(model: Model, batch: int, length: int, seed: int = 2) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    tokens, targets = generator.integers(model.vocabulary_size, size=(2, batch, length), dtype=np.int32)
    return tokens, targets


def arrays(params: gpt2.Params) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in transformers_model.flatten(params).items()}


def assert_close(ours, theirs, name: str) -> None:
    difference = np.linalg.norm(np.asarray(ours) - theirs) / np.linalg.norm(theirs)
    assert difference <= TOLERANCE, f"{name}: relative difference {difference:.1e}"


@pytest.mark.parametrize(("model", "batch", "length", "compute"), SHAPES.values(), ids=SHAPES)
def test_logits_and_gradients_are_those_of_transformers(model: Model, batch: int, length: int, compute: Compute):
    params = random_params(model)
    tokens, targets = random_batch(model, batch, length)
    targets[0, 5:9] = IGNORED  # which PyTorch passes over too
    theirs = transformers_model.make_model(model, arrays(params))
    torch_tokens, torch_targets = torch.from_numpy(tokens).long(), torch.from_numpy(targets).long()
    with torch.no_grad():
        expected_logits = theirs(input_ids=torch_tokens).logits.numpy()
    expected_loss = transformers_model.loss(theirs, torch_tokens, torch_targets)
    expected_loss.backward()
    expected_grads = transformers_model.gradients(theirs, model)

    @jax.jit  # one program: its compilation is most of the time
    def everything(params, tokens, targets):
        logits = whole.logits(params, tokens, model, compute)
        return logits, *whole.loss_and_grads(params, tokens, targets, model, compute)

    logits, loss, grads = everything(params, tokens, targets)
    assert_close(logits, expected_logits, "logits")
    assert float(loss) == pytest.approx(float(expected_loss.detach()), rel=TOLERANCE)
    for name, grad in transformers_model.flatten(grads).items():
        assert_close(grad, expected_grads[name], name)


def test_conversion_there_and_back_changes_nothing():
    model = Model(layers=3, heads=2, width=16, context=8, vocabulary_size=130)
    ours = arrays(random_params(model))
    back = transformers_model.from_transformers(dict(transformers_model.to_transformers(ours, model)), model)
    assert back.keys() == ours.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)


def test_ten_steps_are_those_of_pytorch():
    config = Config(
        model=Model(layers=2, heads=4, width=64, context=64, vocabulary_size=301),
        training=Training(steps=parity_124m.STEPS, batch_size=4, sequence_length=64),
        optimizer=parity_124m.OPTIMIZER,
    )
    tokens, targets = random_batch(config.model, 4, 64)
    rows = list(parity_124m.compare(config, random_params(config.model), Batch(tokens[None], targets[None])))
    assert len(rows) == parity_124m.STEPS
    failed = [row for row in rows if not row.passed]
    assert not failed, failed
    assert rows[-1].loss < rows[0].loss
