"""A rollout's answers as the batches of its steps, beside loops over single tokens."""

import dataclasses

import numpy as np
import pytest

from jaxgpt.layers.cross_entropy import IGNORED
from jaxgpt.objectives import experience
from jaxgpt.objectives.experience import Drawn
from jaxgpt.options.config import Objective

N, T, GROUP = 6, 9, 3
BEGINS, LENGTHS = [2, 2, 2, 4, 4, 4], [3, 1, 7, 5, 2, 4]


@pytest.fixture
def drawn() -> Drawn:
    rng = np.random.default_rng(0)
    targets = np.full((N, T), IGNORED, np.int32)
    for row, (begin, length) in enumerate(zip(BEGINS, LENGTHS, strict=True)):
        targets[row, begin : begin + length] = 1
    tokens = rng.integers(5, size=(N, T), dtype=np.int32)
    logp, reference, values = rng.normal(size=(3, N, T)).astype(np.float32)
    there = targets != IGNORED
    scores = rng.normal(size=N).astype(np.float32)
    return Drawn(tokens, targets, scores, there * logp, there * reference, values)


def places(row: int) -> range:
    return range(BEGINS[row], BEGINS[row] + LENGTHS[row])


def earned(drawn: Drawn, row: int, penalty: float) -> list[float]:
    """The reward of each token of an answer."""
    assert drawn.reference is not None
    found = [-penalty * float(drawn.logp[row, t] - drawn.reference[row, t]) for t in places(row)]
    found[-1] += float(drawn.scores[row])
    return found


@pytest.mark.parametrize("divide", [True, False])
def test_groups(drawn, divide):
    options = Objective(name="policy", advantages="group", divide_by_deviation=divide)
    batch = experience.batch(drawn, options, group=GROUP, penalty=0.3)
    totals = np.array([sum(earned(drawn, row, 0.3)) for row in range(N)])
    for row in range(N):
        group = totals[row // GROUP * GROUP :][:GROUP]
        expected = totals[row] - group.mean()
        if divide:
            expected /= group.std(ddof=1) + 1e-4
        for t in range(T):
            assert batch.advantages[row, t] == pytest.approx(expected if t in places(row) else 0, abs=1e-5)


def test_values(drawn):
    options = Objective(name="policy", advantages="values", discount=0.9, advantage_decay=0.8, value_coefficient=1.0)
    batch = experience.batch(drawn, options, group=1, penalty=0.3)
    assert drawn.values is not None
    for row in range(N):
        rewards, values = earned(drawn, row, 0.3), [float(drawn.values[row, t]) for t in places(row)] + [0.0]
        n = len(rewards)
        deltas = [rewards[t] + 0.9 * values[t + 1] - values[t] for t in range(n)]
        for t, place in enumerate(places(row)):
            advantage = sum((0.9 * 0.8) ** (k - t) * deltas[k] for k in range(t, n))
            assert batch.advantages[row, place] == pytest.approx(advantage, abs=1e-5)
            assert batch.returns[row, place] == pytest.approx(advantage + values[t], abs=1e-5)
            assert batch.old_values[row, place] == np.float32(values[t])


def test_rewards_alone(drawn):
    """Each token's advantage is the answer's reward; with a discount, the discounted sum of rewards from it on."""
    options = Objective(name="policy", surrogate="reinforce", advantages="reward")
    batch = experience.batch(drawn, options, group=1, penalty=0.0)
    np.testing.assert_allclose(batch.advantages, drawn.answer * drawn.scores[:, None], rtol=1e-6)
    batch = experience.batch(drawn, dataclasses.replace(options, discount=0.5), group=1, penalty=0.3)
    for row in range(N):
        rewards = earned(drawn, row, 0.3)
        for t, place in enumerate(places(row)):
            assert batch.advantages[row, place] == pytest.approx(
                sum(0.5 ** (k - t) * rewards[k] for k in range(t, len(rewards))), abs=1e-5
            )


@pytest.mark.parametrize("alike", [True, False])
def test_weights(drawn, alike):
    batch = experience.batch(drawn, Objective(name="policy", answers_alike=alike), group=GROUP, penalty=0.0)
    sums = np.sum(batch.weights, axis=1)
    np.testing.assert_allclose(sums, [1] * N if alike else LENGTHS, rtol=1e-6)


def test_whitened_advantages_have_mean_0_and_deviation_1(drawn):
    options = Objective(name="policy", advantages="reward", whiten=True)
    batch = experience.batch(drawn, options, group=1, penalty=0.1)
    there = np.asarray(batch.advantages)[drawn.answer]
    assert there.mean() == pytest.approx(0, abs=1e-5)
    assert there.std() == pytest.approx(1, abs=1e-5)
    assert not np.asarray(batch.advantages)[~drawn.answer].any()


def test_the_divergence_of_an_answer_is_the_sum_over_its_tokens(drawn):
    costs = [drawn.scores[row] - sum(earned(drawn, row, 1.0)) for row in range(N)]
    assert drawn.divergence == pytest.approx(np.mean(costs), rel=1e-5)
    assert drawn._replace(reference=None).divergence == 0
