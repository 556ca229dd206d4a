"""Real processes that train a policy together: each draws and rewards its share of the answers."""

import json
from pathlib import Path

import pytest

from tests.parallel.several import Several, metrics

pytestmark = pytest.mark.slow

BASE = {"model__width": 16, "model__context": 64, "training__steps": 8}
REWARD = "def letters(text):\n    return text.count('e') / max(1, len(text))\n"
TUNED = {
    "model__width": 16,
    "model__context": 64,
    "data__text": "problems.jsonl",
    "objective__name": "policy",
    "objective__reward": "reward.py:letters",
    "objective__kl_coefficient": 0.01,
    "training__init_from": "runs/base",
    "training__steps": 6,
    "training__evaluate_every": 2,
    "rollouts__tokens": 5,
    "rollouts__answers": 4,
    "rollouts__minibatches": 2,
    "checkpoint__every_steps": 3,
}


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("the red hat saw a mat and the cat sat\n" * 40)
    Path("reward.py").write_text(REWARD)
    Path("problems.jsonl").write_text("".join(json.dumps({"prompt": w, "answer": "e"}) + "\n" for w in "abcdefghijkl"))
    with Several(1, "base", **BASE) as base:
        assert base.wait() == [0], base.output()


def test_two_processes_learn_as_one_with_two_devices():
    with Several(2, "two", parallel__zero=1, **TUNED) as two:
        assert two.wait() == [0, 0], two.output()
    with Several(1, "one", devices=2, parallel__zero=1, **TUNED) as one:
        assert one.wait() == [0], one.output()
    assert two.output(1) == ""
    saved = sorted(int(path.name) for path in Path("runs/two/checkpoints").iterdir())
    assert saved == [4, 6]  # between rollouts of two steps
    lines = list(zip(metrics("two"), metrics("one"), strict=True))
    assert sum("reward" in line for line, _ in lines) == 3
    for line, other in lines:
        for name in ("reward", "loss", "kl", "entropy", "val_reward", "answer_tokens"):
            if name in other:
                assert line[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name
    assert Path("runs/two/samples.txt").read_text().count("--- step") == 4


def test_one_that_is_killed_goes_on_to_the_same_bits():
    """A PPO whose coefficient adapts, saved after each rollout that there is time for."""
    options = TUNED | {
        "objective__advantages": "values",
        "objective__value_coefficient": 0.5,
        "objective__kl_penalty": 0.1,
        "objective__kl_target": 1.0,
        "rollouts__epochs": 2,
        "training__steps": 60,
        "checkpoint__every_steps": 1,
    }
    with Several(1, "killed", **options) as killed:
        killed.until_step(8)
        killed.processes[0].kill()
    with Several(1, "killed", "--resume", **options) as again:
        assert again.wait() == [0], again.output()
    assert "resuming after step" in again.output()
    with Several(1, "whole", **options) as whole:
        assert whole.wait() == [0], whole.output()
    for name in ("loss", "reward", "kl_penalty", "value_loss", "val_reward"):
        one, other = ([line.get(name) for line in metrics(run)] for run in ("killed", "whole"))
        assert one == other, name
