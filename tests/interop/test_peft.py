"""Adapters in PEFT's format, and PEFT itself as the oracle: the same logits and the same gradients."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.data import tokenizers
from jaxgpt.errors import UserError
from jaxgpt.interop import bases, detect_format, peft, runs
from jaxgpt.interop.tensors import AdapterSource
from jaxgpt.layers.lora import Adapter
from jaxgpt.models import blocks, family, logits, lora
from jaxgpt.models.blocks import Adapters
from jaxgpt.options.config import Compute, Lora, Model

# Of transformers' own, which PEFT still asks for.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Unable to fetch remote file:UserWarning"),  # it looks for the base at the hub
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
]

GPT2 = Model(layers=2, heads=2, width=16, context=12, vocabulary_size=30)
LLAMA = dataclasses.replace(GPT2, family="llama", heads=4, kv_heads=2, feed_forward=24)
OPTIONS = Lora(rank=3, alpha=5.0, base="float32")
COMPUTE = Compute(attention="blocks", layers="scanned")
TOKENS = np.random.default_rng(0).integers(0, 30, (2, 9))


def base_of(model: Model) -> blocks.Params:
    return jax.tree.map(np.asarray, family(model).init(model, jax.random.key(0)))


def adapters_of(model: Model, options: Lora = OPTIONS) -> Adapters:
    """Returns adapters whose b isn't 0."""
    adapters = lora.init(model, options, jax.random.key(1))
    noise = np.random.default_rng(0)
    return jax.tree.map(lambda array: np.asarray(array + 0.1 * noise.normal(size=array.shape), np.float32), adapters)


def exported(folder: Path, model: Model, options: Lora = OPTIONS, base: str = "base") -> Path:
    """A folder of adapters, as `convert --to peft` writes it."""
    folder.mkdir()
    adapters = adapters_of(model, options)
    source = AdapterSource(options, base, lambda: adapters, bases.fingerprint(base_of(model)))
    peft.write_folder(folder, adapters, model, source, "float32")
    return folder


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with runs of GPT-2's and of Llama's base, which is the current folder."""
    monkeypatch.chdir(tmp_path)
    for model, name in ((GPT2, "base"), (LLAMA, "llama")):
        Path(name).mkdir()
        runs.write(
            Path(name),
            base_of(model),
            model,
            "float32",
            tokenizers.make("characters", "abcdefghijklmnopqrstuvwxyz 12"),
            run=Path(name),
            origin="a test",
        )
    return tmp_path


# PEFT as the oracle


def theirs(model: Model):
    """The base as a model of transformers', by names that the two have in common."""
    torch = pytest.importorskip("torch", reason="PyTorch is the oracle")
    transformers = pytest.importorskip("transformers", reason="transformers' models are PEFT's base")
    base = base_of(model)
    if model.family == "gpt2":
        from tests.parity import transformers_model

        made = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=30,
                n_positions=12,
                n_embd=16,
                n_layer=2,
                n_head=2,
                bos_token_id=0,
                eos_token_id=0,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
            )
        )
        arrays = dict(transformers_model.to_transformers(transformers_model.flatten(base), model))
    else:
        made = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=30,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=12,
                rms_norm_eps=1e-5,
                bos_token_id=0,
                eos_token_id=0,
                tie_word_embeddings=False,
            )
        )
        arrays = {
            "model.embed_tokens.weight": base.embedding.token[:30],
            "model.norm.weight": base.final_norm.scale,
            "lm_head.weight": base.head.weight[:30],
        }
        for layer in range(2):
            block = jax.tree.map(lambda stack, layer=layer: stack[layer], base.blocks)
            q, k, v = np.split(block.qkv.weight, [16, 24], axis=1)
            gate, up = np.split(block.mlp_in.weight, 2, axis=1)
            of_layer = {
                "input_layernorm": block.attention_norm.scale,
                "post_attention_layernorm": block.mlp_norm.scale,
                **{f"self_attn.{name}_proj": part.T for name, part in zip("qkv", (q, k, v), strict=True)},
                "self_attn.o_proj": block.attention_out.weight.T,
                "mlp.gate_proj": gate.T,
                "mlp.up_proj": up.T,
                "mlp.down_proj": block.mlp_out.weight.T,
            }
            arrays |= {f"model.layers.{layer}.{name}.weight": array for name, array in of_layer.items()}
    missing, unexpected = made.load_state_dict({k: torch.tensor(v) for k, v in arrays.items()}, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}  # tied
    return made.eval()


@pytest.mark.parametrize(
    "model", [pytest.param(GPT2, marks=pytest.mark.slow, id="gpt2"), pytest.param(LLAMA, id="llama")]
)
def test_the_same_logits_and_the_same_gradients(tmp_path, model):
    """PEFT reads what is exported; its logits and the gradients of every lora_A and lora_B are ours.

    Within 1e-4 of the largest: two implementations in float32, through two layers.
    """
    library = pytest.importorskip("peft", reason="PEFT is the oracle")
    torch = pytest.importorskip("torch", reason="PyTorch is the oracle")
    folder = exported(tmp_path / "adapter", model)
    adapted = library.PeftModel.from_pretrained(theirs(model), folder, is_trainable=True)
    out = adapted(torch.tensor(TOKENS))
    weights = np.random.default_rng(1).normal(size=(*TOKENS.shape, 30)).astype(np.float32)
    (out.logits * torch.tensor(weights)).sum().backward()

    frozen = lora.freeze(base_of(model), OPTIONS, COMPUTE)

    params = lora.attach(jax.tree.map(jnp.asarray, adapters_of(model)), frozen, model, OPTIONS, "float32")
    ours = logits(params, jnp.asarray(TOKENS, jnp.int32), blocks.Context(model, COMPUTE))
    np.testing.assert_allclose(ours, out.logits.detach().numpy(), atol=1e-4 * np.abs(ours).max())
    grads = by_hand(model, frozen, weights)
    for name, parameter in adapted.named_parameters():
        if "lora_" not in name:
            assert parameter.grad is None
            continue
        match = peft.NAME.fullmatch(name)
        assert match
        found = getattr(grads.blocks[match[3]], match[4].lower())[int(match[2])].T
        expected = parameter.grad.numpy()
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def by_hand(model: Model, frozen: blocks.Params, weights: np.ndarray) -> Adapters:
    """The gradients of Σ weights · logits, by the backward of the family."""
    module = family(model)
    params = lora.attach(jax.tree.map(jnp.asarray, adapters_of(model)), frozen, model, OPTIONS, "float32")
    context = blocks.Context(model, COMPUTE, scatter=lambda grads: lora.gradients(grads, model, OPTIONS))
    x, residuals, _ = module.features(params, blocks.Inputs(jnp.asarray(TOKENS, jnp.int32)), context)
    head = module.head(params)
    dx = jnp.asarray(weights.reshape(-1, 30)) @ head.weight[:30]
    dhead = jax.tree.map(jnp.zeros_like, head)
    return Adapters(module.features_backward(params, residuals, dx.astype(x.dtype), dhead, 0.0, context).blocks)


def test_merged_it_is_what_peft_merges(tmp_path):
    library = pytest.importorskip("peft", reason="PEFT is the oracle")
    folder = exported(tmp_path / "adapter", GPT2)
    merged = library.PeftModel.from_pretrained(theirs(GPT2), folder).merge_and_unload()
    frozen = lora.freeze(base_of(GPT2), OPTIONS, COMPUTE)
    ours = lora.merge(jax.tree.map(jnp.asarray, adapters_of(GPT2)), frozen, GPT2, OPTIONS)
    found = merged.transformer.h[1].attn.c_attn.weight.detach().numpy()
    np.testing.assert_allclose(found, ours.blocks.qkv.weight[1], atol=1e-6)


def test_what_peft_saves_is_read(work):
    """A plain adapter and one by rsLoRA, whose factor is alpha / √r; of some of the projections."""
    library = pytest.importorskip("peft", reason="PEFT writes the adapter")
    for by_root, alpha in ((False, 8.0), (True, 8.0 * 4**0.5)):
        made = library.LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=["c_attn", "c_fc"],
            task_type="CAUSAL_LM",
            use_rslora=by_root,
            init_lora_weights=False,
            fan_in_fan_out=True,
        )
        adapted = library.get_peft_model(theirs(GPT2), made)
        adapted.peft_config["default"].base_model_name_or_path = "base"
        adapted.save_pretrained("saved")
        source = detect_format.open_weights("saved")
        assert source.adapters
        assert source.adapters.options == Lora(rank=4, alpha=alpha, targets=("attn.c_attn", "mlp.c_fc"), base="float32")
        expected = adapted.merge_and_unload().transformer.h[0].mlp.c_fc.weight.detach().numpy()
        np.testing.assert_allclose(source.load().blocks.mlp_in.weight[0], expected, atol=1e-6)


# There and back


@pytest.mark.parametrize(("model", "base"), [(GPT2, "base"), (LLAMA, "llama")], ids=["gpt2", "llama"])
def test_there_and_back(work, model, base):
    options = dataclasses.replace(OPTIONS, targets=("mlp.*", "c_attn") if base == "base" else ("v_proj", "down_proj"))
    source = detect_format.open_weights(str(exported(work / "adapter", model, options, base)))
    assert source.model == model
    assert source.adapters
    found = source.adapters.load()
    jax.tree.map(np.testing.assert_array_equal, dict(found.blocks), dict(adapters_of(model, options).blocks))
    assert source.adapters.options.alpha == 5.0


# What is wrong


def wrong(work: Path, **changes) -> str:
    """The message about a folder whose adapter_config.json has these keys changed."""
    folder = work / "adapter"
    if not folder.exists():
        exported(folder, GPT2)
    content = json.loads((folder / peft.CONFIG).read_text())
    (folder / peft.CONFIG).write_text(json.dumps(content | changes))
    with pytest.raises(UserError) as error:
        detect_format.open_weights(str(folder)).load()
    shutil.rmtree(folder)
    return str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "IA3"),
        ("use_dora", True),
        ("bias", "all"),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("rank_pattern", {"c_attn": 8}),
        ("alpha_pattern", {"c_attn": 8}),
        ("layer_replication", [[0, 2]]),
        ("a_key_of_a_later_version", "something"),
        ("r", 0),
        ("r", True),
        ("lora_alpha", "16"),
        ("use_rslora", "yes"),
        ("base_model_name_or_path", None),
        ("base_model_name_or_path", "nowhere/at/all"),
    ],
)
def test_what_cant_be_read_is_named(work, key, value):
    message = wrong(work, **{key: value})
    assert key in message
    assert "adapter_config.json" in message


def test_another_rank_or_model_than_the_tensors(work):
    assert "lora_A.weight is [3, 16], and [4, 16] by its base and r" in wrong(work, r=4)
    message = wrong(work, base_model_name_or_path="llama")
    assert "is no adapter of a llama of 2 layers, which may have some beside self_attn.q_proj" in message


def test_a_base_with_other_numbers(work):
    exported(work / "adapter", GPT2)
    base = base_of(GPT2)
    base = jax.tree.map(lambda array: array + np.float32(1e-3), base)
    shutil.rmtree("base")
    Path("base").mkdir()
    own = tokenizers.make("characters", "abcdefghijklmnopqrstuvwxyz 12")
    runs.write(Path("base"), base, GPT2, "float32", own, run=Path("base"), origin="a test")
    assert "trained beside other weights than those of base" in wrong(work)


def test_adapters_in_some_layers_only(work):
    folder = exported(work / "adapter", dataclasses.replace(GPT2, layers=1))
    with pytest.raises(UserError, match=r"lora_A beside attn.c_attn is missing in layer 1"):
        detect_format.open_weights(str(folder))


def test_no_weights(work):
    (exported(work / "adapter", GPT2) / peft.WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"there is no adapter_model.safetensors"):
        detect_format.open_weights("adapter")


def test_a_layer_of_any_shape_is_turned(work):
    """(in, R) here is (R, in) there."""
    from safetensors.numpy import load_file

    arrays = load_file(exported(work / "adapter", GPT2) / peft.WEIGHTS)
    a, b = Adapter(*adapters_of(GPT2).blocks["mlp.c_fc"])
    name = "base_model.model.transformer.h.1.mlp.c_fc.lora_{}.weight"
    np.testing.assert_array_equal(arrays[name.format("A")], a[1].T)
    np.testing.assert_array_equal(arrays[name.format("B")], b[1].T)
