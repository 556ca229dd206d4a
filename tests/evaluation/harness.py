"""lm-evaluation-harness without the network: its own task files and its own code, on rows that are given."""

import importlib.resources
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from jaxgpt.evaluation.tasks import Question


def question(file: str, row: dict[str, Any]) -> Question:
    """Returns the requests that the task of this file makes to a model for this row."""
    config = load_yaml(Path(str(importlib.resources.files("lm_eval.tasks"))) / f"{file}.yaml")
    rows = datasets.Dataset.from_list([row])
    keys = [f"{split}_split" for split in ("training", "validation", "test", "fewshot")]
    splits = {config[key]: rows for key in keys if config.get(key)}
    task = ConfigurableTask(config={**config, "custom_dataset": lambda **options: splits})
    task.build_all_requests()
    contexts, completions = zip(*(request.args for request in task.instances), strict=True)
    document = task.instances[0].doc
    label = 0
    if task.OUTPUT_TYPE == "multiple_choice":
        label = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
    return Question(contexts, completions, int(label))
