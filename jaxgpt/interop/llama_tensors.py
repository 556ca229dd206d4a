"""The tensors of Llama and its relatives (Mistral, Qwen3, Mixtral) in Hugging Face's folders.

Their matrices are torch.nn.Linear's, (out, in), and ours (in, out). Queries, keys and values are one matrix here, and
so are the gate and the up projection of an MLP or of an expert. The rotary pairs are half a head apart in both.
"""

from jaxgpt.interop import llama_config
from jaxgpt.interop.tensors import NUMBER, Part, Table
from jaxgpt.models import llama
from jaxgpt.options.config import Model

TOKEN, HEAD = "embed_tokens.weight", "lm_head.weight"
LAYER = f"layers.{NUMBER}."


def table(model: Model) -> Table:
    """Returns the table of a Hugging Face folder."""
    L, C, V, D = model.layers, model.width, model.vocabulary_size, model.width_per_head
    queries, keys = model.heads * D, model.key_value_heads * D

    def norm(ours: str, theirs: str, width: int) -> Part:
        return Part(f"blocks.{ours}.scale", f"{LAYER}{theirs}.weight", (L,), (width,))

    def dense(ours: str, theirs: str, inputs: int, outputs: int, first: int = 0) -> Part:
        """A matrix, which takes the columns of ours from `first` on."""
        place = (slice(None), slice(first, first + outputs))
        return Part(f"blocks.{ours}.weight", f"{LAYER}{theirs}.weight", (L,), (outputs, inputs), place, turned=True)

    attention = [
        norm("attention_norm", "input_layernorm", C),
        dense("qkv", "self_attn.q_proj", C, queries),
        dense("qkv", "self_attn.k_proj", C, keys, queries),
        dense("qkv", "self_attn.v_proj", C, keys, queries + keys),
        dense("attention_out", "self_attn.o_proj", queries, C),
        norm("mlp_norm", "post_attention_layernorm", C),
    ]
    if model.query_key_norm:
        attention += [norm("query_norm", "self_attn.q_norm", D), norm("key_norm", "self_attn.k_norm", D)]
    if model.experts:
        mlp = [dense("experts.router", "block_sparse_moe.gate", C, model.experts), *_experts(model)]
    else:
        F = llama.feed_forward(model)
        mlp = [dense("mlp_in", "mlp.gate_proj", C, F), dense("mlp_in", "mlp.up_proj", C, F, F)]
        mlp += [dense("mlp_out", "mlp.down_proj", F, C)]
    ends = [Part("embedding.token", TOKEN, (), (V, C), (slice(V),)), Part("final_norm.scale", "norm.weight", (), (C,))]
    if not model.tied:
        ends += [Part("head.weight", HEAD, (), (V, C), (slice(V),))]
    return Table(
        kind=f"a {llama_config.kind_of(model).name}",
        prefix="model.",
        token=TOKEN,
        head=HEAD,
        passed_over=r"layers\.\d{1,9}\.self_attn\.rotary_emb\.inv_freq",
        parts=(*ends, *attention, *mlp),
    )


def _experts(model: Model) -> list[Part]:
    """Returns the matrices of all experts: w1 is the gate, w3 the up projection, w2 the way back."""
    C, F, counts = model.width, llama.feed_forward(model), (model.layers, model.experts)

    def matrix(ours: str, theirs: str, inputs: int, outputs: int, first: int = 0) -> Part:
        name = f"{LAYER}block_sparse_moe.experts.{NUMBER}.{theirs}.weight"
        place = (slice(None), slice(first, first + outputs))
        return Part(f"blocks.experts.{ours}", name, counts, (outputs, inputs), place, turned=True)

    return [matrix("w_in", "w1", C, F), matrix("w_in", "w3", C, F, F), matrix("w_out", "w2", F, C)]
