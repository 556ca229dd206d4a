"""Every key of transformers' LlamaConfig, MistralConfig, MixtralConfig and Qwen3Config, and what comes of it."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from jaxgpt.data import tokenizers
from jaxgpt.errors import UserError
from jaxgpt.interop import huggingface_config, llama_tables
from jaxgpt.options.config import Model

PATH = Path("hf/config.json")
SIZES = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 16, "intermediate_size": 24}
SIZES |= {"max_position_embeddings": 12, "vocab_size": 150, "num_key_value_heads": 2, "head_dim": 4}
MODEL = Model(3, 4, 16, 12, 150, family="llama", kv_heads=2, feed_forward=24, norm_epsilon=1e-6)
MODELS = {
    "llama": MODEL,
    "mistral": dataclasses.replace(MODEL, window=4096),
    "mixtral": dataclasses.replace(
        MODEL, family="mixtral", experts=8, norm_epsilon=1e-5, rope_base=1e6, router_balance=0.001
    ),
    "qwen3": dataclasses.replace(MODEL, query_key_norm=True),
}
NAMES = {"llama": "Llama", "mistral": "Mistral", "mixtral": "Mixtral", "qwen3": "Qwen3"}

HONOURED, REFUSED, WITHOUT_EFFECT = "honoured", "refused", "without effect"
# Keys of `to_dict()` in transformers 5, another value than its default, and what comes of it.
KEYS: dict[str, tuple[Any, str]] = {
    "num_hidden_layers": (5, HONOURED),
    "num_attention_heads": (8, HONOURED),
    "num_key_value_heads": (1, HONOURED),
    "head_dim": (6, HONOURED),
    "hidden_size": (32, HONOURED),
    "intermediate_size": (28, HONOURED),
    "max_position_embeddings": (24, HONOURED),
    "vocab_size": (151, HONOURED),
    "rms_norm_eps": (1e-3, HONOURED),
    "tie_word_embeddings": (True, HONOURED),
    "rope_parameters": ({"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}, HONOURED),
    "hidden_act": ("gelu", REFUSED),
    "architectures": (["GPT2LMHeadModel"], REFUSED),
    "is_encoder_decoder": (True, REFUSED),
    "attention_dropout": (0.5, WITHOUT_EFFECT),
    "initializer_range": (0.1, WITHOUT_EFFECT),
    "use_cache": (False, WITHOUT_EFFECT),
    "bos_token_id": (7, WITHOUT_EFFECT),
    "eos_token_id": ([7, 8], WITHOUT_EFFECT),
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
# Keys that only some of them have.
OWN: dict[str, dict[str, tuple[Any, str]]] = {
    "llama": {
        "attention_bias": (True, REFUSED),
        "mlp_bias": (True, REFUSED),
        "pretraining_tp": (2, WITHOUT_EFFECT),
    },
    "mistral": {"sliding_window": (7, HONOURED)},
    "mixtral": {
        "sliding_window": (7, HONOURED),
        "num_local_experts": (4, HONOURED),
        "num_experts_per_tok": (3, HONOURED),
        "router_aux_loss_coef": (0.5, HONOURED),
        "output_router_logits": (True, WITHOUT_EFFECT),
        "router_jitter_noise": (0.5, WITHOUT_EFFECT),
    },
    "qwen3": {
        "attention_bias": (True, REFUSED),
        "sliding_window": (7, WITHOUT_EFFECT),  # without use_sliding_window
        "max_window_layers": (2, WITHOUT_EFFECT),
        "use_sliding_window": (True, WITHOUT_EFFECT),  # from the layer 28 on, and there are 3
        "layer_types": (["full_attention", "sliding_attention", "full_attention"], REFUSED),
    },
}
# Keys that older files have, or those of other programs.
MORE: dict[str, tuple[Any, str]] = {
    "rope_theta": (500.0, HONOURED),
    "rope_scaling": ({"type": "linear", "factor": 2.0}, HONOURED),
    "partial_rotary_factor": (0.5, REFUSED),
    "rope_interleaved": (True, REFUSED),
    "original_max_position_embeddings": (6, REFUSED),
    "quantization_config": ({"quant_method": "gptq"}, REFUSED),
    "compression_config": ({"format": "pack-quantized"}, REFUSED),
    "auto_map": ({"AutoModelForCausalLM": "modeling.Mine"}, REFUSED),
    "torch_dtype": ("float16", WITHOUT_EFFECT),
    "is_llama_config": (True, WITHOUT_EFFECT),
}
ROWS = [(kind, key, *row) for kind in NAMES for key, row in (KEYS | OWN[kind] | MORE).items()]


def model_of(kind: str, **values: Any) -> Model:
    return huggingface_config.model_of(PATH, {"model_type": kind, **SIZES, **values})


@pytest.mark.parametrize(("kind", "key", "value", "outcome"), ROWS, ids=[f"{kind}-{key}" for kind, key, *_ in ROWS])
def test_what_comes_of_each_key(kind, key, value, outcome):
    assert huggingface_config.notes({"model_type": kind, **SIZES, key: value}) == ()
    if outcome == REFUSED:
        with pytest.raises(UserError, match=rf"^hf/config.json: {key} is "):
            model_of(kind, **{key: value})
    else:
        assert (model_of(kind, **{key: value}) == MODELS[kind]) == (outcome == WITHOUT_EFFECT)


@pytest.mark.parametrize("kind", NAMES)
def test_the_table_has_all_keys_of_transformers(kind):
    transformers = pytest.importorskip("transformers", reason="looks at transformers' configurations: extra parity")
    theirs = getattr(transformers, f"{NAMES[kind]}Config")
    config = theirs().to_dict()
    assert config.keys() - {"model_type"} <= (KEYS | OWN[kind]).keys()
    assert not config.keys() - llama_tables.KINDS[kind].known
    missing = huggingface_config.model_of(PATH, {"model_type": kind})
    assert huggingface_config.model_of(PATH, config) == missing  # so the defaults are theirs
    aliases = theirs.attribute_map.items()
    assert set(aliases) <= {("num_experts", "num_local_experts")}


@pytest.mark.parametrize("kind", NAMES)
def test_what_is_written_is_read_again(kind):
    model = dataclasses.replace(MODELS[kind], tied=True, head_width=6, rope_scaling="llama3", rope_factor=4.0)
    content = huggingface_config.content_of(model, "bfloat16", {"bos_token_id": 1, "eos_token_id": 5})
    assert content["architectures"] == [f"{NAMES[kind]}ForCausalLM"]
    assert huggingface_config.model_of(PATH, content) == model
    assert huggingface_config.notes(content) == ()
    assert huggingface_config.end_of_text(content) == 5


@pytest.mark.parametrize(("begin", "expected"), [(1, 1), (None, 2)])
def test_the_tokens_around_a_text(begin, expected):
    """A beginning of its own, as Llama's, or the end of the text before, as GPT-2's."""
    tokenizer = tokenizers.Bytes()
    tokenizer.begin_of_text, tokenizer.end_of_text = begin, 2
    assert huggingface_config.special_ids(tokenizer) == {"bos_token_id": expected, "eos_token_id": 2}
    assert huggingface_config.special_ids(None) == {"bos_token_id": None, "eos_token_id": None}


def test_sizes_that_follow_from_others_are_left_to_them():
    asked = model_of("llama", num_key_value_heads=4, head_dim=4, intermediate_size=64)  # 2/3 of 64, up to 32s
    assert (asked.kv_heads, asked.head_width, asked.feed_forward) == (0, 0, 0)
    nothing = model_of("llama", num_key_value_heads=None, head_dim=None, intermediate_size=64)
    assert nothing == asked


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("mistral", {"sliding_window": None}, 0),
        ("mixtral", {}, 0),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 5}, 5),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 3, "sliding_window": 5}, 0),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["sliding_attention"] * 3}, 5),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["full_attention"] * 3}, 0),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 1}, "2 of 3 layers have a sliding window"),
        (
            "qwen3",
            {"layer_types": ["sliding_attention"] * 3},
            "layer_types is a list of 3 values; this project's Qwen3",
        ),
        ("qwen3", {"layer_types": ["full_attention"]}, "layer_types has 1 layers, and num_hidden_layers is 3"),
        ("qwen3", {"layer_types": 7}, "layer_types is 7"),
        ("mistral", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "1 of 3 layers have"),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0, and must be a whole number from 1 to"),
        ("qwen3", {"use_sliding_window": 1}, "use_sliding_window is 1, and must be true or false"),
    ],
)
def test_windows(kind, values, message):
    if isinstance(message, int):
        assert model_of(kind, **values).window == message
    else:
        with pytest.raises(UserError, match=message):
            model_of(kind, **values)


LLAMA31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA31 |= {"original_max_position_embeddings": 8192}


def test_rotary_positions_of_old_files_and_new_ones():
    old = model_of("llama", rope_theta=500_000.0, rope_scaling=LLAMA31)
    new = model_of("llama", rope_parameters={"rope_theta": 500_000.0, **LLAMA31})
    both = model_of("llama", rope_theta=1.0, rope_scaling={}, rope_parameters={"rope_theta": 500_000, **LLAMA31})
    assert old == new == both
    assert (old.rope_base, old.rope_scaling, old.rope_factor, old.rope_original_context) == (5e5, "llama3", 8.0, 8192)
    assert model_of("llama", rope_scaling={"rope_type": "default"}) == MODELS["llama"]
    short = model_of("llama", rope_scaling={k: v for k, v in LLAMA31.items() if not k.startswith("original")})
    assert short.rope_original_context == short.context  # as transformers takes it


@pytest.mark.parametrize("name", ["dynamic", "yarn", "longrope", "proportional", "su", "\x1b[2J"])
def test_other_scalings_are_refused_by_name(name):
    for key in ("rope_parameters", "rope_scaling"):
        with pytest.raises(UserError, match=rf"{key} is of type '[^\x1b]*'; this version has default, linear, llama3"):
            model_of("llama", **{key: {"rope_type": name, "factor": 2.0}})


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ([], r"rope_scaling is a list of 0 values, and must be an object"),
        ({"type": 7}, "rope_scaling is of type 7"),
        ({"type": "linear"}, "rope_scaling: factor is missing, which the type linear has"),
        ({"type": "linear", "factor": 0}, "rope_scaling: factor is 0, and must be a positive number"),
        ({"type": "linear", "factor": float("inf")}, "rope_scaling: factor is inf"),
        ({"type": "linear", "factor": True}, "rope_scaling: factor is True"),
        ({"type": "linear", "factor": 10**400}, "rope_scaling: factor is a number of 1,329 bits"),
        (LLAMA31 | {"low_freq_factor": 4.0}, "high_freq_factor is 4.0, and must be above low_freq_factor, 4.0"),
        (LLAMA31 | {"original_max_position_embeddings": 1.5}, "original_max_position_embeddings is 1.5"),
        (LLAMA31 | {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (LLAMA31 | {"mrope_section": [1]}, "rope_scaling has 'mrope_section', which this version doesn't know"),
    ],
)
def test_a_scaling_that_cannot_be(scaling, message):
    with pytest.raises(UserError, match=message):
        model_of("llama", rope_scaling=scaling)


def test_two_scalings_that_differ():
    with pytest.raises(UserError, match="rope_parameters and rope_scaling differ"):
        model_of("llama", rope_scaling=LLAMA31, rope_parameters={"rope_type": "default"})


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3, and doesn't divide 4"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0, and must be a whole number"),
        ({"num_key_value_heads": True}, "num_key_value_heads is True"),
        ({"head_dim": 3}, "a head is 3 wide .head_dim., and that must be even"),
        (
            {"head_dim": None, "hidden_size": 18},
            "hidden_size is 18, 4 heads .* don't divide it, and there is no head_dim",
        ),
        ({"vocab_size": 2**40}, "vocab_size is 1099511627776, and must be a whole number"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6', and must be a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, and must be true or false"),
    ],
)
def test_values_that_no_model_has(kind, values, message):
    with pytest.raises(UserError, match=message):
        model_of(kind, **values)


def test_more_experts_than_there_are():
    with pytest.raises(UserError, match="num_experts_per_tok is 9, of 8 experts"):
        model_of("mixtral", num_experts_per_tok=9)
    assert model_of("mixtral", num_experts=4).experts == 4
    with pytest.raises(UserError, match="num_local_experts is 8 and num_experts is 4"):
        model_of("mixtral", num_experts=4, num_local_experts=8)


@pytest.mark.parametrize("kind", ["gemma2", "phi3", "qwen3_moe", "", 7, None, [], {}, "\x1b[2J"])
def test_an_architecture_that_is_not_here_is_named_with_what_is(kind):
    with pytest.raises(
        UserError, match=r"model_type is .*; this version reads models of gpt2, llama, mistral, mixtral"
    ):
        model_of(kind)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("logit_soft_cap", 30.0, "a model with --model.logit-soft-cap can't be written for transformers"),
        ("query_key_norm", True, "--model.query-key-norm together with --model.experts"),
        ("router_softmax", "before", "--model.router-softmax before"),
    ],
)
def test_a_model_that_transformers_has_not(option, value, message):
    with pytest.raises(UserError, match=message):
        huggingface_config.content_of(dataclasses.replace(MODELS["mixtral"], **{option: value}), "float32", {})


def test_keys_that_no_table_has_are_named():
    (note,) = huggingface_config.notes({"model_type": "llama", "sliding_window": 7})
    assert note == (
        "config.json has keys that transformers' Llama doesn't know, and that are passed over: sliding_window"
    )
