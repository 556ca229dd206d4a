"""Reads and writes adapters in the format of Hugging Face's PEFT: adapter_config.json and adapter_model.safetensors.

    base_model.model.transformer.h.3.attn.c_attn.lora_A.weight     (R, in), ours turned
    base_model.model.transformer.h.3.attn.c_attn.lora_B.weight     (out, R), ours turned

adapter_config.json is checked key by key: one that changes the mathematics is honoured or refused, whatever other
version of PEFT wrote it. Of the base it says a name alone; what this project writes has its fingerprint too.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jaxgpt import files
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import quoted, shown
from jaxgpt.interop import bases, huggingface_chat, huggingface_tokenizer, tensors
from jaxgpt.interop.safetensors_files import STORED, open_file
from jaxgpt.interop.tensors import AdapterSource, WeightSource
from jaxgpt.layers.lora import Adapter
from jaxgpt.models import family, lora
from jaxgpt.models.blocks import Adapters
from jaxgpt.options.checks import MOST_RANK
from jaxgpt.options.config import Compute, Lora, Model

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FINGERPRINT = "base_sha256"  # in the metadata of the safetensors file
PREFIXES = {"gpt2": "transformer.h", "llama": "model.layers", "mixtral": "model.layers"}  # of blocks
NAME = re.compile(
    r"base_model\.model\.(\w{1,20}\.\w{1,20})\.(0|[1-9]\d{0,8})\.([\w.]{1,80})\.lora_([AB])(?:\.default)?\.weight"
)
KIND = "a PEFT adapter"
# Keys whose values change what is computed, with those that describe adapters of ours. A missing key has the first.
FIXED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False,),
    "lora_bias": (False,),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
}
# Keys that change nothing once the adapters are there. `fan_in_fan_out` says how the base's weights lie.
_WITHOUT_EFFECT = """
auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config exclude_modules fan_in_fan_out
inference_mode init_lora_weights layers_pattern layers_to_transform loftq_config lora_alpha lora_dropout lora_ga_config
megatron_config megatron_core peft_version qalora_group_size r revision runtime_config target_modules task_type
use_rslora
"""
WITHOUT_EFFECT = frozenset(_WITHOUT_EFFECT.split())


def open_folder(folder: Path, open_weights: bases.Open) -> WeightSource:
    """Opens a folder of PEFT's, and by `open_weights` the base that it names.

    UserError where it isn't an adapter that this project has, its files don't agree, or its base can't be read.
    """
    config = files.read_json(folder / CONFIG, 1 << 20, huggingface_tokenizer.root(folder))
    rank, alpha = _check(folder / CONFIG, config)
    name = config.get("base_model_name_or_path")
    if not (isinstance(name, str) and name):
        raise UserError(
            f"{shown(folder / CONFIG)}: base_model_name_or_path is {quoted(name)}, and must name the weights beside "
            "which the adapters were trained"
        )
    try:
        source = open_weights(name)
    except UserError as error:
        raise UserError(f"{shown(folder / CONFIG)}: base_model_name_or_path can't be read: {error}") from None
    adapters, fingerprint = read(folder, source.model, rank)
    options = Lora(rank=rank, alpha=alpha, targets=tuple(adapters.blocks), base="float32")

    def load():
        weights = source.load()
        if fingerprint and fingerprint != bases.fingerprint(weights):
            raise UserError(f"{shown(folder)}: these adapters were trained beside other weights than those of {name}")
        frozen = lora.freeze(weights, options, Compute(layers="scanned"))
        return bases.as_numpy(lora.merge(adapters, frozen, source.model, options), source.dtype)

    return WeightSource(
        where=str(folder),
        kind=KIND,
        model=source.model,
        dtype=source.dtype,
        tokenizer=source.tokenizer,
        load=load,
        notes=(f"its base is {source.where}", *source.notes),
        unreadable_tokenizer=source.unreadable_tokenizer,
        template=huggingface_chat.template_of(folder) or source.template,
        adapters=AdapterSource(options, name, lambda: adapters, fingerprint),
    )


def _check(path: Path, config: dict[str, Any]) -> tuple[int, float]:
    """Returns the rank and the alpha, by which ours are scaled as these are. UserError for adapters of another kind."""
    for key, allowed in FIXED.items():
        value = config.get(key, allowed[0])
        if not any(value == other and type(value) is type(other) for other in allowed):
            raise UserError(
                f"{shown(path)}: {key} is {quoted(value)}; this project has plain LoRA, whose {key} is "
                f"{quoted(allowed[0])}"
            )
    for key, value in config.items():
        if value and key not in FIXED and key not in WITHOUT_EFFECT:
            raise UserError(
                f"{shown(path)}: {shown(key, 40)} is {quoted(value)}, which plain LoRA doesn't have. Merge the adapter "
                "with PEFT (merge_and_unload), and read the model that this gives"
            )
    rank, alpha, by_root = config.get("r"), config.get("lora_alpha"), config.get("use_rslora", False)
    if not (isinstance(rank, int) and not isinstance(rank, bool) and 1 <= rank <= MOST_RANK):
        raise UserError(f"{shown(path)}: r is {quoted(rank)}, and must be a whole number from 1 to {MOST_RANK}")
    if isinstance(alpha, bool) or not (isinstance(alpha, int | float) and 0 < alpha < 1e9):
        raise UserError(f"{shown(path)}: lora_alpha is {quoted(alpha)}, and must be a number above 0")
    if type(by_root) is not bool:
        raise UserError(f"{shown(path)}: use_rslora is {quoted(by_root)}, and must be true or false")
    return rank, float(alpha) * rank**0.5 if by_root else float(alpha)  # rsLoRA's factor is alpha / √rank


def read(folder: Path, model: Model, rank: int) -> tuple[Adapters, str]:
    """Returns the adapters of a folder, stacked arrays of NumPy in float32, and their base's fingerprint or "".

    UserError where a tensor is none of this model's, is missing, or has another shape.
    """
    path = folder / WEIGHTS
    if not path.exists():
        raise UserError(f"{shown(folder)}: there is no {WEIGHTS}; save the adapter again with PEFT, which writes it")
    file, projections, found = open_file(path), family(model).projections(model), {}
    for name in file.keys():  # noqa: SIM118  # it is no dict
        match = NAME.fullmatch(name)
        if (
            not match
            or match[1] != PREFIXES[model.family]
            or int(match[2]) >= model.layers
            or match[3] not in projections
        ):
            raise UserError(
                f"{shown(path)}: the tensor {quoted(name[:120])} is no adapter of a {model.family} of {model.layers} "
                f"layers, which may have some beside {', '.join(projections)}"
            )
        _, layer, of, which = match.groups()
        expected = [rank, projections[of].inputs] if which == "A" else [projections[of].outputs, rank]
        part = file.get_slice(name)
        if part.get_shape() != expected:
            raise UserError(f"{shown(path)}: the tensor {name} is {part.get_shape()}, and {expected} by its base and r")
        if part.get_dtype() not in STORED:
            raise UserError(f"{shown(path)}: the tensor {name} is of type {shown(part.get_dtype())}")
        found[of, which, int(layer)] = name
    if not found:
        raise UserError(f"{shown(path)}: there is no tensor in it")
    targets = [name for name in projections if any(of == name for of, _, _ in found)]

    def stacked(of: str, which: str) -> np.ndarray:
        names = [found.get((of, which, layer)) for layer in range(model.layers)]
        if None in names:
            raise UserError(
                f"{shown(path)}: lora_{which} beside {of} is missing in layer {names.index(None)}; this project has "
                "adapters in every layer or in none"
            )
        return np.stack([file.get_tensor(name).astype(np.float32).T for name in names])

    adapters = Adapters({of: Adapter(stacked(of, "A"), stacked(of, "B")) for of in targets})  # type: ignore[arg-type]
    return adapters, (file.metadata() or {}).get(FINGERPRINT, "")


def write_folder(folder: Path, adapters: Adapters, model: Model, source: AdapterSource, dtype: str) -> None:
    """Fills an empty folder with adapters, stacked arrays in float32, as `PeftModel.from_pretrained` reads it."""
    options = source.options
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": source.base,
        "r": options.rank,
        "lora_alpha": options.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(adapters.blocks),
        "bias": "none",
        "fan_in_fan_out": model.family == "gpt2",  # whose weights transformers has as (in, out)
        "inference_mode": True,
        **{key: FIXED[key][0] for key in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern")},
    }
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    named = {
        f"base_model.model.{PREFIXES[model.family]}.{layer}.{of}.lora_{which}.weight": stack[layer].T
        for of, adapter in adapters.blocks.items()
        for which, stack in zip("AB", adapter, strict=True)
        for layer in range(model.layers)
    }
    arrays = {
        name: np.ascontiguousarray(tensors.cast(np.asarray(array), tensors.DTYPES[dtype], name))
        for name, array in named.items()
    }
    save_file(arrays, folder / WEIGHTS, metadata={"format": "pt", FINGERPRINT: source.fingerprint})
    shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # safetensors makes it readable by its owner alone
