"""Folders as runs leave them, without training."""

import dataclasses
import json
import math
import random
from pathlib import Path

import tomli_w

from jaxgpt.options.config import Config, Data, Run, Training

HOSTILE = (
    '</script><script>document.title = "hacked"</script><img src="http://example.invalid/a.png" onerror="hacked()">'
    '<!-- <b>bold</b> &amp; {data} {plotly} ${document.title} \u2028 "quoted" \\ 😀'
)


def write(
    folder: Path,
    *,
    steps: int = 400,
    of: int = 500,
    text: str = "fineweb-10B",
    note: str = "",
    sample: str = "Once upon a time.",
    speed: float = 1.0,
) -> Path:
    """A run after some of its steps: loss falling, two skipped spikes, a null, evaluations, HellaSwag, samples."""
    folder.mkdir(parents=True, exist_ok=True)
    config = Config(data=Data(text=text), training=Training(steps=of), run=Run(name=folder.name, note=note))
    tables = dataclasses.asdict(config) | {"versions": {"jax": "0.10.2", "jaxgpt": "0.1.0"}}
    (folder / "config.toml").write_text(tomli_w.dumps(tables), encoding="utf-8")
    choose, skipped = random.Random(steps), 0
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(steps + 1):
            if step:
                spike = step in (steps // 3, steps // 2)
                skipped += spike
                line = {
                    "step": step,
                    "loss": None if step == 7 else 3.2 + 7.5 * math.exp(-8 * speed * step / of) + choose.gauss(0, 0.05),
                    "learning_rate": 6e-4 * min(1, step / 50),
                    "grad_norm": 25.0 if spike else 0.4 + 3 * math.exp(-step / 40) + 0.1 * choose.random(),
                    "skipped": skipped,
                    "tokens": step * 524288,
                    "tokens_per_second": 460e3 * speed * choose.uniform(0.97, 1.01),
                    "mfu": 0.41 * speed * choose.uniform(0.97, 1.01),
                    "step_seconds": 1.14 / speed,
                    "data_wait_seconds": 0.001 * choose.random(),
                }
                file.write(json.dumps(line) + "\n")
            if step % max(1, of // 10) == 0:
                loss = 3.27 + 7.5 * math.exp(-8 * speed * step / of)
                accuracy = {"accuracy": 0.26, "accuracy_norm": 0.25 + 0.05 * step / of, "examples": 10042}
                file.write(json.dumps({"step": step, "val_loss": loss, "val_bits_per_byte": loss / 3}) + "\n")
                file.write(json.dumps({"step": step, "task": "hellaswag", **accuracy}) + "\n")
    with (folder / "samples.txt").open("w", encoding="utf-8") as file:
        for step in range(0, steps + 1, max(1, of // 10)):
            file.write(f"--- step {step}\n{sample}\nafter {step}\n\n")
    parts = {"masters (float32)": 500, "moments (float32)": 1000, "gradients": 500, "saved activations": 6000}
    plan = {
        "parts": {name: size * 2**20 for name, size in parts.items()} | {"shared, not all at the same time": -(2**28)},
        "total": 7744 * 2**20, "capacity": 24 * 2**30, "source": "the device's", "recompute": "norms",
    }  # fmt: skip
    (folder / "memory_plan.json").write_text(json.dumps(plan))
    (folder / "machine.json").write_text(json.dumps({"devices": "1 × NVIDIA H100", "parameters": 124439808}))
    return folder
