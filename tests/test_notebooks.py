"""The notebooks as they lie in the repository: complete, run from top to bottom, without errors or traces of a machine.

`make test-notebooks` runs them; here nothing is run.
"""

import ast
import importlib
import json
import math
import re
import types
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = [
    "00_jax_for_pytorch",
    *("01_a_tensors_way", "02_linear_and_embedding", "03_layernorm", "04_gelu", "05_attention", "06_cross_entropy"),
    *("07_the_whole_backward", "08_optimizer", "09_precision", "10_memory", "11_data_parallelism", "12_is_it_right"),
    *("13_rmsnorm_and_rotary", "14_grouped_queries_and_window", "15_swiglu", "16_mixture_of_experts"),
    *("17_lora", "18_sft_mask_and_packing", "19_reward_model", "20_reinforce_to_ppo", "21_grpo", "22_dpo"),
    "23_backprop_ninja",
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
# Numbers of the text and the printed line that they are from: (notebook, words of the text, words of the line).
PRINTED = [
    ("01_a_tensors_way", "64% of the guesses are right", "share of right guesses"),
    ("01_a_tensors_way", "In the end 70% are right", "share of right guesses"),
    ("04_gelu", "$-0.13$ and $1.13$", "lowest slope"),
    ("04_gelu", "around $x=-0.75$", "smallest output at"),
    ("04_gelu", "differ by at most 0.0005", "the two forms differ"),
    ("05_attention", "from 2.73, which", "in the first 20 steps"),
    ("05_attention", "with 98% of its weight", "behind the query's own last occurrence"),
    ("07_the_whole_backward", "grows 11-fold", "as GPT-2's        x grows"),
    ("07_the_whole_backward", "7$ times as large", "times as large as GPT-2's"),
    ("07_the_whole_backward", "is 68 times that", "without 1/√2L     x grows"),
    ("07_the_whole_backward", "from 1.0 to 4.7", "no sums, as GPT-2's"),
    ("07_the_whole_backward", "a cosine of 0.09", "with the sums: cosine"),
    ("07_the_whole_backward", "the cosine is -0.02", "without: cosine"),
    ("07_the_whole_backward", "in 9.7, the factor", "as GPT-2's        x grows"),
    ("08_optimizer", "the first step is 3.2 times too long", "without correction is"),
    ("09_precision", "sum\nof a thousand ones is 256", "1000 ones, added in bfloat16"),
    ("12_is_it_right", r"is $6\cdot10^{-7}$", "central    best h"),
    ("16_mixture_of_experts", r"\text{balance} = k", "where all loads are alike"),
    ("21_grpo", "44% of its greatest, and the second 66%", "1 of 8 right"),
    ("21_grpo", "end at hardly more than 1 where", "mean over sequences: 8 tokens"),
    ("22_dpo", "= 2.197$", "DPO, a tenth flipped  h ="),
    ("22_dpo", "DPO's is at 5.7", "DPO                   h ="),
]
# Numbers of the text that no cell prints, and what they are said to be.
COMPUTED = [
    ("02_linear_and_embedding", r"\approx 6\cdot10^{11}$", 2 * 8192 * 50304 * 768),
    ("02_linear_and_embedding", r"\approx 6\cdot10^{6}$", 8192 * 768),
    ("05_attention", "= 4$ times as much as $q$, $k$, $v$ and out together", 1024**2 / (4 * 1024 * 64)),
    ("06_cross_entropy", "it is 1.6 GB in float32", 8192 * 50304 * 4 / 1e9),
    ("06_cross_entropy", "$x$ is 25 MB", 8192 * 768 * 4 / 1e6),
    ("07_the_whole_backward", r"\approx 7$ times as large", 48**0.5),
    ("09_precision", "2^{-7} = 0.0078$", 2**-7),
    ("09_precision", r"u = 2^{-8}\approx 0.004", 2**-8),
    ("13_rmsnorm_and_rotary", "makes a turn every 6 tokens", 2 * math.pi),
    ("14_grouped_queries_and_window", "131,040 tokens", 32 * 4095),
    ("17_lora", "163,840 trained numbers", 2048 * 16 + 16 * 8192),
    ("17_lora", "16.8 million", 2048 * 8192 / 1e6),
    ("17_lora", r"up to $0.152\,m$", (1 - 0.696) / 2),
    ("19_reward_model", "a difference of 2 is 88%", 100 / (1 + math.exp(-2))),
    ("19_reward_model", "one of 4 is 98%", 100 / (1 + math.exp(-4))),
    ("19_reward_model", "that is 9 instead of 72", 9 * 8),
    ("19_reward_model", r"$h=\log 9\approx 2.2$", math.log(9)),
    ("21_grpo", "the first is 44% of its greatest", 100 * 4 * 1 / 8 * 7 / 8),
    ("21_grpo", "and the second 66%", 100 * 2 * (1 / 8 * 7 / 8) ** 0.5),
    ("22_dpo", "there are $8^3=512$ answers", 8**3),
]
SOMEBODYS_PATH = re.compile(r"(/home/|/Users/|/root/|/tmp/|/var/|/wor[k]/|/opt/|/usr/|\b[A-Z]:\\)")
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
    blanks = [cell for cell in code if "exercise" in cell["metadata"].get("tags", [])]
    assert len(blanks) == len(re.findall(r"^\*\*\d+\.\*\*", exercises, re.MULTILINE)) >= 3
    for cell in blanks:
        assert re.search(r"^answer = \.\.\.|^    return \.\.\.$", source(cell), re.MULTILINE)
        assert "check(" in source(cell)
        (printed,) = [text for kind, text in outputs(cell) if kind == "stdout"]
        assert printed.rstrip().endswith(("no answer yet", "not written yet"))
    answers = (FOLDER / "answers" / f"{name}.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\d+)$", answers, re.MULTILINE) == [str(n + 1) for n in range(len(blanks))]


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


def missing(code):
    """The names that code takes from modules of the project, and that these haven't."""
    tree, modules, found = ast.parse(code), {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxgpt"):
            for alias in node.names:
                there = importlib.import_module(node.module)
                if not hasattr(there, alias.name):
                    try:
                        importlib.import_module(f"{node.module}.{alias.name}")
                    except ImportError:
                        found.append(f"{node.module}.{alias.name}")
                        continue
                thing = getattr(there, alias.name)
                if isinstance(thing, types.ModuleType):
                    modules[alias.asname or alias.name] = thing
    stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id not in stored:
            module = modules.get(node.value.id)
            if module is not None and not hasattr(module, node.attr):
                found.append(f"{node.value.id}.{node.attr}")
    return found


@pytest.mark.parametrize("name", NAMES)
def test_all_that_it_takes_from_the_project_is_there(name):
    code = "\n".join(source(cell) for cell in cells(name, "code"))
    assert missing("\n".join(line for line in code.splitlines() if not line.startswith(("%", "!")))) == []


def test_a_name_that_is_gone_is_seen():
    code = "from jaxgpt.training import fit, memory_plan, nowhere\nfit.prepare\nmemory_plan.prepare"
    assert missing(code) == ["jaxgpt.training.nowhere", "memory_plan.prepare"]


def numbers(text):
    """(value, half a unit of its last digit) of each number of a text."""
    text = re.sub(r"([\d.]+)\\cdot ?10\^\{(-?\d+)\}", r"\1e\2", text.replace("−", "-"))
    for found in re.findall(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?", text):
        mantissa, _, exponent = found.rstrip(",").replace(",", "").partition("e")
        yield float(f"{mantissa}e{exponent or 0}"), 0.5 * 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))


def says(words, value):
    """Returns whether one of the numbers in the words is the value, rounded."""
    return any(abs(found - value) <= half * (1 + 1e-9) for found, half in numbers(words))


@pytest.mark.parametrize(("name", "words", "line"), PRINTED, ids=lambda value: value[:24])
def test_numbers_in_the_text_are_those_that_are_printed(name, words, line):
    """Each number of the words is one of the line's, rounded; a notebook without its number fails too."""
    assert words in "\n".join(source(cell) for cell in cells(name, "markdown"))
    out = [text for cell in cells(name, "code") for kind, text in outputs(cell) if kind == "stdout"]
    (row,) = [row for row in "\n".join(out).split("\n") if line in row]
    printed = [value for value, _ in numbers(row)]
    for value, half in numbers(words):
        assert any(abs(found - value) <= half * (1 + 1e-9) for found in printed), (value, row)


@pytest.mark.parametrize(("name", "words", "value"), COMPUTED, ids=lambda value: str(value)[:24])
def test_numbers_in_the_text_are_what_they_are_said_to_be(name, words, value):
    assert words in "\n".join(source(cell) for cell in cells(name, "markdown"))
    assert says(words, value)


def test_a_number_that_is_not_the_value_is_seen():
    assert says("At $T=1024$ that is 4 times as much", 1024**2 / (4 * 1024 * 64))
    assert not says("At $T=1024$ that is 16 times as much", 1024**2 / (4 * 1024 * 64))
    assert says(r"near $6\cdot10^{-7}$", 5.6e-7)
    assert not says(r"near $10^{-5}$", 5.6e-7)


@each
def test_it_is_ten_minutes_of_reading(name):
    text = " ".join(source(cell) for cell in cells(name, "markdown"))
    assert len(text.split()) <= MOST_WORDS


def test_they_stay_small():
    assert sum(path.stat().st_size for path in FOLDER.glob("*.ipynb")) < LARGEST_BYTES
