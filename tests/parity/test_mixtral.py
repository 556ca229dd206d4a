"""Logits, loss, all gradients and generated text of Hugging Face's MixtralForCausalLM, with its loss of balance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.data.loader import Batch
from jaxgpt.models import blocks, cache, mixtral
from jaxgpt.models.blocks import Context
from jaxgpt.objectives import next_token
from jaxgpt.options.config import Compute, Model
from tests import whole

REASON = "compares with PyTorch and transformers, which the parity extra installs: pip install -e .[parity]"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

TOLERANCE = 1e-4  # ‖a - b‖ / ‖b‖, float32
MODEL = Model(
    layers=3,
    heads=4,
    kv_heads=2,
    width=32,
    feed_forward=24,
    context=32,
    vocabulary_size=101,
    window=5,
    rope_base=500.0,
    family="mixtral",
    experts=6,
    router_balance=0.7,
)


@pytest.fixture(scope="module")
def params():
    """Stacked, in float32, none of them special; scales around 1."""
    shapes = jax.eval_shape(lambda: mixtral.init(MODEL, jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape, scale=0.2).astype(np.float32), shapes)
    for table in (params.embedding.token, params.head.weight):
        table[MODEL.vocabulary_size :] = 0
    return params


def to_theirs(params):
    """Ours, or gradients of ours, by their names; they have weights as (out, in)."""
    V, K, D = MODEL.vocabulary_size, MODEL.key_value_heads, MODEL.width_per_head
    named = {
        "model.embed_tokens.weight": params.embedding.token[:V],
        "model.norm.weight": params.final_norm.scale,
        "lm_head.weight": params.head.weight[:V],
    }
    for layer in range(MODEL.layers):
        block = jax.tree.map(lambda array, layer=layer: np.asarray(array)[layer], params.blocks)
        q, k, v = np.split(block.qkv.weight, [MODEL.heads * D, (MODEL.heads + K) * D], axis=-1)
        own = {
            "input_layernorm.weight": block.attention_norm.scale,
            "post_attention_layernorm.weight": block.mlp_norm.scale,
            **{f"self_attn.{name}_proj.weight": part.T for name, part in (("q", q), ("k", k), ("v", v))},
            "self_attn.o_proj.weight": block.attention_out.weight.T,
            "mlp.gate.weight": block.experts.router.weight.T,
            "mlp.experts.gate_up_proj": block.experts.w_in.swapaxes(1, 2),
            "mlp.experts.down_proj": block.experts.w_out.swapaxes(1, 2),
        }
        named |= {f"model.layers.{layer}.{name}": array for name, array in own.items()}
    return named


@pytest.fixture(scope="module")
def theirs(params):
    config = transformers.MixtralConfig(
        vocab_size=MODEL.vocabulary_size,
        hidden_size=MODEL.width,
        intermediate_size=MODEL.feed_forward,
        num_hidden_layers=MODEL.layers,
        num_attention_heads=MODEL.heads,
        num_key_value_heads=MODEL.kv_heads,
        max_position_embeddings=MODEL.context,
        sliding_window=MODEL.window,
        rope_parameters={"rope_type": "default", "rope_theta": MODEL.rope_base},
        num_local_experts=MODEL.experts,
        num_experts_per_tok=MODEL.experts_per_token,
        router_aux_loss_coef=MODEL.router_balance,
        attn_implementation="eager",
        experts_implementation="eager",
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.MixtralForCausalLM(config)
    named = {name: torch.tensor(np.ascontiguousarray(array)) for name, array in to_theirs(params).items()}
    model.load_state_dict(named)
    return model


def assert_close(ours, theirs, name):
    difference = np.linalg.norm(np.asarray(ours) - theirs) / np.linalg.norm(theirs)
    assert difference <= TOLERANCE, f"{name}: relative difference {difference:.1e}"


@pytest.mark.parametrize("layers", ["stacked", pytest.param("apart", marks=pytest.mark.slow)])
def test_logits_loss_and_gradients(params, theirs, layers):
    tokens = np.random.default_rng(1).integers(MODEL.vocabulary_size, size=(3, 17), dtype=np.int32)
    targets = np.roll(tokens, -1, axis=1)
    targets[:, -1] = -1
    theirs.zero_grad()
    inputs = torch.tensor(tokens).long()
    out = theirs(input_ids=inputs, labels=inputs, output_router_logits=True)
    out.loss.backward()

    compute = Compute(classifier_chunk=20, attention_block=8)
    context = Context(MODEL, compute)

    @jax.jit
    def everything(params, tokens, targets):
        if layers == "apart":
            params = blocks.unstacked(params)
        loss, metrics, grads = next_token.loss_and_grads(mixtral, params, Batch(tokens, targets), context)
        return whole.logits(params, tokens, MODEL, compute), loss, metrics, blocks.stacked(grads)

    logits, loss, metrics, grads = everything(params, tokens, targets)
    assert_close(logits, out.logits.detach().numpy(), "logits")
    assert float(metrics["router_balance"]) == pytest.approx(float(out.aux_loss.detach()), rel=TOLERANCE)
    assert float(loss) == pytest.approx(float(out.loss.detach()), rel=TOLERANCE)
    expected = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    ours = to_theirs(jax.tree.map(np.asarray, grads))
    assert ours.keys() == expected.keys()
    for name, grad in ours.items():
        assert_close(grad, expected[name], name)


def test_greedy_text_is_theirs(params, theirs):
    """Token for token, beyond the window."""
    prompt = np.array([[5, 80, 3]], np.int32)
    with torch.no_grad():
        expected = theirs.generate(torch.tensor(prompt).long(), max_new_tokens=12, do_sample=False).numpy()[0]
    context = Context(MODEL, Compute(recompute="none", attention_block=8))
    params = jax.tree.map(jnp.asarray, params)
    filled = cache.init_cache(params, 16, MODEL, "float32")
    logits, filled = jax.jit(lambda *of: cache.prefill(mixtral, *of, context))(params, filled, prompt, np.int32(3))
    decode, text, caches = jax.jit(lambda *of: cache.decode(mixtral, *of, context)), [5, 80, 3], (filled,)
    while len(text) < len(expected):
        text.append(int(jnp.argmax(logits[0])))
        token, length = np.array([text[-1]], np.int32), np.array([len(text) - 1], np.int32)
        logits, caches = decode(params, caches, token, length)
    assert text == expected.tolist()
