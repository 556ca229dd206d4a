"""PyTorch: Hugging Face's model with fused attention and fused AdamW, eager or through torch.compile."""

import time

import numpy as np
import torch

from benchmarks.peers import spec as specs
from benchmarks.peers import transformers_llama
from benchmarks.peers.spec import WARM_UP, Spec
from tests.parity import transformers_model

MAKERS = {"gpt2": transformers_model.make_model, "llama": transformers_llama.make_model}


def measure(spec: Spec) -> None:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    if cuda:
        torch.set_float32_matmul_precision("high")  # TF32, which is also what JAX takes for float32
    with np.load(spec.weights, allow_pickle=False) as arrays:
        model = MAKERS[spec.model.family](spec.model, arrays)
        model.to(device)  # type: ignore[arg-type]  # pyright takes a decorated method for a function
        tokens = torch.from_numpy(arrays["tokens"]).long().to(device)
        targets = torch.from_numpy(arrays["targets"]).long().to(device)
    optimizer = transformers_model.make_optimizer(model, spec.optimizer, fused=True)

    def forward(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=spec.dtype == "bfloat16"):
            return transformers_model.loss(model, tokens, targets)

    if spec.compile:
        forward = torch.compile(forward)
    seconds, first = [], None
    for _ in range(WARM_UP + spec.steps):
        started = time.perf_counter()
        loss = forward(tokens, targets)
        loss.backward()
        pause = 0.0
        if first is None:
            paused = time.perf_counter()
            first = float(loss.detach()), gradient_norm(model)
            pause = time.perf_counter() - paused
        torch.nn.utils.clip_grad_norm_(model.parameters(), spec.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started - pause)
        specs.progress(seconds)
    assert first is not None
    timed = seconds[WARM_UP:]
    specs.report(
        spec,
        "torch.compile" if spec.compile else "torch",
        seconds=timed,
        loss=first[0],
        grad_norm=first[1],
        # Compilation happens inside the first step; without it, what the first step costs more than others is no such.
        compile_seconds=seconds[0] - float(np.median(timed)) if spec.compile else 0.0,
        peak_bytes=torch.cuda.max_memory_allocated() if cuda else specs.peak_resident_bytes(),
        device=torch.cuda.get_device_name() if cuda else "cpu",
    )


def gradient_norm(model: torch.nn.Module) -> float:
    """Returns the global norm, summed in float64: PyTorch's own, in float32, is up to 1e-3 off for millions of
    numbers."""
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float64) for p in model.parameters() if p.grad is not None]
    return float(torch.linalg.vector_norm(torch.stack(norms)))


if __name__ == "__main__":
    measure(specs.read())
