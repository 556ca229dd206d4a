"""Accuracies by their definitions, and scores beside an independent loop over transformers' logits."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxgpt.data import tokenizers
from jaxgpt.errors import UserError
from jaxgpt.evaluation import multiple_choice, task_files
from jaxgpt.evaluation.multiple_choice import Example, Examples
from jaxgpt.evaluation.scoring import Score, ScoringRequest, make_scorer
from jaxgpt.models import gpt2
from jaxgpt.options.config import Compute, Config, Model

PARITY = "compares with PyTorch and transformers, which the parity extra installs: pip install -e .[parity]"
MODEL = Model(layers=2, heads=2, width=16, context=128, vocabulary_size=50257)
ROWS = [  # written for this test
    {
        "activity_label": "Baking",
        "ctx": "She opens the oven and takes out a tray. she",
        "endings": ["puts the tray on the table.", "sails away.", "is a tray.", "[substeps] Drinks the oven  slowly."],
        "label": 0,
    },
    {
        "activity_label": "Naïve café",
        "ctx": "[header] How to order coffee [title] Enter the café. [step] Greet the 服务员",
        "endings": ["politely.", "with a très long sentence that goes on and on.", "🙂", "and sit."],
        "label": 2,
    },
    {
        "activity_label": "Cutting hair",
        "ctx": "A man combs his hair. he",
        "endings": ["cuts it.", "cuts it.", "eats it with a spoon.", "flies."],
        "label": 1,
    },
]


def example(lengths: list[tuple[int, int]], label: int) -> Example:
    """Returns an example whose choices have so many tokens and characters."""
    return Example(
        tuple(ScoringRequest([1], [0] * tokens) for tokens, _ in lengths), tuple(count for _, count in lengths), label
    )


def scores(*values: float) -> list[Score]:
    return [Score(value, greedy=value > -1) for value in values]


def test_accuracies_by_their_definitions():
    """Sums -4 and -5: the first. By characters -4/2 and -5/5: the second. By tokens -4/4 and -5/2: the first."""
    examples = Examples("t", False, [example([(4, 2), (2, 5)], label) for label in (0, 1, 1, 0)])
    result = multiple_choice.result(examples, [scores(-4, -5), scores(-4, -5), scores(-6, -2), scores(-3, -3)])
    assert (result.accuracy, result.accuracy_norm, result.accuracy_per_token) == (0.75, 0.5, 0.75)
    assert result.standard_error == pytest.approx(np.std([1, 0, 1, 1], ddof=1) / np.sqrt(4))
    assert result.standard_error_norm == pytest.approx(np.std([1, 1, 0, 0], ddof=1) / np.sqrt(4))
    assert result.standard_error_per_token == result.standard_error
    assert result.perplexity is None
    assert result.examples == 4


def test_greedy_completions():
    examples = Examples("lambada", True, [example([(1, 1)], 0)] * 2)
    result = multiple_choice.result(examples, [scores(-0.5), scores(-2)])
    assert (result.accuracy, result.accuracy_norm) == (0.5, None)
    assert result.perplexity == pytest.approx(np.exp(1.25))


def test_where_a_text_is_cut_in_tokens():
    """Tokens of the whole, cut where the context's end: a space belongs to what follows it."""
    tokenizer = tokenizers.GPT2()
    whole = tokenizer.encode("Hello there world").tolist()
    for context, completion in (("Hello there", " world"), ("Hello there ", "world")):
        assert multiple_choice.split(context, completion, tokenizer) == ScoringRequest(whole[:2], whole[2:])
    assert multiple_choice.split("", " world", tokenizer) == ScoringRequest([50256], whole[2:])
    assert multiple_choice.split("", "ab", tokenizers.Bytes()) == ScoringRequest([10], [97, 98])


def random_params(model: Model) -> gpt2.Params:
    """Random, and large enough that the model holds some texts for much likelier than others."""
    return jax.tree.map(lambda array: 3 * array, gpt2.init(model, jax.random.key(1)))


def written(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def by_transformers(params: gpt2.Params, rows: list[dict]) -> list[list[tuple[float, int, int]]]:
    """Returns each choice's summed log-likelihood, tokens and characters, computed one sequence at a time."""
    import torch

    from tests.parity import transformers_model

    arrays = {name: np.asarray(array) for name, array in transformers_model.flatten(params).items()}
    theirs = transformers_model.make_model(MODEL, arrays)
    encode = tokenizers.GPT2().encode
    found = []
    for row in rows:
        of_row = []
        for ending in row["endings"]:
            text = f"{row['activity_label']}: {row['ctx']}".replace(" [title]", ". ")
            tail = ending.strip().replace(" [title]", ". ")
            for bracketed in ("[header]", "[step]", "[substeps]"):
                text, tail = text.replace(bracketed, ""), tail.replace(bracketed, "")
            text, tail = text.replace("  ", " "), tail.replace("  ", " ")
            start, ids = len(encode(text)), encode(f"{text} {tail}").tolist()
            ids, count = ids[-(MODEL.context + 1) :], len(ids) - start
            with torch.no_grad():
                logits = theirs(input_ids=torch.tensor([ids[:-1]])).logits[0, -count:].double()
            log_p = torch.log_softmax(logits, -1)[torch.arange(count), torch.tensor(ids[-count:])]
            of_row.append((float(log_p.sum()), count, len(tail)))
        found.append(of_row)
    return found


def compare(params: gpt2.Params, path: str, rows: list[dict]) -> None:
    """Example by example: scores within float32's rounding, and the same choices."""
    config = Config(model=MODEL, compute=Compute(layers="scanned"))
    examples = multiple_choice.load("hellaswag", path, tokenizers.GPT2(), MODEL)
    found = iter(make_scorer(config, 16)(params, [r for one in examples.examples for r in one.requests]))
    ours = [[next(found) for _ in one.requests] for one in examples.examples]
    right = np.zeros((len(rows), 3), bool)
    for number, (mine, theirs, row) in enumerate(zip(ours, by_transformers(params, rows), rows, strict=True)):
        sums = [total for total, _, _ in theirs]
        assert [score.log_likelihood for score in mine] == pytest.approx(sums, rel=2e-5), row
        picks = np.argmax([[s, s / tokens, s / letters] for s, tokens, letters in theirs], axis=0)
        right[number] = picks == row["label"]
    result = multiple_choice.result(examples, ours)
    assert (result.accuracy, result.accuracy_per_token, result.accuracy_norm) == tuple(right.mean(axis=0))


def test_scores_are_those_of_a_loop_over_transformers(tmp_path):
    pytest.importorskip("torch", reason=PARITY)
    pytest.importorskip("transformers", reason=PARITY)
    compare(random_params(MODEL), written(tmp_path / "a.jsonl", ROWS), ROWS)


# From files


def test_llmcs_file_gives_the_scores_of_the_text_it_was_made_of(tmp_path):
    """The context is tokenized alone, and so are the endings, as llm.c does."""
    tokenizer, config = tokenizers.GPT2(), Config(model=MODEL, compute=Compute(layers="scanned"))
    examples = multiple_choice.load("hellaswag_llmc", written(tmp_path / "a.jsonl", ROWS), tokenizer, MODEL)
    multiple_choice.write(tmp_path / "a.bin", examples)
    read = task_files.read_llmc(tmp_path / "a.bin")
    assert [one.context.tolist() for one in read] == [tokenizer.encode(row["ctx"]).tolist() for row in ROWS]
    scorer, params = make_scorer(config, 16), random_params(MODEL)
    ours = multiple_choice.evaluate(examples, scorer, params)
    again = multiple_choice.evaluate(
        multiple_choice.load("mine", str(tmp_path / "a.bin"), tokenizer, MODEL), scorer, params
    )
    by_tokens = {"accuracy_norm": ours.accuracy_per_token, "standard_error_norm": ours.standard_error_per_token}
    assert again == ours._replace(task="mine", **by_tokens)


def test_what_a_model_cannot_score(tmp_path):
    path = written(tmp_path / "a.jsonl", ROWS)
    short = Model(layers=1, heads=1, width=8, context=5, vocabulary_size=50257)
    with pytest.raises(UserError, match="example 1 has a choice of 7 tokens, and the model's context is 5"):
        multiple_choice.load("hellaswag", path, tokenizers.GPT2(), short)
    few = Model(layers=1, heads=1, width=8, context=50, vocabulary_size=100)
    with pytest.raises(UserError, match="outside the vocabulary of 100 tokens"):
        multiple_choice.load("hellaswag", path, tokenizers.GPT2(), few)
    with pytest.raises(UserError, match="is unknown to this tokenizer"):
        multiple_choice.load("hellaswag", path, tokenizers.Characters("ab"), MODEL)
    (tmp_path / "a.bin").write_bytes(b"")
    with pytest.raises(UserError, match="its tokens are GPT-2's, and the model's tokenizer is bytes"):
        multiple_choice.load("hellaswag", str(tmp_path / "a.bin"), tokenizers.Bytes(), MODEL)
