"""The base of a run's adapters: known again by a fingerprint, found by its name, and merged with them.

A checkpoint of adapters has no copy of the base. Its about/metadata says what the user named it by, the path that this
was, and a fingerprint of the weights, which doesn't depend on the format or the dtype that they are stored in.
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxgpt.errors import UserError
from jaxgpt.foreign_text import shown
from jaxgpt.interop import tensors
from jaxgpt.interop.tensors import AdapterSource, WeightSource
from jaxgpt.models import lora
from jaxgpt.models.blocks import Params
from jaxgpt.options import settings
from jaxgpt.options.config import Compute
from jaxgpt.runs.about import lora_of, model_of
from jaxgpt.runs.checkpoints import Found

Open = Callable[[str], WeightSource]  # `detect_format.open_weights`


def fingerprint(params: Params) -> str:
    """Returns the SHA-256 of whole, stacked parameters, their numbers as float32 and their shapes."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(params):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape}".encode())
        for part in leaf:  # so that no second copy of a whole tensor is made
            digest.update(np.ascontiguousarray(part, np.float32).tobytes())
    return digest.hexdigest()


def as_numpy(params: Any, dtype: str) -> Any:
    """Returns arrays in NumPy's memory, in a dtype that is a key of `tensors.DTYPES`."""
    return jax.tree.map(lambda array: np.asarray(array).astype(tensors.DTYPES[dtype], copy=False), params)


def check(found: Found, other: str) -> None:
    """Raises a UserError where a checkpoint's adapters belong to a base with another fingerprint."""
    base = found.about["base"]
    if base.get("sha256") != other:
        raise UserError(
            f"{found.path}: these adapters were trained beside other weights than those of "
            f"{shown(base.get('name', 'an unnamed base'))} now. Put the weights back that the run began with "
            "(--init-from)"
        )


def check_beside(adapters: AdapterSource, base: WeightSource) -> None:
    """Raises a UserError where adapters that know their base's fingerprint belong to another one, which is read."""
    if fingerprint(base.load()) != adapters.fingerprint:
        raise UserError(
            f"--lora.adapters: these adapters were trained beside other weights than those of {shown(base.where)}. "
            "Name theirs by --init-from"
        )


def merged(adapters: Params, found: Found, open_weights: Open) -> Params:
    """Returns the plain, stacked parameters of a checkpoint of adapters, in float32, with its base merged into them.

    UserError where its base can't be found or read, or is another one.
    """
    about, model, options = found.about, model_of(found.about), lora_of(found.about)
    source = _open(found, open_weights)
    if any(other.key != "document_start" for other in settings.model_differences(asdict(source.model), model)):
        raise UserError(f"{found.path}: the base {shown(source.where)} is of another shape than these adapters")
    weights = source.load()
    check(found, fingerprint(weights))
    dtype = about["configuration"].get("compute", {}).get("dtype", "float32")
    frozen = lora.freeze(weights, options, Compute(dtype=dtype, layers="scanned"))
    return lora.merge(adapters, frozen, model, options)


def _open(found: Found, open_weights: Open) -> WeightSource:
    """Opens a checkpoint's base by the name that the user gave, or else by the path that it was."""
    base = found.about["base"]
    path = base.get("path", "")
    name = path if path and Path(path).exists() else base.get("name", "")
    if not name:
        raise UserError(f"{found.path}: these adapters don't say what they were trained beside")
    try:
        return open_weights(name)
    except UserError as error:
        raise UserError(
            f"{found.path}: has adapters alone, and the weights beside which they were trained can't be read: {error}"
        ) from None


def known(adapters: AdapterSource, open_weights: Open) -> AdapterSource:
    """Returns adapters with the fingerprint of their base, which is read for it."""
    return replace(adapters, fingerprint=fingerprint(open_weights(adapters.base).load()))
