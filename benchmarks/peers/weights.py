"""Writes the file that all peers read: random weights and one random batch.

    python -m benchmarks.peers.weights --spec spec.json

A program of its own, so that the benchmark itself holds no memory, a GPU's least of all.
"""

from typing import Any

import jax
import numpy as np

from benchmarks.peers import common
from benchmarks.peers import spec as specs
from jaxgpt.models import family


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    spec = specs.read()
    params = family(spec.model).init(spec.model, jax.random.key(0))
    arrays: dict[str, Any] = {
        common.name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    text = np.random.default_rng(0).integers(spec.model.vocabulary_size, size=(spec.batch, spec.sequence + 1))
    arrays |= {"tokens": text[:, :-1].astype(np.int32), "targets": text[:, 1:].astype(np.int32)}
    np.savez(spec.weights, **arrays)


if __name__ == "__main__":
    main()
