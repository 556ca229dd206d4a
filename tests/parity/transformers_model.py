"""This project's GPT-2 as Hugging Face's GPT2LMHeadModel: the same weights under other names.

Both keep a weight as (in, out). Theirs has one tensor per layer where ours are stacked on a leading L axis, and V rows
in the token table where ours is padded to Vp. Arrays go by name here, ours as "blocks.qkv.weight", and JAX isn't
imported: the benchmark measures PyTorch's memory in a process that imports this file.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from jaxgpt.options.config import Model, Optimizer

NAMES = {
    "embedding.token": "transformer.wte.weight",
    "embedding.position": "transformer.wpe.weight",
    "final_norm.scale": "transformer.ln_f.weight",
    "final_norm.bias": "transformer.ln_f.bias",
}
BLOCK_NAMES = {
    "attention_norm.scale": "ln_1.weight",
    "attention_norm.bias": "ln_1.bias",
    "qkv.weight": "attn.c_attn.weight",
    "qkv.bias": "attn.c_attn.bias",
    "attention_out.weight": "attn.c_proj.weight",
    "attention_out.bias": "attn.c_proj.bias",
    "mlp_norm.scale": "ln_2.weight",
    "mlp_norm.bias": "ln_2.bias",
    "mlp_in.weight": "mlp.c_fc.weight",
    "mlp_in.bias": "mlp.c_fc.bias",
    "mlp_out.weight": "mlp.c_proj.weight",
    "mlp_out.bias": "mlp.c_proj.bias",
}


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested named tuples by name, {"embedding.token": array, ...}."""
    if not hasattr(tree, "_asdict"):
        return {prefix: tree}
    items = ((f"{prefix}.{name}" if prefix else name, value) for name, value in tree._asdict().items())
    return {name: leaf for path, value in items for name, leaf in flatten(value, path).items()}


def to_transformers(arrays: Mapping[str, np.ndarray], model: Model) -> Iterator[tuple[str, np.ndarray]]:
    """Ours to (their name, array), one of ours in memory at a time where `arrays` reads them from a file."""
    for ours, theirs in NAMES.items():
        yield theirs, arrays[ours][: model.vocabulary_size] if ours == "embedding.token" else arrays[ours]
    for ours, theirs in BLOCK_NAMES.items():
        for layer, array in enumerate(arrays[f"blocks.{ours}"]):
            yield f"transformer.h.{layer}.{theirs}", array


def from_transformers(arrays: Mapping[str, np.ndarray], model: Model) -> dict[str, np.ndarray]:
    """Theirs to ours; also for gradients, since the rows that are added to the token table are 0."""
    ours = {ours: arrays[theirs] for ours, theirs in NAMES.items()}
    padding = model.padded_vocabulary_size - model.vocabulary_size
    ours["embedding.token"] = np.pad(ours["embedding.token"], ((0, padding), (0, 0)))
    for name, theirs in BLOCK_NAMES.items():
        ours[f"blocks.{name}"] = np.stack([arrays[f"transformer.h.{i}.{theirs}"] for i in range(model.layers)])
    return ours


def make_model(model: Model, arrays: Mapping[str, np.ndarray], *, attention: str = "sdpa") -> GPT2LMHeadModel:
    """A GPT2LMHeadModel of this shape with these weights, in float32, without dropout."""
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=model.vocabulary_size,
            n_positions=model.context,
            n_embd=model.width,
            n_layer=model.layers,
            n_head=model.heads,
            activation_function="gelu_new",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation=attention,  # type: ignore[call-arg]  # taken among **kwargs
        )
    )
    parameters = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, array in to_transformers(arrays, model):
            parameters.pop(name).copy_(torch.from_numpy(np.array(array)))
    assert not parameters, f"without weights: {sorted(parameters)}"
    return theirs


def gradients(theirs: GPT2LMHeadModel, model: Model) -> dict[str, np.ndarray]:
    """The model's accumulated gradients, by our names."""
    return from_transformers({name: p.grad.numpy() for name, p in theirs.named_parameters()}, model)  # type: ignore[union-attr]


def loss(theirs: GPT2LMHeadModel, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy of the targets, (B, T) like the tokens; a target of -1 is passed over."""
    logits = theirs(input_ids=tokens).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)


def make_optimizer(theirs: GPT2LMHeadModel, options: Optimizer, *, fused: bool = False) -> torch.optim.AdamW:
    """torch.optim.AdamW with `options`, at a constant rate; only matrices decay."""
    matrices = [parameter for parameter in theirs.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in theirs.parameters() if parameter.ndim == 1]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=options.learning_rate,
        betas=(options.beta1, options.beta2),
        eps=options.epsilon,
        fused=fused,
    )
