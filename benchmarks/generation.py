"""Greedy text on this machine, in float32: with a cache, without one, and by transformers with its cache.

    python -m benchmarks.generation [--model-family llama]

The model is GPT-2 124M, or configs/llama_125m.toml, whose 12 query heads share 4 heads of keys and values.

All three have the same random weights and the same prompt of 32 tokens, and go on to 512 tokens in all. In each round
each of them runs once, so that a machine that gets slower does so for all; what is written are medians over the rounds.
Times are of whole texts, the prompt included and compilation not. Without a cache a token is one forward of the text so
far, here of 512 tokens, as it was before there was one: a few of them are timed, and taken for all at that length.
The texts must be the same, token by token. Writes results/generation.json, or generation_llama.json; 1 where they
aren't, or a bar isn't met.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import machine
from benchmarks.peers import transformers_llama
from jaxgpt.generation.decoder import Decoder
from jaxgpt.layers import unembedding
from jaxgpt.models import blocks, family
from jaxgpt.models.blocks import Context, Inputs, Params
from jaxgpt.options import settings
from jaxgpt.options.config import Compute, Model, Sampling
from tests.parity import transformers_model

RESULTS = Path(__file__).parent / "results"
GPT2 = Model(vocabulary_size=50_257)
PROMPT, LENGTH, UNCACHED = 32, 512, 3
LEAST_OVER_UNCACHED = 10.0
MOST_OVER_TRANSFORMERS = {"gpt2": 1.3, "llama": 0.6}
# Matrices times this: at initialisation all tokens are about as likely, and ties would decide. With much more the model
# would be chaotic: a difference in the last bit of an activation would become another text.
SPREAD = 2.0


def cached(model: Model, params: Params, prompt: np.ndarray) -> list[int]:
    """Returns the text that the decoder draws."""
    decoder = Decoder(params, model, Compute(), slots=1, capacity=LENGTH)
    tokens = [decoder.start(0, prompt, Sampling(temperature=0.0), 0)]
    while len(tokens) < LENGTH - PROMPT:
        tokens += decoder.go_on(LENGTH - PROMPT - len(tokens))[0]
    return tokens


@functools.partial(jax.jit, static_argnums=0)
def _next(model: Model, params: Params, tokens: jax.Array, last: jax.Array) -> jax.Array:
    x, _, _ = family(model).features(params, Inputs(tokens), Context(model, Compute(attention="blocks")))
    logits = unembedding.logits(family(model).head(params), x[last][None])
    return jnp.argmax(logits[0, : model.vocabulary_size])


def uncached(model: Model, params: Params, text: np.ndarray) -> list[int]:
    """Returns the last tokens of a text of that length, each computed from the whole text before it."""
    places = range(LENGTH - UNCACHED, LENGTH)
    padded = [np.where(np.arange(LENGTH) < place, text, 0)[None] for place in places]
    return [int(_next(model, params, tokens, place - 1)) for tokens, place in zip(padded, places, strict=True)]


def by_transformers(theirs: torch.nn.Module, prompt: np.ndarray) -> list[int]:
    tokens = torch.from_numpy(prompt)[None].long()
    with torch.no_grad():
        text = theirs.generate(  # type: ignore[operator]
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=LENGTH - PROMPT,
            min_new_tokens=LENGTH - PROMPT,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
        )
    return text[0, PROMPT:].tolist()


def timed(function, *arguments) -> tuple[float, list[int]]:
    started = time.perf_counter()
    tokens = function(*arguments)
    return time.perf_counter() - started, tokens


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model-family", choices=("gpt2", "llama"), default="gpt2")
    options = parser.parse_args()
    model, maker = GPT2, transformers_model.make_model
    if options.model_family == "llama":
        model, maker = settings.read(settings.find_config("llama_125m")).model, transformers_llama.make_model
    stacked = family(model).init(model, jax.random.key(0))
    matrices = family(model).decays(stacked)
    stacked = jax.tree.map(lambda array, is_one: SPREAD * array if is_one else array, stacked, matrices)
    arrays = {name: np.asarray(array) for name, array in transformers_model.flatten(stacked).items()}
    theirs = maker(model, arrays).eval()
    params = blocks.unstacked(stacked)
    prompt = np.random.default_rng(0).integers(model.vocabulary_size, size=PROMPT).astype(np.int32)
    tokens = cached(model, params, prompt)  # compiles
    text = np.concatenate([prompt, np.array(tokens, np.int32)])
    uncached(model, params, text)  # compiles
    seconds: dict[str, list[float]] = {"cached": [], "uncached": [], "transformers": []}
    same = True
    for number in range(options.rounds):
        runs = {
            "cached": functools.partial(timed, cached, model, params, prompt),
            "uncached": functools.partial(timed, uncached, model, params, text),
            "transformers": functools.partial(timed, by_transformers, theirs, prompt),
        }
        for who, run in runs.items():
            took, drawn = run()
            seconds[who].append(took / len(drawn))
            same &= drawn == (tokens[-UNCACHED:] if who == "uncached" else tokens)
        print(
            f"round {number + 1}: " + ", ".join(f"{who} {1e3 * took[-1]:.1f} ms" for who, took in seconds.items()),
            flush=True,
        )
    medians = {who: statistics.median(took) for who, took in seconds.items()}
    over_uncached = medians["uncached"] / medians["cached"]
    over_transformers = medians["cached"] / medians["transformers"]
    most = MOST_OVER_TRANSFORMERS[options.model_family]
    passed = same and over_uncached >= LEAST_OVER_UNCACHED and over_transformers <= most
    print(
        f"{'passed' if passed else 'FAILED'}: {over_uncached:.1f} times the uncached rate (at least "
        f"{LEAST_OVER_UNCACHED:g}), {over_transformers:.2f} of transformers' time (at most "
        f"{most:g}), {'the same text' if same else 'OTHER TEXTS'}"
    )
    result = {
        "passed": passed,
        "same_text": same,
        "model": family(model).describe(model),
        "setting": f"float32, greedy, B=1, {PROMPT} tokens of prompt and {LENGTH} in all",
        "seconds_per_token": medians,
        "rounds": seconds,
        "times_the_uncached_rate": over_uncached,
        "share_of_transformers_time": over_transformers,
        "cpu": machine.cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": machine.versions("jax", "jaxlib", "torch", "transformers"),
    }
    file = RESULTS / ("generation.json" if options.model_family == "gpt2" else "generation_llama.json")
    file.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {file}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
