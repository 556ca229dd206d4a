"""Every key of transformers' GPT2Config: honoured, refused, or without effect on a logit."""

from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from jaxgpt.errors import UserError
from jaxgpt.interop import gpt2_tables, huggingface_config
from jaxgpt.options.config import Model

PATH = Path("hf/config.json")
SIZES = MappingProxyType({"n_layer": 3, "n_head": 2, "n_embd": 16, "n_positions": 12, "vocab_size": 150})
MODEL = Model(layers=3, heads=2, width=16, context=12, vocabulary_size=150)

HONOURED, REFUSED, WITHOUT_EFFECT = "honoured", "refused", "without effect"
# Each key of `GPT2Config().to_dict()` in transformers 5, another value than its default, and what comes of it.
KEYS: dict[str, tuple[Any, str]] = {
    "n_layer": (5, HONOURED),
    "n_head": (4, HONOURED),
    "n_embd": (32, HONOURED),
    "n_positions": (24, HONOURED),
    "vocab_size": (151, HONOURED),
    "model_type": ("bloom", REFUSED),
    "n_inner": (20, REFUSED),
    "activation_function": ("gelu", REFUSED),
    "layer_norm_epsilon": (1e-6, REFUSED),
    "scale_attn_weights": (False, REFUSED),
    "scale_attn_by_inverse_layer_idx": (True, REFUSED),
    "add_cross_attention": (True, REFUSED),
    "is_encoder_decoder": (True, REFUSED),
    "tie_word_embeddings": (False, REFUSED),
    "architectures": (["LlamaForCausalLM"], REFUSED),
    "reorder_and_upcast_attn": (True, WITHOUT_EFFECT),
    "resid_pdrop": (0.5, WITHOUT_EFFECT),
    "embd_pdrop": (0.5, WITHOUT_EFFECT),
    "attn_pdrop": (0.5, WITHOUT_EFFECT),
    "initializer_range": (0.1, WITHOUT_EFFECT),
    "summary_type": ("last", WITHOUT_EFFECT),
    "summary_use_proj": (False, WITHOUT_EFFECT),
    "summary_activation": ("tanh", WITHOUT_EFFECT),
    "summary_proj_to_labels": (False, WITHOUT_EFFECT),
    "summary_first_dropout": (0.5, WITHOUT_EFFECT),
    "use_cache": (False, WITHOUT_EFFECT),
    "bos_token_id": (7, WITHOUT_EFFECT),
    "eos_token_id": (7, WITHOUT_EFFECT),
    "pad_token_id": (7, WITHOUT_EFFECT),
    "transformers_version": ("4.0.0", WITHOUT_EFFECT),
    "output_hidden_states": (True, WITHOUT_EFFECT),
    "output_attentions": (True, WITHOUT_EFFECT),
    "return_dict": (False, WITHOUT_EFFECT),
    "dtype": ("bfloat16", WITHOUT_EFFECT),
    "chunk_size_feed_forward": (8, WITHOUT_EFFECT),
    "id2label": ({"0": "x"}, WITHOUT_EFFECT),
    "label2id": ({"x": 0}, WITHOUT_EFFECT),
    "problem_type": ("regression", WITHOUT_EFFECT),
    "_name_or_path": ("x", WITHOUT_EFFECT),
}
# Keys that other files have.
MORE: dict[str, tuple[Any, str]] = {
    "quantization_config": ({"quant_method": "gptq"}, REFUSED),
    "pruned_heads": ({"0": [1]}, REFUSED),
    "auto_map": ({"AutoModelForCausalLM": "modeling.Mine"}, REFUSED),
    "is_causal": (False, REFUSED),
    "torch_dtype": ("float16", WITHOUT_EFFECT),
    "num_labels": (3, WITHOUT_EFFECT),
    "task_specific_params": ({"text-generation": {"do_sample": True}}, WITHOUT_EFFECT),
    "n_ctx": (12, WITHOUT_EFFECT),
}


@pytest.mark.parametrize(("key", "value", "outcome"), [(key, *row) for key, row in (KEYS | MORE).items()])
def test_what_comes_of_each_key(key, value, outcome):
    config = {**SIZES, key: value}
    if key != "model_type":
        assert huggingface_config.notes(config) == ()
    if outcome == REFUSED:
        with pytest.raises(UserError, match=rf"^hf/config.json: {key} is "):
            huggingface_config.model_of(PATH, config)
    else:
        assert (huggingface_config.model_of(PATH, config) == MODEL) == (outcome == WITHOUT_EFFECT)


def test_the_table_has_all_keys_of_transformers():
    transformers = pytest.importorskip(
        "transformers", reason="looks at transformers' GPT2Config, which the parity extra installs"
    )
    config = transformers.GPT2Config().to_dict()
    assert config.keys() <= KEYS.keys()
    assert not config.keys() - gpt2_tables.KNOWN
    assert huggingface_config.model_of(PATH, config) == Model(12, 12, 768, 1024, 50257)
    aliases = transformers.GPT2Config.attribute_map
    ours = {(alias, key) for key, (names, _) in gpt2_tables.SIZES.items() for alias in names}
    assert ours > set(aliases.items())


def test_the_names_of_gelu_are_one_function():
    torch = pytest.importorskip("torch", reason="compares transformers' activations, which the parity extra installs")
    activations = pytest.importorskip("transformers.activations").ACT2FN
    x = torch.linspace(-6, 6, 2001, dtype=torch.float64)
    for name in gpt2_tables.FIXED["activation_function"]:
        torch.testing.assert_close(activations[name](x), activations["gelu_new"](x), rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("alias", "key"),
    [
        ("num_attention_heads", "n_head"),
        ("num_hidden_layers", "n_layer"),
        ("hidden_size", "n_embd"),
        ("max_position_embeddings", "n_positions"),
        ("n_ctx", "n_positions"),
    ],
)
def test_the_other_names_of_sizes(alias, key):
    """They count where GPT-2's own name is missing, and may not contradict it."""
    size = SIZES[key]
    assert huggingface_config.model_of(PATH, {**SIZES, alias: size}) == MODEL
    assert huggingface_config.model_of(PATH, {alias: size, **{k: v for k, v in SIZES.items() if k != key}}) == MODEL
    with pytest.raises(UserError, match=f"{key} is {size} and {alias} is {2 * size}, which are names of one size"):
        huggingface_config.model_of(PATH, {**SIZES, alias: 2 * size})
    with pytest.raises(UserError, match=f"{alias} is '6', and must be a whole number"):
        huggingface_config.model_of(PATH, {**SIZES, alias: "6"})


@pytest.mark.parametrize("key", [*SIZES, "num_attention_heads", "n_ctx"])
@pytest.mark.parametrize(
    "value", [0, -1, 2**31, 10**19, 1.0, "1", True, None, [], {}, float("nan"), float("inf"), "\x1b[2J"]
)
def test_a_size_is_a_whole_number(key, value):
    with pytest.raises(UserError, match=rf"^hf/config.json: {key} is [^\x1b]*, and must be a whole number from 1 to"):
        huggingface_config.model_of(PATH, {**SIZES, key: value})


@pytest.mark.parametrize("key", gpt2_tables.FIXED)
@pytest.mark.parametrize("value", ["\x1b[2J", 7, 1.5, [[]], "yes", {"a": "b" * 10_000}, float("nan")])
def test_values_of_another_type_are_refused(key, value):
    with pytest.raises(UserError, match=rf"{key} is [^\x1b]{{1,60}}; this project's GPT-2 has"):
        huggingface_config.model_of(PATH, {**SIZES, key: value})


@pytest.mark.parametrize("value", [1, 1.0, "true", None])
def test_one_is_not_true(value):
    with pytest.raises(UserError, match="scale_attn_weights is"):
        huggingface_config.model_of(PATH, {**SIZES, "scale_attn_weights": value})


def test_keys_that_no_table_has_are_named():
    (note,) = huggingface_config.notes({**SIZES, "rope_theta": 1e4, "bad\x1b[2J": 1})
    assert note.endswith(r"that are passed over: bad\x1b[2J, rope_theta")
    (note,) = huggingface_config.notes({f"key_{number:03}": 1 for number in range(500)})
    assert note.endswith("key_007 and 492 more")
