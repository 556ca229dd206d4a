"""Compares the parameters of two runs bit by bit.

python -m benchmarks.same_parameters runs/A runs/B; status 1 where they differ
"""

import sys
from pathlib import Path

import jax
import numpy as np

from jaxgpt.runs import checkpoints


def differing(first: Path, second: Path) -> list[str]:
    """Returns the names of the tensors that differ between the runs' newest checkpoints."""
    one, other = (checkpoints.load(run).params for run in (first, second))
    return [
        jax.tree_util.keystr(path)
        for (path, a), b in zip(jax.tree.leaves_with_path(one), jax.tree.leaves(other), strict=True)
        if np.asarray(a).tobytes() != np.asarray(b).tobytes()
    ]


def main() -> int:
    names = differing(*map(Path, sys.argv[1:3]))
    print(f"these differ: {', '.join(names)}" if names else "the same bits in every tensor")
    return 1 if names else 0


if __name__ == "__main__":
    sys.exit(main())
