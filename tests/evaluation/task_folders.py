"""Files of tasks, made up, in the formats that they are published in."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WORDS = ("red", "cat", "mat", "hat", "the", "sat", "on", "big", "saw", "ran")
CORE_YAML = """icl_tasks:
-
  label: arc_easy
  dataset_uri: world_knowledge/arc_easy.jsonl
  num_fewshot: [3]
  icl_task_type: multiple_choice
  continuation_delimiter: "\\nAnswer: "
-
  label: copa
  dataset_uri: commonsense_reasoning/copa.jsonl
  num_fewshot: [0]
  icl_task_type: multiple_choice
-
  label: winograd
  dataset_uri: language_understanding/winograd_wsc.jsonl
  num_fewshot: [2]
  icl_task_type: schema
-
  label: squad
  dataset_uri: reading_comprehension/squad.jsonl
  num_fewshot: [2]
  icl_task_type: language_modeling
  continuation_delimiter: "\\nAnswer: "
  has_categories: true
-
  label: lambada_openai
  dataset_uri: language_understanding/lambada_openai.jsonl
  num_fewshot: [0]
  icl_task_type: language_modeling
"""
BASELINES = """Eval Task,Task Category,Task Type,#shots,#datapoints,Random baseline,Centered Metric?,Description
arc_easy,world knowledge,multiple choice,3,50,25,TRUE,"Questions, of science"
copa,commonsense reasoning,multiple choice,0,50,50,TRUE,
winograd,language understanding,schema,2,50,50,,
squad,reading comprehension,language modeling,2,50,0,,"Two
lines"
lambada_openai,language understanding,language modeling,0,50,0,,
"""
SUMS = [
    {"question": f"{a} + {a + 1}?", "answer": f"It is {a}, and {a + 1}.\n#### {a + a + 1:,}"} for a in range(990, 1010)
]
CAPITALS = [
    {"country": "France", "capital": ["Paris"]},
    {"country": "The Netherlands", "capital": ["Amsterdam", "The Hague"]},
    {"country": "Italy", "capital": ["Rome"]},
]
CAPITALS_TOML = """data = "capitals.jsonl"
prompt = "Question: What is the capital of {country}?\\nAnswer:"
answer = "{capital}"
match = "normalised"
stop = ["\\n"]
tokens = 16
shots = 2
"""
INSTRUCTED = [
    {
        "key": 1000,
        "prompt": "Write a title for this line. Do not use any commas.",
        "instruction_id_list": ["punctuation:no_comma", "detectable_format:title"],
        "kwargs": [{}, {"num_words": None, "relation": None}],
    },
    {
        "key": 1001,
        "prompt": "Answer with at least 2 words.",
        "instruction_id_list": ["length_constraints:number_words"],
        "kwargs": [{"num_words": 2, "relation": "at least"}],
    },
    {
        "key": 1002,
        "prompt": "Answer in German.",
        "instruction_id_list": ["language:response_language"],
        "kwargs": [{"language": "de"}],
    },
]


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_core(folder: Path, examples: int = 50) -> str:
    """Writes an eval_bundle of five tasks, which are of all kinds."""
    choose = random.Random(0)

    def words(least: int, most: int) -> str:
        return " ".join(choose.choices(WORDS, k=choose.randint(least, most)))

    def choices(count: int) -> list[str]:
        return [words(1, 3) for _ in range(count)]

    count = range(examples)
    made = {
        "world_knowledge/arc_easy": [
            {"query": f"Question: {words(2, 5)}?", "choices": choices(4), "gold": choose.randrange(4)} for _ in count
        ],
        "commonsense_reasoning/copa": [
            {"query": f"{words(3, 6)}, because", "choices": choices(2), "gold": choose.randrange(2)} for _ in count
        ],
        "language_understanding/winograd_wsc": [
            {"context_options": choices(2), "continuation": words(2, 4), "gold": choose.randrange(2)} for _ in count
        ],
        "reading_comprehension/squad": [
            {
                "context": f"{words(3, 6)}. Question: {words(2, 3)}? ",
                "continuation": choose.choice("ab"),
                "category": "x",
            }
            for _ in count
        ],
        "language_understanding/lambada_openai": [
            {"context": f" {words(2, 6)}", "continuation": choose.choice("ab")} for _ in count
        ],
    }
    for name, rows in made.items():
        write_lines(folder / "eval_data" / f"{name}.jsonl", rows)
    (folder / "core.yaml").write_text(CORE_YAML, encoding="utf-8")
    (folder / "eval_meta_data.csv").write_text(BASELINES, encoding="utf-8")
    return str(folder)


def write_described(folder: Path) -> str:
    """Writes capitals.toml and its lines."""
    write_lines(folder / "capitals.jsonl", CAPITALS)
    (folder / "capitals.toml").write_text(CAPITALS_TOML, encoding="utf-8")
    return str(folder / "capitals.toml")
