"""lm_eval on a run, beside lm_eval's own loader on the same model exported to Hugging Face."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxgpt.commands import cli

for package in ("lm_eval", "torch", "transformers", "accelerate"):
    pytest.importorskip(
        package, reason=f"{package} comes with the extras lm-eval and parity: pip install -e .[lm-eval]"
    )

pytestmark = pytest.mark.slow

ROOT = Path(cli.__file__).resolve().parents[2]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{validation: {file}}}
validation_split: validation
output_type: {output}
doc_to_text: "{text}"
doc_to_target: "{target}"
{more}
metric_list:
"""
CHOICES = [
    {"query": "The cat sat on", "choices": ["the mat.", "a very long and tedious sentence, 谁知道", "!"], "label": 0},
    {"query": "Question: what is a naïve café? \nAnswer:", "choices": ["a place", "🙂", "nothing"], "label": 1},
    {"query": "word " * 80, "choices": ["more", "words", "than the context"], "label": 2},
]
TEXTS = [{"query": "To be, or not to be. " * 20}, {"query": "x"}, {"query": "naïve 🙂"}]
TASKS = {
    "choice": (
        CHOICES,
        {"output": "multiple_choice", "text": "{{query}}", "target": "{{label}}", "more": "doc_to_choice: choices"},
        ["acc", "acc_norm"],
    ),
    "rolling": (
        TEXTS,
        {"output": "loglikelihood_rolling", "text": "", "target": "{{query}}", "more": ""},
        ["bits_per_byte"],
    ),
    "until": (
        CHOICES,
        {
            "output": "generate_until",
            "text": "{{query}}",
            "target": "{{label}}",
            "more": 'generation_kwargs: {until: ["the", "\\n\\n"], max_gen_toks: 12, do_sample: false}',
        },
        ["exact_match"],
    ),
}


def evaluate(*words: str) -> dict[str, list[dict[str, Any]]]:
    """Each task's samples, from a process of lm_eval's command line."""
    tasks = ["--include_path", "tasks", "--tasks", ",".join(TASKS), "--output_path", "out", "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(Path("cache").absolute())}
    environment = os.environ | offline | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-m", *words, *tasks], env=environment, capture_output=True, text=True, timeout=540
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for path in Path("out").rglob("samples_*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found[path.name.split("_")[1]] = sorted(lines, key=lambda line: line["doc_id"])
        path.unlink()
    assert found.keys() == TASKS.keys()
    return found


def test_a_run_is_scored_as_its_export_is(work):
    """Log-likelihoods within float32's rounding, and the same greedy flags, texts and metrics."""
    options = {
        "model.family": "gpt2",
        "model.layers": 2,
        "model.heads": 2,
        "model.width": 16,
        "model.context": 48,
        "data.tokenizer": "gpt2",
        "data.text": "text.txt",
        "training.steps": 30,
        "training.batch-size": 4,
        "sampling.tokens": 1,
        "optimizer.learning-rate": 0.02,
        "run.name": "a",
    }
    assert cli.main([word for key, value in options.items() for word in (f"--{key}", str(value))]) == 0
    assert cli.main(["convert", "runs/a", "exported"]) == 0
    Path("tasks").mkdir()
    for name, (rows, parts, metrics) in TASKS.items():
        file = Path("tasks", f"{name}.jsonl").absolute()
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        text = TASK.format(name=name, file=file, **parts) + "".join(f"  - metric: {metric}\n" for metric in metrics)
        Path("tasks", f"{name}.yaml").write_text(text)
    adapter = ["jaxgpt.evaluation.lm_eval_adapter", "run", "--model", "jaxgpt", "--model_args", "run=runs/a,devices=1"]
    ours = evaluate(*adapter, "--batch_size", "4")
    exported = ["--model_args", "pretrained=exported,dtype=float32,max_length=48", "--device", "cpu"]
    theirs = evaluate("lm_eval", "run", "--model", "hf", *exported)
    for task, (_, _, metrics) in TASKS.items():
        for mine, their in zip(ours[task], theirs[task], strict=True):
            assert mine["arguments"] == their["arguments"]
            for (my_answer,), (their_answer,) in zip(mine["resps"], their["resps"], strict=True):
                if task == "choice":
                    assert float(my_answer[0]) == pytest.approx(float(their_answer[0]), rel=1e-4)
                    assert my_answer[1] == their_answer[1]
                elif task == "rolling":
                    assert float(my_answer) == pytest.approx(float(their_answer), rel=1e-4)
                else:
                    assert my_answer == their_answer
            for metric in metrics if task != "rolling" else ():
                assert mine[metric] == their[metric]
    assert len({answer for sample in ours["until"] for (answer,) in sample["resps"]}) > 1
