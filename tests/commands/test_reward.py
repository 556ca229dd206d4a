"""A reward model from the command line: it learns, resumes, is sharded, scores, and says that it draws no text."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.commands import cli
from jaxgpt.data import chat_templates
from jaxgpt.errors import UserError
from jaxgpt.evaluation import reward_model
from jaxgpt.evaluation.scoring import padded_length
from jaxgpt.models import family, lora, with_scalar
from jaxgpt.models.blocks import Context, inputs_of
from jaxgpt.reports import page
from jaxgpt.reports.history import History
from jaxgpt.runs import checkpoints
from jaxgpt.runs.about import lora_of, model_of
from tests import comparison_runs, small_run
from tests.comparison_runs import BAD, GOOD, params

STEPS, SAVED = 40, 20
OPTIONS = {
    "config": "reward_quickstart",
    "training.steps": STEPS,
    "training.evaluate-every": 20,
    "training.micro-batches": 2,
    "optimizer.learning-rate": 0.02,
    "optimizer.warmup-steps": 5,
    "parallel.devices": 1,
}


def train(name, *more, **changes):
    return comparison_runs.train(OPTIONS, name, *more, **changes)


@pytest.fixture(scope="module", autouse=True)
def work(tmp_path_factory):
    with comparison_runs.in_folder(tmp_path_factory.mktemp("work")) as folder:
        yield folder


@pytest.fixture(scope="module")
def trained(work):
    return small_run.saved_at(SAVED, train, "reward")


def held_out():
    """The texts that the run holds out, in tokens: every tenth line's."""
    lines = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()][9::10]
    template, tokenizer = chat_templates.built_in("chatml"), reward_model.load("runs/reward").tokenizer

    def text(prompt, answer):
        said = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        return chat_templates.encode(said, template, tokenizer).ids

    return [[text(line["prompt"], answer) for answer in (line["chosen"], line["rejected"])] for line in lines]


def scores_by_hand(texts):
    """The scores as they are trained: the features of the last token, each text by itself, times the head."""
    found = checkpoints.find(Path("runs/reward/checkpoints"))
    whole, model = checkpoints.scored_params_of(found), reward_model.load("runs/reward").model
    scores = []
    for text in texts:
        x, _, _ = family(model).features(
            with_scalar.model_of(whole),
            inputs_of(jnp.asarray(text)[None], model),
            Context(model, reward_model.load("runs/reward").compute),
        )
        scores.append(float(np.asarray(x[-1]) @ np.asarray(whole.scalar.weight) + whole.scalar.bias))
    return np.array(scores)


def test_it_learns_which_answer_is_better(trained):
    first, last = (line for line in trained.metrics if line["step"] in (0, STEPS) and "val_loss" in line)
    assert first["val_loss"] > 0.5
    assert last["val_loss"] < 0.1
    assert last["val_accuracy"] == 1
    assert last["val_score_margin"] > 1
    assert all({"accuracy", "score_margin"} <= line.keys() for line in trained.steps)
    assert "36 comparisons to train on, 4 to validate on" in trained.printed
    assert "only the best 2 texts are taken" in trained.printed
    assert f"step {STEPS}: validation loss {last['val_loss']:.4f}, 100.0% of pairs in order" in trained.printed
    assert "--reward-model" in trained.printed.splitlines()[-2]


def test_the_validation_loss_is_bradleys_and_terrys(trained):
    pairs = held_out()
    better, worse = scores_by_hand([text for pair in pairs for text in pair]).reshape(-1, 2).T
    expected = np.mean(np.log1p(np.exp(worse - better)) + 0.01 * (better + worse) ** 2)
    assert trained.validation[STEPS] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_scores_are_standardised_over_what_was_held_out(trained):
    texts = [text for pair in held_out() for text in pair]
    scores = reward_model.load("runs/reward").score(texts)
    assert scores.mean() == pytest.approx(0, abs=1e-4)
    assert scores.std() == pytest.approx(1, abs=1e-4)
    raw = scores_by_hand(texts)
    np.testing.assert_allclose(scores, (raw - raw.mean()) / raw.std(), rtol=1e-3, atol=1e-4)


def test_a_score_depends_on_no_other_text(trained):
    model = reward_model.load("runs/reward")
    texts = [np.arange(1, n, dtype=np.int32) for n in (2, 30, 40, 90)]
    assert len({padded_length(len(text), model.model.context) for text in texts}) > 1
    together = model.score(texts)
    assert [model.score([text])[0] for text in texts] == together.tolist()


def test_an_answer_that_does_not_fit_is_never_the_best(trained):
    model = reward_model.load("runs/reward")
    answers = [
        [{"role": "user", "content": "the"}, {"role": "assistant", "content": text}] for text in (GOOD * 50, BAD)
    ]
    long, short = model.score_conversations(answers)
    assert long == -np.inf
    assert np.isfinite(short)
    with pytest.raises(UserError, match="a text of 97 tokens can't be scored"):
        model.score([np.ones(97, np.int32)])


def test_a_resumed_run_has_the_same_bits(trained):
    shutil.copytree(trained.folder, "runs/again")
    shutil.rmtree(f"runs/again/checkpoints/{STEPS}")
    assert train("again", "--resume").status == 0
    for one, other in zip(params("reward"), params("again"), strict=True):
        np.testing.assert_array_equal(one, other)
    about = [checkpoints.find(Path("runs", name, "checkpoints")).about["kept"] for name in ("reward", "again")]
    assert about[0] == about[1]


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_two_devices_do_what_one_does(trained, zero):
    finished = train(f"zero{zero}", parallel_devices=2, parallel_zero=zero)
    assert finished.status == 0, finished.errors
    for line, other in zip(trained.steps[:5], finished.steps[:5], strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4, abs=1e-6)
    assert finished.validation[0] == pytest.approx(trained.validation[0], rel=1e-6)


def test_the_best_of_several_is_the_one_with_the_highest_score(trained, capsys):
    words = ["generate", "--run", "runs/sft", "--prompt", "the", "--tokens", "8", "--temperature", "1.2"]
    assert cli.main([*words, "--samples", "6"]) == 0
    capsys.readouterr()
    assert cli.main([*words, "--best-of", "6", "--reward-model", "runs/reward"]) == 0
    prompt, _, best = capsys.readouterr().out.partition("\n")
    assert prompt == "the"
    model = reward_model.load("runs/reward")
    answers = [[{"role": "user", "content": "the"}, {"role": "assistant", "content": text}] for text in (GOOD, BAD)]
    assert np.diff(model.score_conversations(answers))[0] < 0
    assert best.strip("\n")


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "--run", "runs/reward"],
        ["convert", "runs/reward", "elsewhere"],
        ["--init-from", "runs/reward", "--config", "reward_quickstart", "--data.text", "pairs.jsonl"],
        ["serve", "--run", "runs/reward"],
    ],
)
def test_what_draws_text_says_that_it_is_a_reward_model(trained, capsys, words):
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 or "reading" in error
    assert "a reward model, which scores texts and draws none" in error
    assert "--best-of 8 --reward-model" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--reward-model", "runs/sft"], "--best-of"),
        (["--best-of", "2", "--reward-model", "runs/sft"], "--reward-model runs/sft: no reward model"),
        (["--best-of", "2", "--reward-model", "runs/nothing"], "--reward-model runs/nothing: not a run's folder"),
    ],
)
def test_a_reward_model_that_is_none(trained, capsys, words, message):
    assert cli.main(["generate", "--run", "runs/sft", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_report_names_its_curves(trained):
    shown = page.of_run(trained.folder, History(trained.folder / "metrics.jsonl").read_all())
    assert shown["loss_unit"] == "nats per comparison"
    each, smoothed, validation = shown["further"]["Pairs in the right order, %"]
    assert len(each[0]) == STEPS
    assert smoothed[0][-1] == STEPS
    assert validation == [[0, 20, 40], validation[1]]
    assert validation[1][-1] == 100
    assert "Score of the better text over the worse" in shown["further"]


def test_adapters_have_a_scalar_head_beside_them(trained):
    """A reward model of adapters scores, merged with its base, as it did when it was validated."""
    adapters = {"lora_rank": 3, "lora_base": "float32", "objective_centre": 0}
    finished = train("adapters", training_steps=10, training_evaluate_every=0, **adapters)
    assert finished.status == 0, finished.errors
    found = checkpoints.find(Path("runs/adapters/checkpoints"))
    saved = checkpoints.scored_params_of(found)
    trained_numbers = lora.parameter_count(model_of(found.about), lora_of(found.about)) + 33
    assert sum(leaf.size for leaf in jax.tree.leaves(saved)) == trained_numbers
    assert any(np.asarray(adapter.b).any() for adapter in saved.blocks.values())
    scores = reward_model.load("runs/adapters").score([text for pair in held_out() for text in pair])
    better, worse = (found.about["kept"]["score_deviation"] * scores).reshape(-1, 2).T
    assert finished.validation[10] == pytest.approx(np.mean(np.log1p(np.exp(worse - better))), rel=1e-4)
    assert finished.validation[10] < finished.validation[0]


BAD_ROWS = [
    ({"data_text": "embedded"}, "--data.text is embedded, and --objective.name reward is trained on comparisons"),
    ({"training_init_from": ""}, "goes on from a model that was fine-tuned on conversations"),
    ({"data_mixture": "a=1"}, "--data.mixture is of plain text"),
    ({"evaluation_tasks": "a=b"}, "--evaluation.tasks is a=b, and must be empty for a reward model"),
    ({"data_text": "chat.jsonl"}, "chat.jsonl, line 1: a comparison without a field 'chosen'"),
    ({"data_text": "nothing.jsonl"}, "there is no file, folder or data set"),
    ({"training_sequence_length": 20}, "all 40 have a text of more than 20 tokens"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_ROWS)
def test_mistakes(trained, changes, message):
    finished = train("mistaken", **changes)
    assert finished.status == 2
    assert message in finished.errors
    assert finished.errors.count("\n") == 1
    assert not finished.folder.exists()


def test_bad_and_long_lines_are_left_out_and_said(trained):
    lines = Path("pairs.jsonl").read_text().splitlines()
    lines[3] = "{"
    lines[8] = json.dumps({"prompt": "the", "chosen": "yes", "rejected": "no " * 40})
    Path("some.jsonl").write_text("\n".join(lines))
    refused = train("some", data_text="some.jsonl", training_steps=1)
    assert refused.status == 2
    assert "some.jsonl, line 4:" in refused.errors
    assert "--data.skip-bad N" in refused.errors
    finished = train("some", data_text="some.jsonl", training_steps=1, data_skip_bad=1)
    assert finished.status == 0, finished.errors
    assert "note      1 line is left out, with a text of more than 96 tokens" in finished.printed
    assert "the first: some.jsonl, line 9" in finished.printed
    assert "note      1 line is left out as bad; the first: some.jsonl, line 4" in finished.printed
    assert "35 comparisons to train on, 3 to validate on" in finished.printed


@pytest.mark.slow
def test_other_comparisons_are_refused_on_resume(trained):
    shutil.copytree(trained.folder, "runs/other")
    text = Path("pairs.jsonl").read_text()
    try:
        Path("pairs.jsonl").write_text(text.replace("no way", "no wax", 1))
        finished = train("other", "--resume")
    finally:
        Path("pairs.jsonl").write_text(text)
    assert finished.status == 2
    assert "not the text that" in finished.errors
    assert "the file pairs.jsonl" in finished.errors
