"""Speed that a run would reach on many GPUs, by arithmetic: bytes, bandwidths, and the rate of one GPU.

python -m benchmarks.scaling [--mfu 0.4] [--nvlink 360] [--network 40] [--output benchmarks/results/scaling.json]

    seconds of a step = max(products, what is hidden behind them) + what is not hidden
    products = tokens of one GPU · FLOPs per token / (MFU · peak)
    a reduce-scatter or an all-gather of n bytes over N nodes of G GPUs = n (G-1)/G / NVLink + n/G (N-1)/N / network

first between the GPUs of a node, then between the nodes, where each GPU has a network card of its own. An all-reduce
is both, one behind the other. `parallel/traffic.py` is checked to the byte against compiled programs
(tests/parallel/test_sharding.py). The rate of one GPU and the bandwidths are assumptions, given by options: nothing of
this has been measured on GPUs. Each time is given twice, with nothing hidden and with all hidden that could be; the
latency of a collective is left out.
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from jaxgpt.models import blocks, gpt2
from jaxgpt.options import settings
from jaxgpt.options.config import Model
from jaxgpt.parallel import traffic
from jaxgpt.training import flops

PEAK = 989.4e12  # of an H100 SXM in bfloat16
LENGTH = 1024
# Tokens in a step, sequences on a GPU at once, as llm.c's recipes have them; and the stages to show.
RECIPES = {"gpt2_124m": (524_288, 64, (0, 1)), "gpt2_1558m": (1_048_576, 16, (1, 2, 3))}


def table(model: Model, name: str, mfu: float, nvlink: float, network: float) -> Iterator[dict[str, Any]]:
    """Returns a row for each stage and number of GPUs, at the recipe's tokens a step."""
    tokens, most, stages = RECIPES[name]
    shapes = jax.eval_shape(lambda: blocks.unstacked(gpt2.init(model, jax.random.key(0))))
    for zero in stages:
        for devices in (8, 64, 512):
            sequences = tokens // LENGTH / devices  # of one GPU in a step
            micro_batches = max(1, math.ceil(sequences / most))
            sent = traffic.traffic(shapes, devices=devices, zero=zero, micro_batches=micro_batches, weight_bytes=2)
            products = sequences * LENGTH * flops.per_token(model, LENGTH) / (mfu * PEAK)
            crossing = traffic.seconds(sent, devices, nvlink, network)
            yield {
                "model": name,
                "zero": zero,
                "gpus": devices,
                "sequences_per_gpu": sequences,
                "micro_batches": micro_batches,
                "bytes": sent,
                "products_seconds": products,
                "network_seconds": crossing,
                "seconds_nothing_hidden": products + crossing,
                "seconds_all_hidden": max(products, crossing),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mfu", type=float, default=0.4, help="MFU of one GPU, as llm.c counts operations")
    parser.add_argument("--nvlink", type=float, default=360, help="GB/s of a GPU in one direction, inside of a node")
    parser.add_argument("--network", type=float, default=40, help="GB/s of a GPU's network card in one direction")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    options = parser.parse_args()
    rows = []
    print(f"assumed: MFU {options.mfu:.0%}, {options.nvlink:g} GB/s in a node, {options.network:g} GB/s between nodes")
    for name in RECIPES:
        model = replace(settings.read(settings.find_config(name)).model, vocabulary_size=50257)
        print(f"\n{name}, {RECIPES[name][0]:,} tokens a step\n")
        print("| stage | H100s | sequences of each | sent, GB | products | network | tokens/s | of ideal |")
        print("|---|---|---|---|---|---|---|---|")
        for row in table(model, name, options.mfu, 1e9 * options.nvlink, 1e9 * options.network):
            rows.append(row)
            times = row["seconds_nothing_hidden"], row["seconds_all_hidden"]
            rates = " to ".join(f"{RECIPES[name][0] / seconds / 1e6:.2f}" for seconds in times)
            ideal = " to ".join(f"{row['products_seconds'] / seconds:.0%}" for seconds in times)
            cells = (
                str(row["zero"]),
                str(row["gpus"]),
                f"{row['sequences_per_gpu']:g}",
                f"{sum(row['bytes'].values()) / 1e9:.2f}",
                f"{1e3 * row['products_seconds']:.1f} ms",
                f"{1e3 * row['network_seconds']:.1f} ms",
                f"{rates} M",
                ideal,
            )
            print(f"| {' | '.join(cells)} |")
    if options.output:
        options.output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
