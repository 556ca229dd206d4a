"""Losses and gradients of the objectives beside the published formulas in torch, and torch's autograd.

TRL computes its losses inside of its trainers, and has no function to call. The formulas here are written down from the
papers and what TRL documents as its losses: `sigmoid`, `ipo`, `sigmoid_norm` and SimPO of pairs, the reward trainer's
with `center_rewards_coefficient`, PPO's clipped policy and value losses with masked means, GRPO's by `loss_type`.
"""

import numpy as np
import pytest

from jaxgpt.layers.cross_entropy import IGNORED
from jaxgpt.objectives import advantages, policy, preference, reward
from jaxgpt.options.config import Objective
from tests.objectives.readout import V, params, run, with_head

torch = pytest.importorskip("torch", reason="torch is in the parity extra")
F = torch.nn.functional


def tensor(array, grad=False):
    return torch.tensor(np.asarray(array), requires_grad=grad)


def logps(x, weight, targets):
    """Log-probabilities of the targets, 0 where ignored, their mask, and the logarithms of all probabilities."""
    everything = torch.log_softmax(x @ weight[:V].T, dim=-1).reshape(*targets.shape, V)
    mask = torch.tensor(targets != IGNORED)
    chosen = torch.gather(everything, -1, torch.tensor(np.maximum(targets, 0)).long()[..., None])[..., 0]
    return chosen * mask, mask, everything


def assert_same(found, loss, leaves, gradients):
    loss.backward()
    np.testing.assert_allclose(found[0], loss.detach().numpy(), rtol=1e-12)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        expected = leaf.grad.numpy()
        np.testing.assert_allclose(gradient, expected, rtol=1e-10, atol=1e-12 * np.abs(expected).max())


def answers(rng, shape, start=2):
    """Targets from `start` on, to an end that differs from text to text."""
    targets = rng.integers(V, size=shape)
    places = np.arange(shape[-1])
    ends = rng.integers(start + 1, shape[-1] + 1, size=shape[:-1])
    return np.where((places >= start) & (places < ends[..., None]), targets, IGNORED).astype(np.int32)


SMOOTHING = 0.1
PREFERENCES = {
    "sigmoid": (
        Objective(beta=0.3, label_smoothing=SMOOTHING),
        lambda c, r, n: -(1 - SMOOTHING) * F.logsigmoid(0.3 * (c - r)) - SMOOTHING * F.logsigmoid(-0.3 * (c - r)),
    ),
    "ipo": (
        Objective(beta=0.3, preference_loss="square", length_normalised=True),
        lambda c, r, n: (c / n[:, 0] - r / n[:, 1] - 1 / (2 * 0.3)) ** 2,
    ),
    "ipo of sums": (
        Objective(beta=0.3, preference_loss="square"),
        lambda c, r, n: (c - r - 1 / (2 * 0.3)) ** 2,
    ),
    "sigmoid_norm": (
        Objective(beta=0.3, length_normalised=True),
        lambda c, r, n: -F.logsigmoid(0.3 * (c / n[:, 0] - r / n[:, 1])),
    ),
    "simpo": (
        Objective(beta=2.0, length_normalised=True, reference_free=True, margin=0.5),
        lambda c, r, n: -F.logsigmoid(2.0 * c / n[:, 0] - 2.0 * r / n[:, 1] - 0.5),
    ),
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_preference(x64, name):
    options, formula = PREFERENCES[name]
    rng = np.random.default_rng(0)
    B, T = 4, 7
    targets, model = answers(rng, (B, 2, T)), params(rng, B * 2 * T)
    reference = rng.normal(size=(B, 2)) - 8
    batch = preference.Batch(np.zeros((B, 2, T), np.int32), targets, reference)
    value, metrics, grads = run(preference, model, batch, options)

    x, weight = tensor(model.x, grad=True), tensor(model.weight, grad=True)
    logp, mask, _ = logps(x, weight, targets)
    ratios = logp.sum(-1) - (0 if options.reference_free else tensor(reference))
    assert_same(
        (value, grads), formula(ratios[:, 0], ratios[:, 1], mask.sum(-1)).mean(), (x, weight), (grads.x, grads.weight)
    )
    if not options.length_normalised:
        rewards = options.beta * ratios.detach().numpy()
        assert metrics["accuracy"] == pytest.approx((rewards[:, 0] > rewards[:, 1]).mean())
        assert metrics["margin"] == pytest.approx((rewards[:, 0] - rewards[:, 1]).mean())


def test_reward_of_pairs_and_of_rankings(x64):
    """All pairs of a ranking with a tie and a text missing, one by one; and K = 2, as TRL has it, is the plain mean."""
    rng = np.random.default_rng(0)
    for ranks in (np.array([[0, 1], [1, 0], [0, 1]]), np.array([[2, 0, 1, 3], [1, 0, 1, 2], [0, 2, -1, 1]])):
        B, K = ranks.shape
        T = 5
        model = with_head(params(rng, B * K * T), rng)
        last = rng.integers(1, T, size=(B, K)).astype(np.int32)
        batch = reward.Batch(np.zeros((B, K, T), np.int32), last, ranks.astype(np.int32))
        value, metrics, grads = run(reward, model, batch, Objective(centre=0.01))

        x, weight, bias = (tensor(leaf, grad=True) for leaf in (model.ends.x, *model.scalar))
        scores = (x @ weight + bias).reshape(B, K, T)[np.arange(B)[:, None], np.arange(K), last]
        losses, right, pairs = [], 0.0, []
        for b in range(B):
            pairs = [(i, j) for i in range(K) for j in range(K) if 0 <= ranks[b, i] < ranks[b, j]]
            one = [
                -F.logsigmoid(scores[b, i] - scores[b, j]) + 0.01 * (scores[b, i] + scores[b, j]) ** 2 for i, j in pairs
            ]
            losses.append(sum(one) / len(one))
            right += np.mean([scores[b, i].item() > scores[b, j].item() for i, j in pairs]) / B
        gradients = (grads.ends.x, *grads.scalar)
        assert_same((value,), sum(losses) / B, (x, weight, bias), gradients)
        assert metrics["accuracy"] == pytest.approx(right)
        assert not np.any(grads.ends.weight)  # the classifier isn't read


def drawn(rng, B, T, model, *, values=False):
    """A batch of drawn texts with ratios on both sides of the clip, and their advantages."""
    targets = answers(rng, (B, T))
    x, weight = tensor(model.x), tensor(model.weight)
    logp, mask, _ = logps(x, weight, targets)
    mask, logp = mask.numpy(), logp.numpy()
    offsets = rng.choice([-0.6, -0.05, 0.05, 0.6], size=(B, T))
    parts = [rng.normal(size=(B, T)) * mask for _ in range(4)]
    return targets, mask, (logp - offsets) * mask, (logp + 0.3 * parts[0]) * mask, parts[1], parts[2], parts[3]


def test_ppo(x64):
    """Clipped policy and value losses and the entropy bonus, as masked means over all drawn tokens."""
    rng = np.random.default_rng(0)
    B, T = 3, 8
    model = with_head(params(rng, B * T), rng)
    targets, mask, old, reference, A, old_values, returns = drawn(rng, B, T, model.ends)
    options = Objective(value_coefficient=0.1, value_clip=0.2, entropy_coefficient=0.05)
    weights = advantages.token_weights(mask, by_sequence=False)
    batch = policy.Batch(np.zeros_like(targets), targets, weights, A, old, reference, old_values, returns)
    value, metrics, grads = run(policy, model, batch, options)

    x, weight, head, bias = (tensor(leaf, grad=True) for leaf in (*model.ends[:2], *model.scalar))
    logp, m, everything = logps(x, weight, targets)

    def masked_mean(array):
        return (array * m).sum() / m.sum()

    ratio = torch.exp(logp - tensor(old))
    of_policy = masked_mean(torch.max(-tensor(A) * ratio, -tensor(A) * torch.clamp(ratio, 0.8, 1.2)))
    values = (x @ head + bias).reshape(B, T)
    clipped = torch.clamp(values, tensor(old_values) - 0.2, tensor(old_values) + 0.2)
    of_values = 0.5 * masked_mean(torch.max((values - tensor(returns)) ** 2, (clipped - tensor(returns)) ** 2))
    entropy = masked_mean(-(everything.exp() * everything).sum(-1))
    loss = of_policy + 0.1 * of_values - 0.05 * entropy
    assert_same((value,), loss, (x, weight, head, bias), (*grads.ends[:2], *grads.scalar))
    assert metrics["entropy"] == pytest.approx(entropy.item())
    assert metrics["ratio"] == pytest.approx(masked_mean(ratio).item())
    assert metrics["value_loss"] == pytest.approx(0.1 * of_values.item())
    outside = (ratio < 0.8) & (tensor(A) < 0) | (ratio > 1.2) & (tensor(A) > 0)
    assert 0 < metrics["clip_fraction"] == pytest.approx(masked_mean(outside.double()).item())


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo"])  # the mean over answers of their means; over all tokens
@pytest.mark.parametrize("scale_rewards", [True, False])
def test_grpo(x64, loss_type, scale_rewards):
    rng = np.random.default_rng(0)
    P, G, T = 2, 3, 8
    model = params(rng, P * G * T)
    targets, mask, old, reference, *_ = drawn(rng, P * G, T, model)
    scores = rng.normal(size=(P, G))
    A = np.repeat(advantages.of_groups(scores, divide=scale_rewards).reshape(-1, 1), T, axis=1) * mask
    weights = advantages.token_weights(mask, by_sequence=loss_type == "grpo")
    options = Objective(kl_coefficient=0.04, clip=0.2, clip_above=0.28)
    unused = np.zeros_like(old)
    batch = policy.Batch(np.zeros_like(targets), targets, weights, A, old, reference, unused, unused)
    value, metrics, grads = run(policy, model, batch, options)

    x, weight = tensor(model.x, grad=True), tensor(model.weight, grad=True)
    logp, m, _ = logps(x, weight, targets)
    rewards = tensor(scores)
    expected = rewards - rewards.mean(1, keepdim=True)
    if scale_rewards:
        expected = expected / (rewards.std(1, keepdim=True) + 1e-4)
    expected = expected.reshape(-1, 1)
    ratio, d = torch.exp(logp - tensor(old)), tensor(reference) - logp
    losses = -torch.min(ratio * expected, torch.clamp(ratio, 0.8, 1.28) * expected) + 0.04 * (torch.exp(d) - d - 1)
    of_means = loss_type == "grpo"
    loss = ((losses * m).sum(-1) / m.sum(-1)).mean() if of_means else (losses * m).sum() / m.sum()
    assert_same((value,), loss, (x, weight), (grads.x, grads.weight))
    assert metrics["kl"] > 0


def test_reinforce_is_language_modelling_weighted_by_the_reward(x64):
    rng = np.random.default_rng(0)
    B, T = 3, 6
    model, targets = params(rng, B * T), answers(rng, (B, T))
    A = np.repeat(rng.normal(size=(B, 1)), T, axis=1)
    mask = targets != IGNORED
    unused = np.zeros((B, T))
    batch = policy.Batch(np.zeros_like(targets), targets, mask * 1.0, A * mask, unused, unused, unused, unused)
    value, _, grads = run(policy, model, batch, Objective(surrogate="reinforce"))
    x, weight = tensor(model.x, grad=True), tensor(model.weight, grad=True)
    flat = x @ weight[:V].T
    losses = F.cross_entropy(flat, tensor(targets).long().reshape(-1), ignore_index=IGNORED, reduction="none")
    loss = (losses * tensor(A).reshape(-1)).sum() / mask.sum()
    assert_same((value,), loss, (x, weight), (grads.x, grads.weight))
