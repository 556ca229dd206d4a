"""Policies from the command line: each way of reinforcement learns what is rewarded, and resumes to the same bits."""

import itertools
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxgpt.commands import cli
from jaxgpt.evaluation import reward_model
from jaxgpt.interop import bases, loading
from jaxgpt.runs import checkpoints
from tests import small_run
from tests.nightly import nightly

BASE = {"model.width": 32, "model.context": 80, "data.tokenizer": "bytes", "training.steps": 30,
        "training.evaluate-every": 0, "sampling.tokens": 4}  # fmt: skip
TUNED = {
    "data.text": "problems.jsonl",
    "objective.name": "policy",
    "objective.reward": "reward.py:letters",
    "training.batch-size": 16,
    "training.micro-batches": 2,
    "training.steps": 24,
    "training.evaluate-every": 0,
    "training.init-from": "runs/base",
    "optimizer.learning-rate": 0.01,
    "optimizer.weight-decay": 0.0,
    "rollouts.answers": 4,
    "rollouts.tokens": 6,
}
REWARD = '''
def letters(text):
    """The share of the letter e."""
    return text.count("e") / max(1, len(text))


def fails(text, answer):
    return {"yes": 1}[answer + text]


def words(text):
    return text
'''


def tune(name: str, *more: str, **changes) -> small_run.Finished:
    """Trains in runs/NAME; `rollouts_answers=4` changes an option."""
    options = [word for word in small_run.words_of(TUNED, **changes) if word != "on"]
    return small_run.run(["--config", "empty.toml", *options, *more], name)


@pytest.fixture(scope="module", autouse=True)
def work(tmp_path_factory):
    with small_run.in_folder(tmp_path_factory.mktemp("work")) as folder:
        (folder / "empty.toml").write_text("")
        (folder / "reward.py").write_text(REWARD)
        rows = [{"prompt": word, "answer": "e"} for word in small_run.WORDS * 2]
        (folder / "problems.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        assert small_run.run(small_run.words(BASE), "base").status == 0
        yield folder


# GRPO, PPO with several steps of a rollout and a coefficient that adapts, and REINFORCE
PPO = {
    "objective_advantages": "values",
    "objective_value_coefficient": 0.5,
    "objective_whiten": "on",
    "objective_kl_penalty": 0.02,
    "objective_kl_target": 3.0,
    "rollouts_minibatches": 2,
    "rollouts_epochs": 2,
    "rollouts_answers": 1,
    "training_batch_size": 8,
    "training_steps": 64,
}
SHORT = {"rollouts_tokens": 4, "data_validation_fraction": 0.1}  # whose texts can be read back
REINFORCE = {"objective_surrogate": "reinforce", "objective_advantages": "reward", "objective_whiten": "on"}
WAYS = {"grpo": {}, "ppo": PPO, "reinforce": REINFORCE}


@pytest.fixture(scope="module", params=nightly(WAYS, every_time=["grpo"]))
def learned(request):
    """The run of each way, saved in its middle too."""
    steps = WAYS[request.param].get("training_steps", TUNED["training.steps"])
    finished = small_run.saved_at(steps // 2, tune, request.param, **WAYS[request.param])
    return request.param, finished


def test_it_learns_what_is_rewarded(learned):
    """Few letters are an e at first, and most in the end, as drawn and in the likeliest answers to other prompts."""
    _, finished = learned
    rewards = [line["reward"] for line in finished.steps if "reward" in line]
    assert rewards[0] < 0.2
    assert np.mean(rewards[-4:]) > 0.7
    held_out = [line["val_reward"] for line in finished.metrics if "val_reward" in line]
    assert held_out[0] < 0.5 < 0.8 < held_out[-1]
    assert "18 problems to learn from, 2 to validate on" in finished.printed
    assert "Right answers, %" in (finished.folder / "report.html").read_text()
    samples = (finished.folder / "samples.txt").read_text()
    assert "→ eeeeee\n(reward 1)" in samples


def test_the_first_ratio_of_a_rollout_is_1(learned):
    """The engine's log-probabilities are those of the step, computed with the same weights."""
    _, finished = learned
    firsts = [line for line in finished.steps if "reward" in line]
    assert [line["ratio"] for line in firsts] == pytest.approx([1] * len(firsts), abs=1e-5)
    assert all(line["clip_fraction"] == 0 for line in firsts)


def test_a_step_waits_for_its_batches_no_longer_than_it_takes(learned):
    """A rollout is drawn while the step before it is recorded."""
    _, finished = learned
    assert all(line["data_wait_seconds"] <= line["step_seconds"] for line in finished.steps)
    drawing = sum(line["rollout_seconds"] for line in finished.steps if "rollout_seconds" in line)
    assert sum(line["data_wait_seconds"] for line in finished.steps) >= drawing


def test_it_resumes_to_the_same_bits(learned):
    way, finished = learned
    shutil.copytree(finished.folder, f"runs/{way}-again")
    shutil.rmtree(f"runs/{way}-again/checkpoints/{finished.steps[-1]['step']}")
    again = tune(f"{way}-again", "--resume", **WAYS[way])
    assert again.status == 0, again.errors
    assert "resuming after step" in again.printed
    assert all((one == other).all() for one, other in zip(params(way), params(f"{way}-again"), strict=True))
    for name in ("loss", "reward", "kl_penalty"):
        assert [line.get(name) for line in again.steps] == [line.get(name) for line in finished.steps]
    assert (again.folder / "samples.txt").read_text() == (finished.folder / "samples.txt").read_text()


def params(run: str):
    found = checkpoints.find(Path("runs", run, "checkpoints"))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(checkpoints.params_of(found))]


def test_the_coefficient_follows_the_divergence(learned):
    """It changes by a tenth of the relative error, which is clipped to a fifth."""
    way, finished = learned
    if way != "ppo":
        assert all("kl_penalty" not in line for line in finished.steps)
        return
    lines = [line for line in finished.steps if "kl_penalty" in line]
    assert lines[0]["kl_penalty"] == 0.02
    for before, after in itertools.pairwise(lines):
        error = np.clip(before["kl_of_answer"] / 3 - 1, -0.2, 0.2)
        assert after["kl_penalty"] == pytest.approx(before["kl_penalty"] * (1 + 0.1 * error))
    assert lines[0]["kl_of_answer"] == pytest.approx(0, abs=1e-5)
    assert lines[-1]["kl_of_answer"] > 1


def test_other_weights_are_no_reference(learned, monkeypatch):
    """A resumed run reads the reference's weights again; if they are missing or changed, it is refused."""
    way, finished = learned
    if way != "ppo":
        return
    shutil.copytree(finished.folder, "runs/other")
    shutil.move("runs/base", "runs/kept")
    try:
        assert small_run.run(small_run.words(BASE | {"training.steps": 2}), "base").status == 0
        refused = tune("other", "--resume", **PPO | {"training_steps": 68})
        assert refused.status == 2
        assert "these weights are other ones than those that the run began with" in refused.errors
        shutil.rmtree("runs/base")
        refused = tune("other", "--resume", **PPO | {"training_steps": 68})
        assert refused.status == 2
        assert "the weights that this policy is kept near can't be read" in refused.errors
    finally:
        shutil.rmtree("runs/base", ignore_errors=True)
        shutil.move("runs/kept", "runs/base")


@pytest.mark.slow
def test_on_several_devices_it_is_the_same_up_to_rounding(monkeypatch):
    from jaxgpt.parallel import mesh

    one = tune("one", training_steps=2)
    monkeypatch.setattr(mesh, "available", lambda: 2)
    two = tune("two", parallel_devices=2, parallel_zero=1, training_steps=2)
    assert two.status == 0, two.errors
    assert two.steps[0]["reward"] == one.steps[0]["reward"]  # the same tokens are drawn
    for name in ("loss", "grad_norm", "entropy"):
        assert two.steps[0][name] == pytest.approx(one.steps[0][name], rel=1e-4, abs=1e-6)


def test_what_was_learned_is_a_model_like_any_other(learned):
    """It is saved without the value head, and with the template that it was asked in."""
    way, _ = learned
    trained = loading.load(f"runs/{way}")
    assert trained.about["template"] == {"name": "chatml"}
    assert [leaf.shape for leaf in jax.tree.leaves(trained.params)] == [
        leaf.shape for leaf in jax.tree.leaves(loading.load("runs/base").params)
    ]


def test_a_reward_model_rewards(learned):
    """The rewards are the scores that the reward model gives these conversations by itself."""
    way, _ = learned
    if way != "ppo":
        return
    rows = [{"prompt": word, "chosen": "eee", "rejected": "o o"} for word in small_run.WORDS]
    Path("comparisons.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    words = ["--config", "reward_quickstart", "--init-from", "runs/base", "--data.text", "comparisons.jsonl"]
    trained = small_run.run([*words, "--training.steps", "20", "--training.batch-size", "4"], "scores")
    assert trained.status == 0, trained.errors
    finished = tune("rewarded", objective_reward="model:runs/scores", training_steps=4, **SHORT)
    assert finished.status == 0, finished.errors
    shown = re.findall(r"^(.*)\n→ (.*)\n\(reward (\S+)\)", (finished.folder / "samples.txt").read_text(), re.MULTILINE)
    assert len(shown) == 4
    for question, text, score in shown:
        asked = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
        assert float(score) == pytest.approx(reward_model.load("runs/scores").score_conversations([asked])[0], rel=1e-4)


@pytest.mark.slow
def test_adapters_draw_and_train_the_same_policy():
    """Answers are drawn with the adapters merged in; the reference is the base, which is in memory already."""
    finished = tune("adapters", lora_rank=4, optimizer_learning_rate=0.05, objective_kl_coefficient=0.01)
    assert finished.status == 0, finished.errors
    assert [line["ratio"] for line in finished.steps] == pytest.approx([1] * TUNED["training.steps"], abs=1e-5)
    assert finished.steps[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert finished.steps[-1]["kl"] > 0.01


@pytest.mark.slow
def test_adapters_have_a_value_head_beside_them(capsys):
    """PPO by adapters is near its base at first, learns values, resumes to the same bits, and draws as any model."""
    options = PPO | {"lora_rank": 4, "optimizer_learning_rate": 0.05, "training_steps": 48}
    finished = small_run.saved_at(24, tune, "values", **options)
    firsts = [line for line in finished.steps if "reward" in line]
    assert [line["ratio"] for line in firsts] == pytest.approx([1] * len(firsts), abs=1e-5)
    assert firsts[0]["kl_of_answer"] == pytest.approx(0, abs=1e-5)
    assert firsts[-1]["kl_of_answer"] > 0.1
    assert finished.steps[-1]["value_loss"] < finished.steps[0]["value_loss"] / 2
    shutil.copytree(finished.folder, "runs/values-again")
    shutil.rmtree("runs/values-again/checkpoints/48")
    again = tune("values-again", "--resume", **options)
    assert again.status == 0, again.errors
    assert all((one == other).all() for one, other in zip(params("values"), params("values-again"), strict=True))
    capsys.readouterr()
    assert cli.main(["generate", "runs/values", "--prompt", "the", "--tokens", "2"]) == 0


@pytest.mark.slow
def test_the_reference_of_adapters_that_are_trained_on_is_what_they_were():
    """New adapters have the base as theirs."""
    given = {"objective_kl_coefficient": 0.01, "optimizer_learning_rate": 0.05, "training_steps": 4}
    assert tune("first", lora_rank=2, **given).status == 0
    on = tune("second", "--lora.adapters", "runs/first", **given | {"training_steps": 2})
    assert on.status == 0, on.errors
    assert on.steps[0]["kl"] == pytest.approx(0, abs=1e-6)
    kept = checkpoints.find(Path("runs/second/checkpoints")).about["kept"]["reference"]
    first = checkpoints.params_of(checkpoints.find(Path("runs/first/checkpoints")))
    assert kept == bases.fingerprint(first)
    resumed = tune("second", "--resume", "--lora.adapters", "runs/first", **given | {"training_steps": 4})
    assert resumed.status == 0, resumed.errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective_reward": ""}, "--objective.reward is missing: name what is to be rewarded: exact, "),
        ({"objective_reward": "nothing"}, "--objective.reward is 'nothing': name what"),
        ({"objective_reward": "regex:("}, "'(' is no regular expression"),
        ({"objective_reward": "reward.py:no"}, "the file has no function of this name"),
        ({"objective_reward": "no.py:f"}, "there is no such file"),
        ({"objective_reward": "model:runs/no"}, "--objective.reward model:runs/no: not a run's folder"),
        ({"objective_reward": "model:runs/base"}, "--objective.reward model:runs/base: no reward model, but one that"),
        ({"rollouts_answers": 5}, "a rollout has 32 answers"),
        ({"rollouts_answers": 1}, "needs at least 2 answers"),
        ({"rollouts_minibatches": 7}, "--training.steps is 24, and must be a multiple of the steps of a rollout, 7"),
        ({"objective_advantages": "values"}, "go together"),
        ({"objective_kl_target": 1.0}, "--objective.kl-penalty, which is 0"),
        ({"data_text": "bad.jsonl"}, "bad.jsonl, line 2: answer is None, and no text. Mend it"),
        ({"data_text": "text.txt"}, "text.txt, line 1: "),
        ({"rollouts_tokens": 60}, "no problem to learn from: all 20 have prompts of more than the 20 tokens"),
        ({"training_init_from": ""}, "goes on from a model that was fine-tuned on conversations"),
    ],
)
def test_what_is_refused(changes, message):
    Path("bad.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "a"}\n')
    refused = tune("refused", **changes)
    assert refused.status == 2
    assert message in refused.errors
    assert not Path("runs/refused").exists()


@pytest.mark.parametrize(("function", "message"), [("fails", "KeyError: 'e"), ("words", "and no finite number ")])
def test_a_function_that_fails_ends_the_run_with_its_error(function, message):
    failed = tune(function, objective_reward=f"reward.py:{function}")
    assert failed.status == 1
    assert f"--objective.reward reward.py:{function}: " in failed.errors
    assert message in failed.errors
    assert "Traceback" not in failed.errors
