"""The notebooks as they lie in the repository: complete, run from top to bottom, without errors or traces of a machine.

`make test-notebooks` runs them; here nothing is run.
"""

import ast
import importlib
import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = [
    *("01_a_tensors_way", "02_linear_and_embedding", "03_layernorm", "04_gelu", "05_attention", "06_cross_entropy"),
    *("07_the_whole_backward", "08_optimizer", "09_precision", "10_memory", "11_data_parallelism", "12_is_it_right"),
    *("13_rmsnorm_and_rotary", "14_grouped_queries_and_window", "15_swiglu", "16_mixture_of_experts"),
    *("17_lora", "18_sft_mask_and_packing", "19_reward_model", "20_reinforce_to_ppo", "21_grpo", "22_dpo"),
]
DOCSTRINGS = {  # what each derives, and so prints
    "02_linear_and_embedding": {"linear", "embedding"},
    "03_layernorm": {"layernorm"},
    "04_gelu": {"gelu"},
    "05_attention": {"attention"},
    "06_cross_entropy": {"cross_entropy", "unembedding"},
    "08_optimizer": {"adamw", "clipping", "schedules"},
    "09_precision": {"rounding"},
    "11_data_parallelism": {"sharding"},
    "13_rmsnorm_and_rotary": {"rmsnorm", "rotary"},
    "14_grouped_queries_and_window": {"attention"},
    "15_swiglu": {"swiglu", "soft_cap"},
    "16_mixture_of_experts": {"moe", "router"},
    "17_lora": {"lora", "quantised"},
    "18_sft_mask_and_packing": {"packing"},
    "19_reward_model": {"comparisons", "scalar_head"},
    "20_reinforce_to_ppo": {"surrogates", "entropy"},
    "21_grpo": {"advantages"},
    "22_dpo": {"preference"},
}
SOMEBODYS_PATH = re.compile(r"(/home/|/Users/|/root/|/tmp/|/var/|/work/|/opt/|/usr/|\b[A-Z]:\\)")
LARGEST_BYTES = 5 * 2**20  # of all of them, figures and all
MOST_WORDS = 2400  # of text, about ten minutes'

each = pytest.mark.parametrize("name", NAMES)


def cells(name, kind):
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def outputs(cell):
    """(kind, text) of each output."""
    for output in cell["outputs"]:
        if output["output_type"] == "stream":
            yield output["name"], "".join(output["text"])
        elif output["output_type"] == "error":
            yield "error", output["ename"]
        else:
            for kind, data in output["data"].items():
                yield kind, "".join(data)


def test_the_list_is_complete_and_the_readme_has_it_in_order():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\((\w+)\.ipynb\)", readme) == NAMES


@each
def test_it_was_run_from_top_to_bottom_and_nothing_failed(name):
    code = cells(name, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    kinds = {kind for cell in code for kind, _ in outputs(cell)}
    assert kinds.isdisjoint({"error", "stderr"})
    assert not any("Traceback" in text for cell in code for _, text in outputs(cell))
    assert "image/png" in kinds


@each
def test_whatever_prints_or_draws_has_its_output(name):
    for cell in cells(name, "code"):
        if "answer" in cell["metadata"].get("tags", []):
            continue
        text = source(cell)
        kinds = {kind for kind, _ in outputs(cell)}
        if re.search(r"^\s*print\(", text, re.MULTILINE):
            assert "stdout" in kinds, text
        assert ("plt.show()" in text) <= ("image/png" in kinds), text


@each
def test_no_trace_of_a_machine(name):
    for kind in ("code", "markdown"):
        for cell in cells(name, kind):
            assert not SOMEBODYS_PATH.search(source(cell))
            for what, text in outputs(cell) if kind == "code" else ():
                assert what.startswith("image/") or not SOMEBODYS_PATH.search(text)
            assert "execution" not in cell["metadata"]  # times of day


@each
def test_it_derives_compares_and_ends_with_checked_exercises(name):
    """LaTeX with a result in a frame; the project's own code, and none of its functions written again; `jax.grad`."""
    text = "\n".join(source(cell) for cell in cells(name, "markdown"))
    assert r"\boxed" in text
    assert len(re.findall(r"\$\$", text)) >= 4 or text.count("$") >= 20
    code = cells(name, "code")
    trees = [ast.parse(source(cell)) for cell in code]
    imports = [node.module for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert any((module or "").startswith("jaxgpt") for module in imports)
    assert any("jax.grad(" in source(cell) for cell in code)
    for tree in trees:
        assert not [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "forward"]
    exercises = text.partition("## Exercises")[2]
    answers = [cell for cell in code if "answer" in cell["metadata"].get("tags", [])]
    assert len(answers) == len(re.findall(r"^\*\*\d+\.\*\*", exercises, re.MULTILINE)) >= 3
    for cell in answers:
        assert cell["metadata"]["jupyter"]["source_hidden"]
        assert "assert " in source(cell)


@pytest.mark.parametrize(("name", "layers"), DOCSTRINGS.items(), ids=list(DOCSTRINGS))
def test_the_docstrings_it_prints_are_the_layers_of_today(name, layers):
    """A layer's mathematics that changes takes its notebook with it."""
    imported, printed = {}, {}
    for cell in cells(name, "code"):
        for module, names in re.findall(r"^from (jaxgpt[\w.]*) import (.+)$", source(cell), re.MULTILINE):
            imported |= {word.strip(): f"{module}.{word.strip()}" for word in names.split(",")}
        for word in re.findall(r"^print\((\w+)\.__doc__\)$", source(cell), re.MULTILINE):
            printed[word] = "".join(text for kind, text in outputs(cell) if kind == "stdout")
    assert set(printed) >= layers
    for word, shown in printed.items():
        assert importlib.import_module(imported[word]).__doc__ in shown


@each
def test_it_is_ten_minutes_of_reading(name):
    text = " ".join(source(cell) for cell in cells(name, "markdown"))
    assert len(text.split()) <= MOST_WORDS


def test_they_stay_small():
    assert sum(path.stat().st_size for path in FOLDER.glob("*.ipynb")) < LARGEST_BYTES
