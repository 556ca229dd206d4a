"""CORE's tasks beside an independent loop over a model's logits, one text at a time."""

import csv
import json
import random
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from jaxgpt.data import tokenizers
from jaxgpt.errors import UserError
from jaxgpt.evaluation import core
from jaxgpt.evaluation.interface import Engine, Options, Subject
from jaxgpt.evaluation.scoring import Score, make_scorer
from jaxgpt.models import gpt2
from jaxgpt.options.config import Compute, Config, Model
from tests import whole
from tests.evaluation.task_folders import BASELINES, CORE_YAML, write_core, write_lines

MODEL = Model(layers=1, heads=2, width=16, context=160, vocabulary_size=256)
BYTES = Subject(tokenizers.Bytes(), MODEL)
NEWLINE = 10  # what stands before a text of bytes


@pytest.fixture(scope="module")
def params():
    """Random, and large enough that some bytes are much likelier than others."""
    return jax.tree.map(lambda array: 4 * array, gpt2.init(MODEL, jax.random.key(2)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return Path(write_core(tmp_path_factory.mktemp("bundle")))


def unreachable(_):
    raise AssertionError("CORE draws nothing")


def numbers(tasks: core.Core, engine: Engine) -> tuple[list[core.SubResult], core.CoreResult]:
    """Returns each task's numbers, and their mean's."""
    *results, mean = tasks.results(engine)
    assert isinstance(mean, core.CoreResult)
    return [result for result in results if isinstance(result, core.SubResult)], mean


class Plain:
    """The losses and the likeliest bytes of one text after another."""

    def __init__(self, params):
        compute = Compute(layers="scanned")
        self.logits = jax.jit(lambda tokens: whole.logits(params, tokens, MODEL, compute))

    def __call__(self, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Returns both of each token but the first; of a long text, of its end."""
        kept = tokens[-MODEL.context :]
        padded = np.zeros((1, MODEL.context), np.int32)
        padded[0, : len(kept)] = kept
        z = np.asarray(self.logits(padded), np.float64).reshape(MODEL.context, -1)[: len(kept) - 1, :256]
        log_p = z - np.log(np.sum(np.exp(z - z.max(-1, keepdims=True)), -1, keepdims=True)) - z.max(-1, keepdims=True)
        losses = -log_p[np.arange(len(kept) - 1), kept[1:]]
        skipped = len(tokens) - len(kept)
        return np.concatenate([np.full(skipped, np.nan), losses]), np.concatenate([np.zeros(skipped), z.argmax(-1)])


def loop(folder: Path, entry: dict, plain: Plain) -> list[bool]:
    """Returns whether each example of a task is answered rightly, by the rules of nanochat's evaluation."""
    rows = [json.loads(line) for line in (folder / "eval_data" / entry["dataset_uri"]).read_text().splitlines()]
    random.Random(1337).shuffle(rows)
    shots, between = entry["num_fewshot"][0], entry.get("continuation_delimiter", " ")
    kind, rights = entry["icl_task_type"], []
    for index, row in enumerate(rows):
        others = rows[:index] + rows[index + 1 :]
        shown = ""
        for other in random.Random(1234 + index).sample(others, shots):
            if kind == "multiple_choice":
                shown += other["query"] + between + other["choices"][other["gold"]] + "\n\n"
            elif kind == "schema":
                shown += other["context_options"][other["gold"]] + between + other["continuation"] + "\n\n"
            else:
                shown += other["context"].strip() + between + other["continuation"] + "\n\n"
        if kind == "multiple_choice":
            texts = [shown + row["query"] + between + choice for choice in row["choices"]]
        elif kind == "schema":
            texts = [shown + context + between + row["continuation"] for context in row["context_options"]]
        else:
            texts = [shown + row["context"].strip() + between + row["continuation"]]
        coded = [[NEWLINE, *text.encode()] for text in texts]
        if kind == "language_modeling":
            begin = len((shown + row["context"].strip() + between).strip().encode()) + 1
            _, likeliest = plain(coded[0])
            rights.append(likeliest[begin - 1 :].tolist() == coded[0][begin:])
            continue
        same = 0
        turned = coded if kind == "multiple_choice" else [text[::-1] for text in coded]
        while all(len(text) > same and text[same] == turned[0][same] for text in turned):
            same += 1
        means = []
        for text in coded:
            begin = same if kind == "multiple_choice" else len(text) - same
            losses, _ = plain(text)
            means.append(float(np.mean(losses[begin - 1 :])) if begin < len(text) else float("nan"))
        best = means.index(min(means))
        rights.append(best == row["gold"])
    return rights


def test_each_tasks_score_is_that_of_an_independent_loop(folder, params):
    """Each task has 50 examples; the centred accuracies, their errors and their mean agree as well."""
    found = core.load(str(folder), BYTES, Options())
    scorer = make_scorer(Config(model=MODEL, compute=Compute(layers="scanned")), 8)
    results, mean = numbers(found, Engine(scorer, params, unreachable))
    plain, centred, variance = Plain(params), [], 0.0
    guesses = {row["Eval Task"]: float(row["Random baseline"]) for row in csv.DictReader(BASELINES.splitlines())}
    for entry, result in zip(yaml.safe_load(CORE_YAML)["icl_tasks"], results, strict=True):
        rights = loop(folder, entry, plain)
        assert result.task == f"core/{entry['label']}"
        assert result.examples == len(rights) == 50
        assert result.accuracy == pytest.approx(np.mean(rights), abs=1e-12)
        assert result.standard_error == pytest.approx(np.std(rights, ddof=1) / np.sqrt(50), abs=1e-12)
        guess = 0.01 * guesses[entry["label"]]
        centred.append((np.mean(rights) - guess) / (1 - guess))
        variance += (result.standard_error / (1 - guess)) ** 2
        assert result.centred == pytest.approx(centred[-1], abs=1e-12)
    assert mean.centred == pytest.approx(np.mean(centred), abs=1e-12)
    assert mean.standard_error == pytest.approx(np.sqrt(variance) / 5, abs=1e-12)
    assert (mean.task, mean.tasks, mean.examples) == ("core", 5, 250)
    assert len({result.accuracy for result in results if result.accuracy not in (0, 1)}) > 2, "too much alike to tell"


def asked(tmp_path: Path, kind: str, rows: list[dict], number: int = 0, shots: int = 0, subject=None, delimiter=" "):
    """Returns the requests for one of the rows, all of which are shuffled, with GPT-2's tokens."""
    subject = subject or Subject(tokenizers.GPT2(), Model(layers=1, heads=1, width=8, context=1024))
    items = [core.ITEMS[kind](row) for row in rows]
    return core.requests(core.SubTask("t", kind, shots, delimiter, 0.0, items), number, subject)


def text(tokens) -> str:
    return tokenizers.GPT2().decode(tokens)


def test_what_is_scored_in_gpt2s_tokens(tmp_path):
    """<|endoftext|> before each; a choice begins where the texts part, a continuation where they meet again."""
    row = {"query": "The sky is", "choices": ["dark blue", "dark green"], "gold": 0}
    blue, green = asked(tmp_path, "multiple_choice", [row])
    assert text(blue.context) == text(green.context) == "<|endoftext|>The sky is dark"
    assert (text(blue.completion), text(green.completion)) == (" blue", " green")
    row = {"context_options": ["Ann told Bob", "Ann told Eve"], "continuation": "that it rained.", "gold": 1}
    first, second = asked(tmp_path, "schema", [row])
    assert (text(first.context), text(second.context)) == ("<|endoftext|>Ann told Bob", "<|endoftext|>Ann told Eve")
    assert text(first.completion) == text(second.completion) == " that it rained."
    row = {"context": "  One, two, ", "continuation": "three"}
    (only,) = asked(tmp_path, "language_modeling", [row], delimiter="\nAnswer: ")
    assert text(only.context) == "<|endoftext|>One, two,\nAnswer:"
    assert text(only.completion) == " three"


def test_what_is_shown_before_a_question(tmp_path):
    rows = [{"query": f"q{n}", "choices": ["a", "b"], "gold": n % 2} for n in range(9)]
    (first, _) = asked(tmp_path, "multiple_choice", rows, number=4, shots=2, delimiter=": ")
    drawn = random.Random(1234 + 4).sample([0, 1, 2, 3, 5, 6, 7, 8], 2)
    shown = "".join(f"q{n}: {'ab'[n % 2]}\n\n" for n in drawn)
    assert text([*first.context, *first.completion]) == f"<|endoftext|>{shown}q4: a"


def test_a_long_text_loses_its_beginning(tmp_path):
    short = Subject(tokenizers.Bytes(), Model(layers=1, heads=1, width=8, context=20, vocabulary_size=256))
    row = {"query": "x" * 50, "choices": ["yes", "no"], "gold": 0}
    yes, no = asked(tmp_path, "multiple_choice", [row], subject=short)
    assert bytes([*yes.context, *yes.completion]) == b"x" * 16 + b" yes"
    assert bytes(no.completion) == b"no"
    with pytest.raises(
        UserError, match=r"task core/t: 30 tokens of one text are to be scored, and the model's context"
    ):
        asked(tmp_path, "multiple_choice", [row | {"choices": ["a" * 30, "b"]}], subject=short)


def test_a_choice_that_another_begins_with_has_no_loss(tmp_path):
    """It counts only where it is the first, as in a comparison with NaN."""
    write_core(tmp_path)
    rows = [{"query": "q", "choices": choices, "gold": 0} for choices in (["a", "a b"], ["a b", "a"])]
    write_lines(tmp_path / COPA, rows)

    def scorer(params, requests):
        assert all(len(request.completion) for request in requests)
        return [Score(-1.0, False) for _ in requests]

    found = core.load(str(tmp_path), BYTES, Options())
    copa = found.tasks[1]
    ((result,), _) = numbers(core.Core([copa], BYTES), Engine(scorer, None, unreachable))  # type: ignore[arg-type]
    assert result.accuracy == 1


def test_limit_takes_the_first_of_the_shuffled_ones(folder):
    every, few = (core.load(str(folder), BYTES, Options(limit=limit)).tasks for limit in (0, 7))
    assert [task.items[:7] for task in every] == [task.items for task in few]


COPA = "eval_data/commonsense_reasoning/copa.jsonl"


@pytest.mark.parametrize(
    ("name", "before", "after", "message"),
    [
        ("core.yaml", None, None, r"core.yaml: can't be read \(No such file"),
        ("core.yaml", "icl_tasks:", "tasks:", "core.yaml: it has no list of tasks, icl_tasks"),
        ("core.yaml", "[3]", "&a [*a]", "core.yaml: not YAML .*alias"),
        ("core.yaml", "[3]", "[3", "core.yaml: not YAML"),
        ("core.yaml", "[3]", "[" * 2000, "core.yaml: not YAML .*within one another"),
        ("core.yaml", "[3]", "[many]", "arc_easy: num_fewshot is 'many', and must be"),
        ("core.yaml", "[3]", "[50]", r"arc_easy.jsonl: 50 examples, and 50 others are to be shown"),
        (
            "core.yaml",
            "schema",
            "scheme",
            "winograd: icl_task_type is 'scheme', and there are: multiple_choice, schema",
        ),
        ("core.yaml", "copa.jsonl", "../../../../x.jsonl", "leads out of|can't be read"),
        ("core.yaml", "copa.jsonl", "cope.jsonl", r"commonsense_reasoning/cope.jsonl: can't be read \(No such file"),
        ("core.yaml", "label: copa", "label: cope", "eval_meta_data.csv: it has no Random baseline of cope"),
        ("eval_meta_data.csv", ",50,50,TRUE", ",50,half,TRUE", "line 3: Eval Task 'copa', Random baseline 'half'"),
        ("eval_meta_data.csv", ",50,50,TRUE", ",50,100,TRUE", "line 3: .* per cent below 100 are expected"),
        (COPA, None, "", "there are no examples in it"),
        (COPA, None, "{}\n", "copa.jsonl: line 1: query is missing. Is it a file of"),
        (COPA, "}\n", "\n", r"copa.jsonl: line 1 is not JSON"),
        (COPA, '"gold": 0', '"gold": 7', "line .*: the right one, gold, is number 7"),
        (COPA, '"query": "', '"query": true, "x": "', "query is True, and must be"),
    ],
)
def test_a_damaged_folder(folder, tmp_path, name, before, after, message):
    write_core(tmp_path)
    path = tmp_path / name
    if after is None:
        path.unlink()
    else:
        path.write_text(after if before is None else path.read_text().replace(before, after))
    with pytest.raises(UserError, match=message):
        core.load(str(tmp_path), BYTES, Options())


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match=r"task core: .*none is no folder. Name one with core.yaml in it: core=FOLDER"):
        core.load(str(tmp_path / "none"), BYTES, Options())
