"""HellaSwag itself, beside an independent loop over transformers' logits. Compiled as for users: it computes much."""

import json
import os
from pathlib import Path

import pytest

from tests.evaluation.test_multiple_choice import MODEL, PARITY, compare, random_params, written


@pytest.mark.slow
@pytest.mark.skipif("JAXGPT_DATA" not in os.environ, reason="needs HellaSwag's file in the folder $JAXGPT_DATA")
def test_scores_of_200_examples_are_those_of_a_loop_over_transformers(tmp_path):
    pytest.importorskip("torch", reason=PARITY)
    pytest.importorskip("transformers", reason=PARITY)
    lines = Path(os.environ["JAXGPT_DATA"], "hellaswag_val_first1000.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[:200]]
    compare(random_params(MODEL), written(tmp_path / "a.jsonl", rows), rows)
