"""This project's Llama as Hugging Face's LlamaForCausalLM: the same weights under other names.

Theirs are (out, in), one tensor for each layer; queries, keys and values have one each, and so have gate and up. JAX
isn't imported: the benchmark measures PyTorch's memory in a process that imports this file.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from jaxgpt.options.config import Model


def to_transformers(arrays: Mapping[str, np.ndarray], model: Model) -> Iterator[tuple[str, np.ndarray]]:
    """Yields their names and arrays, of ours by name ("blocks.qkv.weight")."""
    V, H, K, D = model.vocabulary_size, model.heads, model.key_value_heads, model.width_per_head
    yield "model.embed_tokens.weight", arrays["embedding.token"][:V]
    yield "model.norm.weight", arrays["final_norm.scale"]
    if not model.tied:
        yield "lm_head.weight", arrays["head.weight"][:V]
    for layer in range(model.layers):
        block = {name: arrays[f"blocks.{name}"][layer] for name in NORMS.keys() | MATRICES}
        q, k, v = np.split(block["qkv.weight"], (H * D, (H + K) * D), axis=1)
        gate, up = np.split(block["mlp_in.weight"], 2, axis=1)
        named = {"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v}
        named |= {"self_attn.o_proj": block["attention_out.weight"], "mlp.down_proj": block["mlp_out.weight"]}
        named |= {"mlp.gate_proj": gate, "mlp.up_proj": up}
        for name, array in named.items():
            yield f"model.layers.{layer}.{name}.weight", array.T
        for ours, name in NORMS.items():
            yield f"model.layers.{layer}.{name}.weight", block[ours]


NORMS = {"attention_norm.scale": "input_layernorm", "mlp_norm.scale": "post_attention_layernorm"}
MATRICES = {"qkv.weight", "attention_out.weight", "mlp_in.weight", "mlp_out.weight"}


def make_model(model: Model, arrays: Mapping[str, np.ndarray]) -> LlamaForCausalLM:
    """Returns a LlamaForCausalLM of this shape with these weights, in float32, with fused attention."""
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=model.vocabulary_size,
            hidden_size=model.width,
            intermediate_size=model.feed_forward,
            num_hidden_layers=model.layers,
            num_attention_heads=model.heads,
            num_key_value_heads=model.key_value_heads,
            head_dim=model.width_per_head,
            max_position_embeddings=model.context,
            rms_norm_eps=model.norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": model.rope_base},
            tie_word_embeddings=model.tied,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation="sdpa",  # type: ignore[call-arg]  # taken among **kwargs
        )
    )
    parameters = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, array in to_transformers(arrays, model):
            parameters.pop(name).copy_(torch.from_numpy(np.array(array)))
    assert not parameters, f"without weights: {sorted(parameters)}"
    return theirs
