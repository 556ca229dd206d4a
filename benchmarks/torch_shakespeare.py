"""The character model of tiny Shakespeare in plain PyTorch, with which ours is compared.

    python -m benchmarks.torch_shakespeare --seed 0

The setting is nanoGPT's for a CPU: 4 layers, 4 heads, width 128, 64 characters, 12 sequences a step, 2000 steps, the
learning rate from 1e-3 to 1e-4 by a cosine after 100 steps of warm-up, betas 0.9 and 0.99, decay 0.1 of the matrices,
no dropout, gradients clipped at 1. Prints the seconds that training took, without evaluation, and the loss over the
whole validation split, the last tenth of the text, in windows of 64 that don't overlap.
"""

import argparse
import json
import math
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks import machine
from jaxgpt.data import corpora, loader, tokenizers

LAYERS, HEADS, WIDTH, LENGTH, BATCH = 4, 4, 128, 64, 12
PEAK, FINAL, WARM_UP = 1e-3, 1e-4, 100
BETAS, DECAY, CLIP = (0.9, 0.99), 0.1, 1.0


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.attention_out = nn.Linear(WIDTH, WIDTH)
        self.mlp_norm = nn.LayerNorm(WIDTH)
        self.mlp_in = nn.Linear(WIDTH, 4 * WIDTH)
        self.mlp_out = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, HEADS, WIDTH // HEADS))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).flatten(2))
        hidden = functional.gelu(self.mlp_in(self.mlp_norm(x)), approximate="tanh")
        return x + self.mlp_out(hidden)


class GPT(nn.Module):
    def __init__(self, vocabulary_size: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary_size, WIDTH)
        self.position = nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*[Block() for _ in range(LAYERS)])
        self.final_norm = nn.LayerNorm(WIDTH)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                into_stream = name.endswith(("attention_out.weight", "mlp_out.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * LAYERS) if into_stream else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Returns the mean loss of the targets that aren't -1; both (B, T)."""
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        logits = self.final_norm(self.blocks(x)) @ self.token.weight.T
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=loader.IGNORED)


def learning_rate(step: int, steps: int) -> float:
    if step < WARM_UP:
        return PEAK * (step + 1) / WARM_UP
    progress = (step - WARM_UP) / max(steps - WARM_UP, 1)
    return FINAL + (PEAK - FINAL) * (1 + math.cos(math.pi * progress)) / 2


def train(model: GPT, tokens: torch.Tensor, steps: int, generator: torch.Generator) -> float:
    """Trains on sequences from random places; returns the seconds it took."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=BETAS, fused=True)
    started = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        starts = torch.randint(len(tokens) - LENGTH, (BATCH, 1), generator=generator)
        windows = tokens[starts + torch.arange(LENGTH + 1)]
        loss = model(windows[:, :-1], windows[:, 1:])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        if (step + 1) % 250 == 0:
            print(
                f"step {step + 1}, loss {float(loss.detach()):.3f}, {time.perf_counter() - started:.1f} s", flush=True
            )
    return time.perf_counter() - started


@torch.no_grad()
def validation_loss(model: GPT, tokens: np.ndarray) -> float:
    """Returns the mean loss over every token but the first."""
    total = 0.0
    for inputs, targets in loader.validation_batches(tokens, batch_size=256, sequence_length=LENGTH):
        count = int((targets != loader.IGNORED).sum())
        total += count * float(model(torch.from_numpy(inputs).long(), torch.from_numpy(targets).long()))
    return total / (len(tokens) - 1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--data", default="tinyshakespeare", help="a text's name, or the path of a text file")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    text = corpora.load(options.data)
    tokenizer = tokenizers.make("characters", text)
    training, validation = loader.split(tokenizer.encode(text), 0.1)
    model = GPT(tokenizer.vocabulary_size)
    generator = torch.Generator().manual_seed(options.seed)
    seconds = train(model, torch.from_numpy(training).long(), options.steps, generator)
    loss = validation_loss(model, validation)
    print(f"{options.steps} steps in {seconds:.1f} s; validation loss {loss:.4f}")
    result = {"who": "torch", "seed": options.seed, "steps": options.steps, "seconds": seconds, "val_loss": loss}
    print(json.dumps(result | {"cpu": machine.cpu_name(), "versions": machine.versions("torch")}))


if __name__ == "__main__":
    main()
