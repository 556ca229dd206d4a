"""Inputs that a compiled step is checked at: parameters, and batches of every objective, by NumPy and from seeds alone.

Parameters are random ones with noise on all of them, so that none is at a value at which a gradient is 0 or a term of
it drops out: a new bias, or an adapter's second matrix.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.layers import cross_entropy
from jaxgpt.models import family, lora
from jaxgpt.objectives import objective
from jaxgpt.options.config import IN_DATA, Compute, Config
from jaxgpt.parallel import mesh
from jaxgpt.proof.gradcheck_oracle import Tree, attached, in_float64
from jaxgpt.proof.inputs import noisy
from jaxgpt.proof.objective_cases import logp_and_values
from jaxgpt.training.state import with_head

OFFSETS = (-0.6, -0.07, 0.06, 0.5)  # logarithms of ratios of a policy: in the middle of a clip, and far beyond its ends
CLEAR = 0.1  # half of the distance between a token's channels that routers read, and the share of all others
EVERY = 8  # tokens, on average, from which a document begins


class Inputs(NamedTuple):
    name: str
    about: str  # in a few words
    batches: list[Any]  # the gradient of each is the same, but for `model.dropout`
    ties: bool = False  # takes the parameters of `with_ties`


def parameters(config: Config) -> Tree:
    """Returns whole trained parameters, with layers stacked, as float32."""
    key = jax.random.key(config.training.seed)
    if config.lora.rank:
        made = jax.jit(lambda: with_head(lora.init(config.model, config.lora, key), config))()
    else:
        made = jax.jit(lambda: with_head(family(config.model).init(config.model, key), config))()
    return _with_noise(key, made, config)


def base_of_adapters(config: Config) -> Tree:
    """Returns whole weights for adapters to be beside, with layers stacked, as float32; None where all are trained."""
    if not config.lora.rank:
        return None
    key = jax.random.key(config.training.seed + 1)
    return _with_noise(key, jax.jit(lambda: family(config.model).init(config.model, key))(), config)


def _with_noise(key: Any, params: Tree, config: Config) -> Tree:
    params = jax.tree.map(lambda array: np.asarray(array, np.float32), noisy(key, params))
    return _with_clear_choices(params, config) if config.model.experts else params


def _with_clear_choices(params: Tree, config: Config) -> Tree:
    """Returns the parameters with routers whose scores lie far apart, so that no rounding decides where a token goes.

    The stream's first E channels are a token's own from the first layer to the last: E evenly spaced numbers in an
    order that each token has for itself, to which no layer adds. A router reads little else.
    """
    E, C, random = config.model.experts, config.model.width, np.random.default_rng(config.training.seed)

    def one(path: tuple, array: np.ndarray) -> np.ndarray:
        names = [getattr(part, "name", "") for part in path]
        array = array.copy()
        if "router" in names:  # (L, C, E)
            array *= CLEAR / np.sqrt(C)
            array[:, np.arange(E), np.arange(E)] += 1
        elif "mlp_norm" in names:
            array[..., :E] = 1
        elif "token" in names:
            array[:, :E] = 2 * CLEAR * (np.argsort(random.random((array.shape[0], E))) - (E - 1) / 2)
        elif {"attention_out", "w_out"} & set(names) or (names[-1] == "b" and array.shape[-1] == C):
            array[..., :E] = 0
        return array

    return jax.tree_util.tree_map_with_path(one, params)


def with_ties(params: Tree) -> Tree:
    """Returns the parameters with pairs of tokens of equal logits, and with routers of equal scores for all experts.

    So every token's largest score is several times there, and which experts are chosen is a matter of their order.
    """

    def one(path: tuple, array: np.ndarray) -> np.ndarray:
        names = [getattr(part, "name", "") for part in path]
        if "router" in names:
            return np.zeros_like(array)
        return np.repeat(array[::2], 2, axis=0) if "token" in names or "head" in names else array

    return jax.tree_util.tree_map_with_path(one, params)


class Batches:
    """Makes batches of a configuration's objective. `exact` makes what is trained, and the base, for the oracle."""

    def __init__(self, config: Config, exact: Callable[[], tuple[Tree, Tree]]):
        self.config, self.exact = config, exact
        self.devices = mesh.make(config.parallel).size
        self.each = config.training.batch_size // self.devices

    def inputs(self) -> Iterator[Inputs]:
        """Yields all that gradients are compared at."""
        yield Inputs("random", "random tokens", [self.random(0)])
        yield Inputs("masked", "half of the targets are masked, and all of the first device's", [self.masked(1)])
        yield Inputs("repeated", "one token or two, again and again", [self.repeated(2)])
        yield Inputs("ties", "equal logits in pairs, equal scores of all experts", [self.random(3)], ties=True)
        if self.devices > 1:
            about = f"the same sequences with targets on one device alone, on each of the {self.devices} in turn"
            yield Inputs("one device", about, [self.on_one_device(4, device) for device in range(self.devices)])

    def random(self, seed: int, *, tile: bool = False) -> Any:
        """Returns a batch of random tokens; with `tile` each device has the same rows."""
        return self._made(np.random.default_rng(seed), self._tokens(seed), tile=tile)

    def repeated(self, seed: int) -> Any:
        """Returns a batch whose texts go on with one token or two, so that many gradients meet in a row of the table.

        They begin with others: where all values are the same, attention's gradient is what cancellation left.
        """
        tokens, first = self._tokens(seed), max(1, self.config.training.sequence_length // 4)
        tokens[..., first::2] = tokens[..., first : first + 1]
        tokens[..., first + 1 :: 2] = tokens[..., first + 1 : first + 2]
        tokens[:, ::2, ..., first:] = tokens[:, ::2, ..., first : first + 1]
        return self._made(np.random.default_rng(seed), tokens)

    def masked(self, seed: int) -> Any:
        """Returns a random batch without half of its targets, and without any on the first device, where it can be."""
        batch, random = self.random(seed), np.random.default_rng(seed)
        if self.config.objective.name == "next_token":
            keep = random.random(batch.targets.shape) < 0.5
            batch = batch._replace(targets=np.where(keep, batch.targets, np.int32(cross_entropy.IGNORED)))
        rows = np.arange(self.config.training.batch_size) < self.each * (self.devices > 1)
        return self._without(batch, rows)

    def on_one_device(self, seed: int, device: int) -> Any:
        """Returns a batch of the same rows on each device, and of targets on one."""
        rows = np.arange(self.config.training.batch_size) // self.each != device
        return self._without(self.random(seed, tile=True), rows)

    def _tokens(self, seed: int) -> np.ndarray:
        shape, random = objective(self.config).shapes(self.config).tokens.shape, np.random.default_rng(seed)
        tokens = random.integers(0, self.config.model.vocabulary_size, shape, dtype=np.int32)
        start = self.config.model.document_start
        return np.where(random.random(shape) < 1 / EVERY, np.int32(start), tokens) if start >= 0 else tokens

    def _made(self, random: np.random.Generator, tokens: np.ndarray, *, tile: bool = False) -> Any:
        shapes = objective(self.config).shapes(self.config)
        make = {
            "next_token": self._next_token,
            "reward": self._reward,
            "preference": self._preference,
            "policy": self._policy,
        }[self.config.objective.name]
        parts = make(random, tokens)
        if tile:
            parts = {
                name: np.concatenate([part[:, : self.each]] * self.devices, axis=1) for name, part in parts.items()
            }
        batch = type(shapes)(**parts)
        return jax.tree.map(lambda shape, array: np.asarray(array, shape.dtype), shapes, batch)

    def _targets(self, random: np.random.Generator, shape: tuple[int, ...], ignored: float) -> np.ndarray:
        targets = random.integers(0, self.config.model.vocabulary_size, shape, dtype=np.int32)
        return np.where(random.random(shape) < ignored, np.int32(cross_entropy.IGNORED), targets)

    def _next_token(self, random: np.random.Generator, tokens: np.ndarray) -> dict[str, np.ndarray]:
        parts = {"tokens": tokens, "targets": self._targets(random, tokens.shape, 0.05)}
        if self.config.model.document_start == IN_DATA:
            begins = np.where(random.random(tokens.shape) < 1 / EVERY, np.arange(tokens.shape[-1]), 0)
            parts["starts"] = np.maximum.accumulate(begins, axis=-1)
        return parts

    def _reward(self, random: np.random.Generator, tokens: np.ndarray) -> dict[str, np.ndarray]:
        texts = tokens.shape[:-1]
        ranks = np.argsort(random.random(texts), axis=-1).astype(np.int32)
        ranks[:, 0] = np.minimum(ranks[:, 0], max(texts[-1] - 2, 1))  # a tie, where there are three texts or more
        return {"tokens": tokens, "last": random.integers(0, tokens.shape[-1], texts), "ranks": ranks}

    def _preference(self, random: np.random.Generator, tokens: np.ndarray) -> dict[str, np.ndarray]:
        targets = self._targets(random, tokens.shape, 0.0)
        targets[..., : tokens.shape[-1] // 3] = cross_entropy.IGNORED
        count = np.sum(targets != cross_entropy.IGNORED, axis=-1)
        likely = -count * np.log(self.config.model.vocabulary_size)
        return {"tokens": tokens, "targets": targets, "reference": likely + random.standard_normal(count.shape)}

    def _policy(self, random: np.random.Generator, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """Makes drawn texts whose ratios and values are clear of the ends of the clips, where rounding would decide."""
        config, shape = self.config, tokens.shape
        targets = self._targets(random, shape, 0.1)
        drawn = targets != cross_entropy.IGNORED
        with in_float64():
            params, base = jax.tree.map(jnp.asarray, self.exact())
            if config.lora.rank:
                params = attached(params, base, config)
            compute = Compute(attention="blocks", attention_block=config.compute.attention_block, layers="scanned")
            head = bool(config.objective.value_coefficient)
            rows, wanted = (jnp.asarray(array.reshape(-1, shape[-1])) for array in (tokens, targets))
            logp, values = logp_and_values(params, rows, wanted, config.model, compute, head)
        logp, values = logp.reshape(shape), values.reshape(shape)
        weights, advantages, reference, returns = random.standard_normal((4, *shape))
        offsets = random.choice(OFFSETS, (2, *shape))
        parts = {
            "weights": np.abs(weights),
            "advantages": advantages + 0.3 * np.sign(advantages),
            "old": logp - offsets[0],
            "reference": logp + 0.3 * reference,
            "old_values": values - 2 * offsets[1],
            "returns": returns,
        }
        return {"tokens": tokens, "targets": targets, **{name: part * drawn for name, part in parts.items()}}

    def _without(self, batch: Any, rows: np.ndarray) -> Any:
        """Returns the batch without what there is to learn from these rows of each micro-batch."""
        absent = {"targets": cross_entropy.IGNORED, "ranks": -1}
        absent |= dict.fromkeys(("weights", "advantages", "old", "reference", "old_values", "returns"), 0)
        changed = {}
        for name, array in batch._asdict().items():
            if name in absent and array is not None:
                at = rows.reshape(1, -1, *[1] * (array.ndim - 2))
                changed[name] = np.where(at, np.asarray(absent[name], array.dtype), array)
        return batch._replace(**changed)
