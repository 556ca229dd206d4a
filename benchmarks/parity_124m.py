"""Ten AdamW steps of GPT-2 124M beside PyTorch, from the same random weights on the same batch.

    python -m benchmarks.parity_124m

Hugging Face's GPT2LMHeadModel with torch.optim.AdamW and clip_grad_norm_, against this project's train step, in
float32, on one batch: the first 4 x 64 BPE tokens of the embedded text. Prints loss and gradient norm of both at every
step, writes results/parity_124m.json, and exits with 1 where they differ by more than the limits below. The first steps
agree to rounding; each step's rounding then grows with the loss's jumps, so later steps are held to less. The norms
differ more than the losses do: on a CPU, PyTorch's sum of the 38.6 million squares of the token table's gradient is
itself off by about 5e-5.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import torch

from benchmarks import machine
from jaxgpt.data import corpora, loader, tokenizers
from jaxgpt.models import gpt2
from jaxgpt.models.blocks import arrange
from jaxgpt.options.config import Config, Model, Optimizer, Parallel, Training
from jaxgpt.training import step
from jaxgpt.training.state import init_state
from tests.parity import transformers_model

RESULT = Path(__file__).parent / "results" / "parity_124m.json"
OPTIMIZER = Optimizer(learning_rate=1e-4, schedule="constant", beta1=0.9, beta2=0.95, clip_norm=1.0, weight_decay=0.1)
BATCH_SIZE, LENGTH, STEPS = 4, 64, 10
FIRST_STEPS, FIRST_LIMIT, LIMIT = 3, 1e-3, 1e-2  # largest relative difference in the first steps, and in all
LAST_LOSS = 5.0


class Row(NamedTuple):
    """One step: loss and gradient norm before clipping, and how far ours is from PyTorch's, relatively."""

    step: int
    loss: float
    torch_loss: float
    loss_difference: float
    norm: float
    torch_norm: float
    norm_difference: float

    @property
    def passed(self) -> bool:
        limit = FIRST_LIMIT if self.step <= FIRST_STEPS else LIMIT
        return self.loss_difference <= limit and self.norm_difference <= limit


def compare(config: Config, params: gpt2.Params, batch: loader.Batch) -> Iterator[Row]:
    """Takes `config.training.steps` steps of both on this one batch, from these parameters."""
    both = zip(our_steps(config, params, batch), torch_steps(config, params, batch), strict=True)
    for number, ((loss, norm), (torch_loss, torch_norm)) in enumerate(both, start=1):
        loss_difference = abs(loss - torch_loss) / torch_loss
        norm_difference = abs(norm - torch_norm) / torch_norm
        yield Row(number, loss, torch_loss, loss_difference, norm, torch_norm, norm_difference)


def our_steps(config: Config, params: gpt2.Params, batch: loader.Batch) -> Iterator[tuple[float, float]]:
    """Returns loss and gradient norm of each step. `params` are copied: the train step donates its state."""
    state = init_state(config)._replace(params=arrange(jax.tree.map(jax.numpy.copy, params), config.compute))
    train_step = step.make_train_step(config)
    for _ in range(config.training.steps):
        state, metrics = train_step(state, None, batch)
        yield float(metrics.loss), float(metrics.grad_norm)


def torch_steps(config: Config, params: gpt2.Params, batch: loader.Batch) -> Iterator[tuple[float, float]]:
    """Returns loss and gradient norm of each step."""
    arrays = {name: np.asarray(array) for name, array in transformers_model.flatten(params).items()}
    model = transformers_model.make_model(config.model, arrays)
    optimizer = transformers_model.make_optimizer(model, config.optimizer)
    tokens, targets = (torch.from_numpy(array[0]).long() for array in batch[:2])
    for _ in range(config.training.steps):
        loss = transformers_model.loss(model, tokens, targets)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        yield float(loss.detach()), float(norm)


def main() -> int:
    text = corpora.load("embedded")
    tokenizer = tokenizers.make("gpt2", text)
    tokens = tokenizer.encode(text[:10_000])[: BATCH_SIZE * LENGTH + 1]
    config = Config(
        parallel=Parallel(devices=1),
        model=Model(vocabulary_size=tokenizer.vocabulary_size),
        training=Training(steps=STEPS, batch_size=BATCH_SIZE, sequence_length=LENGTH),
        optimizer=OPTIMIZER,
    )
    batch = loader.Batch(tokens[:-1].reshape(1, BATCH_SIZE, LENGTH), tokens[1:].reshape(1, BATCH_SIZE, LENGTH))
    print("step       loss      torch  difference       norm      torch  difference")
    started = time.perf_counter()
    rows = []
    for row in compare(config, gpt2.init(config.model, jax.random.key(0)), batch):
        rows.append(row)
        print(
            f"{row.step:4} {row.loss:10.6f} {row.torch_loss:10.6f} {row.loss_difference:11.1e} {row.norm:10.5f} "
            f"{row.torch_norm:10.5f} {row.norm_difference:11.1e}  {'' if row.passed else 'FAILED'}",
            flush=True,
        )
    learned = rows[-1].loss < LAST_LOSS
    passed = learned and all(row.passed for row in rows)
    print(
        f"{'passed' if passed else 'FAILED'}: limit {FIRST_LIMIT:g} in {FIRST_STEPS} steps, {LIMIT:g} in all; "
        f"last loss {rows[-1].loss:.3f}, limit {LAST_LOSS:g} ({time.perf_counter() - started:.0f} s)"
    )
    RESULT.write_text(json.dumps(result(rows, passed, text[:40]), indent=2) + "\n")
    print(f"written to {RESULT}")
    return 0 if passed else 1


def result(rows: list[Row], passed: bool, text: str) -> dict:
    """Returns the content of the result file: the figures, and what they were made with."""
    return {
        "passed": passed,
        "limits": {"first_steps": FIRST_STEPS, "first": FIRST_LIMIT, "all": LIMIT, "last_loss": LAST_LOSS},
        "steps": [row._asdict() for row in rows],
        "setting": "GPT-2 124M, random weights, float32, one batch: the first 4 x 64 BPE tokens of the embedded text",
        "text_begins": text,
        "cpu": machine.cpu_name(),
        "versions": machine.versions("jax", "jaxlib", "numpy", "torch", "transformers"),
    }


if __name__ == "__main__":
    sys.exit(main())
