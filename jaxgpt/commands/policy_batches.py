"""Batches of a policy: rollouts of answers that it draws itself, with their rewards, and steps that learn from them.

    a rollout    P prompts, G answers to each, drawn with the weights of now on all devices; their rewards; their
                 log-probabilities, values, and log-probabilities under the reference, as the train step computes them
    its steps    each of `epochs` times all answers, in an order of its own, divided among `minibatches` steps

All of it is a pure function of the seed, the number of the rollout and the weights. The run is saved only between
rollouts, so that one that is resumed goes on to the same bits.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from jaxgpt.commands import first_weights
from jaxgpt.commands.batches import Evaluation, Setting
from jaxgpt.data import comparisons, loader
from jaxgpt.data.problems import Problem, Problems
from jaxgpt.data.tokenizers import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.evaluation.rewards import Answered, Reward, question
from jaxgpt.foreign_text import printable, quoted
from jaxgpt.generation import rollouts
from jaxgpt.generation.sampling import only_known_tokens
from jaxgpt.models import with_scalar
from jaxgpt.objectives import advantages, experience, policy
from jaxgpt.options.config import Sampling
from jaxgpt.parallel import processes
from jaxgpt.parallel.mesh import AXIS, in_turn
from jaxgpt.parallel.sharding import Layout
from jaxgpt.training.log_probabilities import make_forward
from jaxgpt.training.state import TrainState

ROWS, WHOLE = PartitionSpec(AXIS), PartitionSpec()
PENALTY = "kl_penalty"  # what a checkpoint keeps, beside the reference's fingerprint
SHOWN = 4  # answers of an evaluation in samples.txt
RIGHT = 1.0  # reward from which on an answer counts as right


class ProblemData(NamedTuple):
    """Problems; a `corpus.Described`."""

    description: str
    tokenizer: Tokenizer
    prompt: np.ndarray | None
    fingerprint: dict[str, Any]
    template: dict[str, Any]
    notes: tuple[str, ...]
    problems: Problems
    stops: tuple[str, ...]  # texts that end an answer


class Answers(NamedTuple):
    """Drawn answers, of this process."""

    tokens: list[list[int]]
    texts: list[str]  # without what ended them
    scores: np.ndarray  # their rewards, float32
    ended: np.ndarray  # whether they ended by themselves, bool

    def sums(self) -> dict[str, float]:
        """Returns sums, by the names of the means that they become."""
        return {
            "reward": float(self.scores.sum(dtype=np.float64)),
            "right": float((self.scores >= RIGHT).sum()),
            "answer_tokens": float(sum(map(len, self.tokens))),
            "ended": float(self.ended.sum()),
        }


class PolicyBatches:
    """Rollouts, each of `every` steps; a `batches.Batches`."""

    def __init__(self, data: ProblemData, reward: Reward, setting: Setting):
        self.config = config = setting.config
        training, options = config.training, config.rollouts
        self.data, self.setting, self._reward = data, setting, reward
        self.every = options.steps
        self.answers = training.micro_batches * training.batch_size * options.minibatches  # of a rollout
        self.tokens = training.micro_batches * training.batch_size * training.sequence_length
        self.layout = setting.resharding.layout
        self._forward, self._gather = make_forward(config), _gather(self.layout)
        self._reference = first_weights.reference(setting)
        self._penalty = _kept_penalty(setting)
        limit = training.evaluation_batches * training.batch_size
        self._held_out = data.problems.validation[: limit or None]

    def feed(self, first: int, rows: Sequence[int]) -> "PolicyFeed":
        return PolicyFeed(self, first, rows)

    def words(self, values: Mapping[str, float]) -> str:
        return f"reward {values['reward']:.3f}" if "reward" in values else ""

    def to_keep(self, step: int, state: TrainState) -> dict[str, Any]:
        return {PENALTY: self._penalty} | (self._reference.to_keep() if self._reference else {})

    # A rollout

    def rollout(self, number: int, state: TrainState) -> tuple[policy.Batch, dict[str, float]]:
        """Returns the arrays of all answers of a rollout, (N, T), and its metrics. All processes call it together."""
        config, N, B = self.config, self.answers, self.config.training.batch_size
        group, seed = config.rollouts.answers, config.training.seed
        train = self.data.problems.train
        asked = [train[place] for place in comparisons.numbers_at(number, N // group, len(train), seed)]
        rows = self.layout.own_rows(B)
        own = [start + row for start in range(0, N, B) for row in rows]
        problems = [asked[place // group] for place in own]
        answers = self._draw(state, problems, rollouts.seeds_of(seed, number, own), rollouts.AS_IT_IS)
        drawn, ended = self._drawn(state, problems, answers, len(rows))
        batch = experience.batch(drawn, config.objective, group=group, penalty=self._penalty)
        return batch, self._metrics(drawn, ended)

    def _metrics(self, drawn: experience.Drawn, ended: np.ndarray) -> dict[str, float]:
        """Returns a rollout's metrics, and adapts the divergence's coefficient to what it was."""
        metrics = {
            "reward": float(drawn.scores.mean()),
            "reward_deviation": float(drawn.scores.std()),
            "right": float((drawn.scores >= RIGHT).mean()),
            "answer_tokens": float(drawn.answer.sum() / len(drawn.tokens)),
            "ended": float(ended.mean()),
        }
        options = self.config.objective
        if self._reference:
            metrics["kl_of_answer"] = drawn.divergence
        if options.kl_penalty:
            metrics[PENALTY] = self._penalty
            if options.kl_target:
                self._penalty = advantages.adapted(self._penalty, drawn.divergence, options.kl_target)
        return metrics

    def _draw(
        self, state: TrainState, problems: Sequence[Problem], seeds: Sequence[int], sampling: Sampling
    ) -> Answers:
        """Draws this process's answers on all its devices, and rewards them."""
        config, data, most = self.config, self.data, self.config.rollouts.tokens
        whole = self.setting.resharding.whole_params_on_each(state, self.setting.frozen)
        ends = rollouts.end_of_answer(data.tokenizer, data.stops)
        tokens = rollouts.draw_on_devices(
            [with_scalar.model_of(params) if config.objective.scalar_head else params for params in whole],
            [problem.tokens for problem in problems],
            seeds,
            model=only_known_tokens(config.model, data.tokenizer),
            compute=config.compute,
            most=most,
            ends=ends,
            longest=data.problems.longest,
            sampling=sampling,
        )
        texts = [rollouts.text_of(answer, data.tokenizer, data.stops) for answer in tokens]
        pairs = zip(problems, texts, strict=True)
        scores = self._reward([Answered(problem.prompt, problem.answer, text) for problem, text in pairs])
        return Answers(tokens, texts, np.array(scores, np.float32), np.array([ends(answer) for answer in tokens], bool))

    def _drawn(
        self, state: TrainState, problems: Sequence[Problem], answers: Answers, rows: int
    ) -> tuple[experience.Drawn, Any]:
        """Returns all processes' answers with their log-probabilities and values, and whether each ended by itself.

        They are computed a micro-batch at once, of which this process has so many `rows`, as the train step does.
        """
        length, layout, frozen = self.config.training.sequence_length, self.layout, self.setting.frozen
        texts = rollouts.arrays([problem.tokens for problem in problems], answers.tokens, length)
        own = (*texts, answers.scores, answers.ended)

        def dispatched() -> Iterator[Any]:
            for start in range(0, len(problems), rows):
                part = layout.from_processes(tuple(array[start : start + rows] for array in own), ROWS)
                now = self._forward(state.params, frozen, *part[:2])
                before = self._reference and self._forward(self._reference.params, frozen, *part[:2]).logp
                yield self._gather((*part, now.logp, before, now.values))

        parts = zip(*in_turn(dispatched()), strict=True)
        tokens, targets, scores, ended, *found = (None if part[0] is None else np.concatenate(part) for part in parts)
        return experience.Drawn(tokens, targets, scores, *found), ended  # type: ignore[arg-type]

    # Evaluation

    def evaluate(self, step: int, state: TrainState) -> Evaluation:
        """Draws the likeliest answer to each problem that is held out, and shows some of them in samples.txt."""
        own = self._held_out[processes.index() :: processes.count()]
        answers = self._draw(state, own, [0] * len(own), Sampling(temperature=0.0))
        sums = processes.talk.all_gather(answers.sums())
        means = {f"val_{name}": sum(one[name] for one in sums) / len(self._held_out) for name in sums[0]}
        self.setting.folder.sample(step, _shown(own[:SHOWN], answers))
        words = f"{means['val_right']:.1%} right, {means['val_answer_tokens']:.1f} tokens an answer"
        return Evaluation(None, means, f"reward {means['val_reward']:.4f}, {words}")


class PolicyFeed(AbstractContextManager):
    """The batches of a run's steps; a `batches.Feed`. It begins with the first step of a rollout."""

    def __init__(self, batches: PolicyBatches, first: int, rows: Sequence[int]):
        self._batches, self._step, self._rows = batches, first, np.asarray(rows)
        self._rollout: policy.Batch | None = None
        self.waited, self.values = 0.0, {}

    def __exit__(self, *exception: object) -> None:
        self._rollout = None

    def next(self, state: TrainState) -> policy.Batch:
        """Returns the next step's batch, and at a rollout's first step draws it."""
        started = time.perf_counter()
        number, step = divmod(self._step, self._batches.every)
        self.values = {}
        if step == 0 or self._rollout is None:  # a run that stopped at a NaN is saved within a rollout too
            self._rollout, self.values = self._batches.rollout(number, state)
            self.values["rollout_seconds"] = time.perf_counter() - started
        self._step += 1
        batch = jax.tree.map(lambda array: array[self._places(number, step)], self._rollout)
        self.waited = time.perf_counter() - started
        return batch

    def _places(self, rollout: int, step: int) -> np.ndarray:
        """Returns the places in the rollout of the answers of one of its steps, (A, B): this process's rows."""
        config, N = self._batches.config, self._batches.answers
        epoch, part = divmod(step, config.rollouts.minibatches)
        keys = loader.permutation_keys(config.training.seed, rollout * config.rollouts.epochs + epoch)
        order = loader.permuted(np.arange(N), N, keys)
        A, B = config.training.micro_batches, config.training.batch_size
        return order.reshape(-1, A, B)[part][:, self._rows]


def _kept_penalty(setting: Setting) -> float:
    """Returns the coefficient of the divergence to go on with. UserError where a checkpoint keeps something else."""
    value = setting.kept.get(PENALTY, setting.config.objective.kl_penalty)
    if not isinstance(value, float) or not 0 <= value < math.inf:
        raise UserError(f"the checkpoint's {PENALTY} can't be {quoted(value)}. Restore it from a copy")
    return value


def _gather(layout: Layout) -> Any:
    """Returns a function that all-gathers arrays sharded by rows, so that each process has them whole."""
    if jax.process_count() == 1:
        return lambda tree: tree
    return layout.jit(
        lambda tree: jax.tree.map(lambda array: lax.all_gather(array, AXIS, tiled=True), tree),
        in_specs=ROWS,
        out_specs=WHOLE,
    )


def _shown(problems: Sequence[Problem], answers: Answers) -> str:
    """Returns problems with their drawn answers and rewards, for people to read."""
    found = zip(problems, answers.texts, answers.scores, strict=False)
    return printable("\n\n".join(f"{question(p.prompt)}\n→ {text}\n(reward {score:g})" for p, text, score in found))
