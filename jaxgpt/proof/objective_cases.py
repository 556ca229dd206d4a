"""Cases of whole models under each objective, and of the layers and terms that the objectives have of their own.

Inputs stay clear of the edges of clips, where rounding would decide which side they are on.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from jaxgpt.layers import cross_entropy, entropy, scalar_head, unembedding
from jaxgpt.layers.numerics import accumulation_dtype
from jaxgpt.models import family, lora, with_scalar
from jaxgpt.models.blocks import Adapters, Context, inputs_of, unstacked
from jaxgpt.objectives import comparisons, next_token, policy, preference, reward, surrogates
from jaxgpt.options.config import Compute, Lora, Model, Objective
from jaxgpt.proof.gradcheck import Case
from jaxgpt.proof.inputs import generator, integers, masks_of, noisy, normals, random_targets

PREFERENCES = {
    "dpo": Objective(beta=0.7, label_smoothing=0.2),
    "ipo": Objective(beta=0.7, preference_loss="square", length_normalised=True),
    "simpo": Objective(beta=2.5, reference_free=True, length_normalised=True, margin=0.4),
}
EVERYTHING = Objective(  # that a policy may have
    clip_above=0.3, kl_coefficient=0.4, entropy_coefficient=0.3, value_coefficient=0.7
)


def cases(model: Model, compute: Compute, batch: int, length: int, key: Key[Array, ""]) -> Iterator[Case]:
    """Yields a case of each layer, of each term of an objective, and of a whole model under each objective."""
    keys = (jax.random.fold_in(key, number) for number in itertools.count())
    B, T, C = batch, length, model.width
    V, Vp = model.vocabulary_size, model.padded_vocabulary_size
    yield scalar_head_case(next(keys), B * T, C)
    yield scalar_head_case(next(keys), B * T, C, read=B)
    yield entropy_case(next(keys), B * T, V, Vp)
    yield unembedding_case(next(keys), B * T, C, V, Vp, compute.classifier_chunk)
    yield from term_cases(next(keys), B, T)
    yield reward_case(next(keys), B, 3, T, model, compute)
    yield preference_case(next(keys), B, T, model, compute, PREFERENCES["dpo"])
    yield policy_case(next(keys), B, T, model, compute, EVERYTHING)


def scalar_head_case(key: Key[Array, ""], N: int, C: int, *, read: int = 0) -> Case:
    """Returns the case of all tokens, or of one that is read twice and `read` others.

    Its output is a sum with positive weights, so that the bias's gradient, one number, isn't what cancellation left.
    """
    weight, bias, x = normals(key, (C,), (), (N, C))
    places = jnp.asarray([N - 1, N - 1, *range(read)]) if read else None
    weights = jnp.asarray(1 + generator(key).random(read + 2 if read else N))

    def forward(inputs):
        y, residuals = scalar_head.forward(inputs["params"], inputs["x"], places)
        return jnp.sum(weights.astype(y.dtype) * y), residuals

    def backward(inputs, dy):
        y, residuals = forward(inputs)
        dparams, dx = scalar_head.backward(inputs["params"], residuals, (dy * weights).astype(y.dtype))
        return {"params": dparams, "x": dx}

    inputs = {"params": scalar_head.Params(weight, bias), "x": x}
    return Case("scalar_head_of_places" if read else "scalar_head", inputs, lambda inputs: forward(inputs)[0], backward)


def entropy_case(key: Key[Array, ""], N: int, V: int, Vp: int) -> Case:
    """Returns the case of logits, which are in the accumulation dtype as a product gives them."""
    (logits,) = normals(key, (N, Vp))
    targets = random_targets(key, (N,), V)

    def forward(logits):
        wide = logits.astype(accumulation_dtype(logits.dtype))
        _, kept = cross_entropy.forward(wide, targets, vocabulary_size=V)
        return entropy.forward(kept, vocabulary_size=V)

    return Case(
        "entropy",
        2 * logits,
        lambda logits: forward(logits)[0],
        lambda logits, dy: entropy.backward(forward(logits)[1], dy, vocabulary_size=V).astype(dy.dtype),
    )


def unembedding_case(key: Key[Array, ""], N: int, C: int, V: int, Vp: int, chunk: int, *, cap: float = 0.0) -> Case:
    """Returns the case of an objective that has both log-probabilities and entropies, in no linear way."""
    weight, x, factors = normals(key, (Vp, C), (N, C), (N,))
    targets = random_targets(key, (N,), V)

    def objective(logp, entropy, factors):
        factors = factors.astype(logp.dtype)
        value = jnp.sum(factors * (jnp.exp(logp) + 0.3 * entropy**2))
        return value, factors * jnp.exp(logp), 0.6 * factors * entropy

    def forward(inputs):
        options: dict[str, Any] = {"vocabulary_size": V, "chunk": chunk, "cap": cap, "with_entropy": True}
        params, x = inputs["params"], inputs["x"]
        return unembedding.forward(params, x, targets, objective, jnp.asarray(factors), **options)

    def backward(inputs, dy):
        dparams, dx = unembedding.backward(forward(inputs)[1], dy)
        return {"params": dparams, "x": dx}

    inputs = {"params": unembedding.Params(weight / C**0.5), "x": x}
    return Case("unembedding_of_entropy", inputs, lambda inputs: forward(inputs)[0], backward)


def term_cases(key: Key[Array, ""], B: int, T: int) -> Iterator[Case]:
    """Yields the cases of the terms of comparisons and policies."""
    N = B * T
    logp, advantages, returns, reference, scores = normals(key, (N,), (N,), (N,), (N,), (B, 4))
    ranks = jnp.asarray(_ranks(key, B, 4))

    def ranking(scores):
        return comparisons.ranking_loss(scores, ranks, centre=0.3)

    yield Case(
        "comparisons_of_rankings",
        scores,
        lambda scores: ranking(scores)[0],
        lambda scores, dy: dy[:, None] * ranking(scores)[1],
    )
    yield _term_case("comparisons_of_sigmoid", lambda h: comparisons.sigmoid_loss(h, smoothing=0.2), logp)
    yield _term_case("comparisons_of_square", lambda h: comparisons.square_loss(h), logp)

    old = jnp.asarray(logp - _offsets(key, (N,)))
    advantages, reference = jnp.asarray(_away_from_0(advantages)), jnp.asarray(reference)
    yield _term_case("surrogates_of_reinforce", lambda logp: surrogates.reinforce(logp, advantages), logp)
    yield _term_case(
        "surrogates_of_clipping", lambda logp: surrogates.clipped(logp, old, advantages, below=0.2, above=0.3), logp
    )
    for estimator in ("k1", "k2", "k3"):
        yield _term_case(
            f"surrogates_of_{estimator}",
            lambda logp, estimator=estimator: surrogates.divergence(logp, reference, estimator=estimator),
            logp,
        )
    for clip in (0.2, 0.0):
        yield _term_case(
            "surrogates_of_clipped_values" if clip else "surrogates_of_values",
            lambda values, clip=clip: surrogates.value_loss(values, old, jnp.asarray(returns), clip=clip),
            logp,
        )


def _term_case(name: str, term: Callable[[Any], tuple[Any, Any]], x: Any) -> Case:
    """Returns the case of a function from each token's number to its value and derivative."""
    return Case(name, x, lambda x: term(x)[0], lambda x, dy: (dy * term(x)[1]).astype(dy.dtype))


def model_case(
    key: Key[Array, ""],
    B: int,
    T: int,
    model: Model,
    compute: Compute,
    *,
    scale: float | None = None,
    rate: float = 0.0,
) -> Case:
    """Returns the case of a whole model of any family, under the loss of the next token, with its `scale`.

    With a `rate` it is in training, with dropout of that rate.
    """
    name = model.family + "_with_dropout" * bool(rate)
    params, batch = _params(key, model, compute), _next_token_batch(key, B, T, model)
    context = Context(model, compute, masks=masks_of(key, B, rate))
    return _objective_case(name, next_token, params, batch, context, scale=scale)


def adapted_model_case(key: Key[Array, ""], B: int, T: int, model: Model, compute: Compute) -> Case:
    """Returns the case of adapters of all projections of a frozen model, under the loss of the next token."""
    module, options = family(model), Lora(rank=2, alpha=3.0, base="float32")
    base = _params(jax.random.fold_in(key, 1), model, compute)
    params = noisy(key, lora.init(model, options, key, jnp.float64))
    if compute.layers == "unrolled":
        params = unstacked(params)
    batch = _next_token_batch(key, B, T, model)
    context = Context(model, compute, scatter=lambda grads: lora.gradients(grads, model, options))

    def attached(params):
        dtype = jax.tree.leaves(params)[0].dtype
        frozen = jax.tree.map(lambda array: jnp.asarray(array, dtype), base)
        return lora.attach(params, frozen, model, options, dtype)

    def backward(params, dloss):
        _, _, grads = next_token.loss_and_grads(module, attached(params), batch, context)
        return jax.tree.map(lambda grad: grad * dloss.astype(grad.dtype), Adapters(grads.blocks))

    return Case(
        f"{model.family}_adapters",
        params,
        lambda params: next_token.loss(module, attached(params), batch, context),
        backward,
        depth=2 * model.layers + 2,
    )


def _next_token_batch(key: Key[Array, ""], B: int, T: int, model: Model) -> next_token.Batch:
    tokens = integers(key, (B, T), model.vocabulary_size)
    return next_token.Batch(tokens, random_targets(key, (B, T), model.vocabulary_size))


def reward_case(key: Key[Array, ""], B: int, K: int, T: int, model: Model, compute: Compute) -> Case:
    """Returns the case of a reward model on rankings of K texts, of which the last text of the last isn't there."""
    params = params_with_scalar(key, model, compute)
    last = np.asarray(integers(key, (B, K), T))
    ranks = _ranks(key, B, K)
    batch = reward.Batch(integers(key, (B, K, T), model.vocabulary_size), jnp.asarray(last), jnp.asarray(ranks))
    context = Context(model, compute, objective=Objective(centre=0.3))
    return _objective_case("reward", reward, params, batch, context)


def preference_case(key: Key[Array, ""], B: int, T: int, model: Model, compute: Compute, options: Objective) -> Case:
    """Returns the case of pairs, the last of which has an empty answer where there is more than one."""
    shape = (B, 2, T)
    targets = np.asarray(integers(key, shape, model.vocabulary_size)).copy()
    targets[:, :, : T // 3] = targets[:, 1, -1] = cross_entropy.IGNORED
    if B > 1:
        targets[-1, 1] = cross_entropy.IGNORED
    (reference,) = normals(key, (B, 2))
    tokens = integers(key, shape, model.vocabulary_size)
    batch = preference.Batch(tokens, jnp.asarray(targets), jnp.asarray(reference - T))
    context = Context(model, compute, objective=options)
    return _objective_case("preference", preference, _params(key, model, compute), batch, context)


def policy_case(
    key: Key[Array, ""],
    B: int,
    T: int,
    model: Model,
    compute: Compute,
    options: Objective,
    *,
    scale: float | None = None,
) -> Case:
    """Returns the case of drawn texts whose ratios and values are on both sides of the clips."""
    with_value = bool(options.value_coefficient)
    params = params_with_scalar(key, model, compute) if with_value else _params(key, model, compute)
    tokens, targets = integers(key, (B, T), model.vocabulary_size), random_targets(key, (B, T), model.vocabulary_size)
    logp, values = logp_and_values(params, tokens, targets, model, compute, with_value)
    drawn = np.asarray(targets) != cross_entropy.IGNORED
    weights, advantages, reference, returns = (part * drawn for part in normals(key, *[(B, T)] * 4))
    batch = policy.Batch(
        tokens,
        targets,
        weights=jnp.asarray(np.abs(weights)),
        advantages=jnp.asarray(_away_from_0(advantages) * drawn),
        old=jnp.asarray((logp - _offsets(key, (B, T))) * drawn),
        reference=jnp.asarray((logp + 0.3 * reference) * drawn),
        old_values=jnp.asarray((values - 2 * _offsets(key, (B, T))) * drawn),
        returns=jnp.asarray(returns),
    )
    context = Context(model, compute, objective=options)
    return _objective_case("policy", policy, params, batch, context, scale=scale)


def _objective_case(
    name: str,
    objective: Any,
    params: Any,
    batch: Any,
    context: Context,
    *,
    scale: float | None = None,
) -> Case:
    """Returns the case of a whole model under an objective, with its `scale`."""
    module = family(context.model)
    factor = None if scale is None else jnp.asarray(scale)

    def backward(params, dloss):
        _, _, grads = objective.loss_and_grads(module, params, batch, context, scale=factor)
        return jax.tree.map(lambda grad: grad * dloss.astype(grad.dtype), grads)

    def forward(params):
        return objective.loss(module, params, batch, context, scale=factor)

    return Case(name, params, forward, backward, depth=2 * context.model.layers + 2)


def _params(key: Key[Array, ""], model: Model, compute: Compute) -> Any:
    params = noisy(key, jax.jit(lambda: family(model).init(model, key, jnp.float64))())
    return unstacked(params) if compute.layers == "unrolled" else params


def params_with_scalar(key: Key[Array, ""], model: Model, compute: Compute) -> with_scalar.Params:
    scalar = noisy(key, with_scalar.init_scalar(model, key, jnp.float64))
    return with_scalar.attach(_params(key, model, compute), scalar)


def logp_and_values(
    params: Any, tokens: Array, targets: Array, model: Model, compute: Compute, with_value: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the log-probabilities of the targets, and the values, with these parameters."""
    module, context = family(model), Context(model, dataclasses.replace(compute, recompute="none"))

    @jax.jit
    def compute_both(params):
        of_model = with_scalar.model_of(params) if with_value else params
        x, _, _ = module.features(of_model, inputs_of(tokens, model), context)
        values = scalar_head.forward(params.scalar, x)[0] if with_value else jnp.zeros(targets.size)
        options: dict[str, Any] = {"vocabulary_size": model.vocabulary_size, "chunk": targets.size}
        cap = model.logit_soft_cap
        logp = unembedding.log_probabilities(module.head(of_model), x, targets.reshape(-1), cap=cap, **options)
        return logp.reshape(targets.shape), values.reshape(targets.shape)

    logp, values = compute_both(jax.tree.map(jnp.asarray, params))
    return np.asarray(logp), np.asarray(values)


def _ranks(key: Key[Array, ""], B: int, K: int) -> np.ndarray:
    """Returns ranks with a tie, and without the last text of the last ranking."""
    ranks = np.stack([generator(key).permutation(K) for _ in range(B)]).astype(np.int32)
    ranks[0, ranks[0] == K - 1] = K - 2
    ranks[-1, -1] = -1
    return ranks


def _offsets(key: Key[Array, ""], shape: tuple[int, ...]) -> np.ndarray:
    """Returns logarithms of ratios, some in the middle of a clip of 0.2 and some far beyond either end."""
    return generator(key).choice([-0.6, -0.07, 0.06, 0.5], shape)


def _away_from_0(array: np.ndarray) -> np.ndarray:
    return array + 0.3 * np.sign(array)
