"""Fuzzed readers of tasks: descriptions and their lines, GSM8K, IFEval and CORE's folder."""

import contextlib
import json
from pathlib import Path

from benchmarks.fuzz_readers import Input, Reader
from jaxgpt.data import tokenizers
from jaxgpt.errors import UserError
from jaxgpt.evaluation import core, exact_match, ifeval
from jaxgpt.evaluation.interface import Options, Subject
from jaxgpt.options.config import Model

SUBJECT = Subject(tokenizers.Bytes(), Model(layers=1, heads=1, width=8, context=256, vocabulary_size=256))
ANSWERS = ("It is 1,234.\n#### 1,234", "<<aaaaaaaaaaaaaaaaaaaa>> *b* [c]\n\n* Ünd ***\n{}, p.s. ******")
DESCRIPTION = {
    "data": "t.jsonl",
    "prompt": "Q: {q}\nA:",
    "answer": "{a}",
    "message": "{q} {{}}",
    "shown_answer": " {a}",
    "separator": "\n",
    "answer_pattern": "(\\w+)",
    "pattern": "(a|b)+|(\\w+)",
    "last_pattern": "[0-9]+$",
    "match": "normalised",
    "stop": ["\n", "Q:"],
    "tokens": 8,
    "shots": 1,
    "examples": "t.jsonl",
}
TOML = "".join(f"{key} = {json.dumps(value)}\n" for key, value in DESCRIPTION.items())
INSTRUCTED = [
    (["keywords:existence", "punctuation:no_comma"], [{"keywords": ["a", "(b"]}, {}]),
    (["keywords:letter_frequency"], [{"letter": "a", "let_frequency": 2, "let_relation": "at least"}]),
    (
        ["length_constraints:nth_paragraph_first_word"],
        [{"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "a", "relation": None}],
    ),
    (["detectable_format:multiple_sections"], [{"section_spliter": "Part", "num_sections": 2}]),
    (["detectable_content:postscript", "language:other"], [{"postscript_marker": "P.S."}, None]),
]
CORE = """icl_tasks:
-
  label: mc
  dataset_uri: a/mc.jsonl
  num_fewshot: [1]
  icl_task_type: multiple_choice
  continuation_delimiter: "\\nAnswer: "
- {label: schema, dataset_uri: schema.jsonl, num_fewshot: [0, 5], icl_task_type: schema}
- label: lm
  dataset_uri: a/lm.jsonl
  num_fewshot: [2]
  icl_task_type: language_modeling
  has_categories: true
"""
BASELINES = 'Eval Task,Type,Random baseline,Description\nmc,x,25,"a, b"\nschema,x,50.0,\nlm,x,0,"two\nlines"\n'


def lines(*rows: dict) -> bytes:
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def descriptions() -> list[Input]:
    rows = lines({"q": "1 + 1?", "a": 2}, {"q": "nöt", "a": ["a", "A b"]}, {"q": "", "a": "c", "more": {}})
    expressions = lines({"q": "x", "a": "(a+)+b"}, {"q": "y", "a": "[a-z]{2,}"})
    regex = json.dumps(DESCRIPTION | {"match": "regex", "answer_pattern": ""}).encode()
    return [{"t.toml": TOML.encode(), "t.jsonl": rows}, {"t.json": regex, "t.jsonl": expressions}]


def read_described(folder: Path) -> None:
    """Reads a task as `evaluate` does, up to the judgement of possible answers."""
    found = sorted([*folder.glob("t.toml"), *folder.glob("t.json")]) or [folder / "t.toml"]
    for path in found:
        task = exact_match.load(str(path), "", SUBJECT, Options())
        task.judged([[ANSWERS[number % 2]] for number in range(len(task.right))]).line()


def sums() -> list[Input]:
    rows = [
        {"question": f"{n} + {n}?", "answer": f"It is <<{n}+{n}={2 * n}>>{2 * n}.\n#### {2 * n:,}"} for n in (3, 999)
    ]
    return [{"gsm8k.jsonl": lines(*rows)}]


def read_gsm8k(folder: Path) -> None:
    task = exact_match.load("gsm8k", str(folder / "gsm8k.jsonl"), SUBJECT, Options(shots_seed=1))
    task.judged([[answer] for answer in ANSWERS] * (len(task.right) // 2) + [["7"]] * (len(task.right) % 2)).line()


def instructed() -> list[Input]:
    rows = [{"key": 1, "prompt": "Do.", "instruction_id_list": names, "kwargs": given} for names, given in INSTRUCTED]
    return [{"ifeval.jsonl": lines(*rows)}]


def read_instructed(folder: Path) -> None:
    task = ifeval.load(str(folder / "ifeval.jsonl"), SUBJECT, Options())
    for answer in ANSWERS:
        task.judged([[answer]] * len(task.checks)).line()


def bundles() -> list[Input]:
    choices = [{"query": f"q{n}", "choices": ["a", "ab", 3], "gold": n % 3} for n in range(4)]
    contexts = [{"context_options": ["a", "b ö"], "continuation": "c d", "gold": n % 2} for n in range(3)]
    texts = [{"context": f"a {n} ", "continuation": "b"} for n in range(4)]
    return [
        {
            "core.yaml": CORE.encode(),
            "eval_meta_data.csv": BASELINES.encode(),
            "eval_data/a/mc.jsonl": lines(*choices),
            "eval_data/schema.jsonl": lines(*contexts),
            "eval_data/a/lm.jsonl": lines(*texts),
        }
    ]


def read_bundle(folder: Path) -> None:
    """Reads a bundle, and makes all requests to the model."""
    for task in core.load(str(folder), SUBJECT, Options()).tasks:
        for number in range(len(task.items)):
            with contextlib.suppress(UserError):
                core.requests(task, number, SUBJECT)


READERS = [
    Reader("a task's description", descriptions, read_described),
    Reader("GSM8K", sums, read_gsm8k),
    Reader("IFEval", instructed, read_instructed),
    Reader("CORE", bundles, read_bundle),
]
