"""A trained reward model, which scores texts.

Its scores have mean 0 and deviation 1 over the texts that were held out when it was trained: of the scores as they are
trained only the differences mean anything.
"""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxgpt.data import chat_templates, loader
from jaxgpt.data.chat_templates import Template
from jaxgpt.data.conversations import Messages
from jaxgpt.data.tokenizers import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.evaluation.scoring import padded_length
from jaxgpt.foreign_text import quoted, shown
from jaxgpt.interop import bases, detect_format
from jaxgpt.layers import scalar_head
from jaxgpt.models import family, with_scalar
from jaxgpt.models.blocks import Context, cast
from jaxgpt.objectives import reward
from jaxgpt.options import command_line
from jaxgpt.options.config import Compute, Model
from jaxgpt.runs import checkpoints
from jaxgpt.runs.about import FILE, lora_of, model_of, objective_of
from jaxgpt.runs.checkpoints import Found
from jaxgpt.terminal import command, say

AT_ONCE = 16  # texts
STANDARD = {"score_mean": 0.0, "score_deviation": 1.0}  # as checkpoints keep them, and where one keeps none


class RewardModel(NamedTuple):
    where: str
    params: with_scalar.Params
    model: Model
    compute: Compute
    tokenizer: Tokenizer
    template: Template

    def score(self, texts: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the scores of texts in tokens, float32, each that of its last token.

        UserError for a text that is longer than the model's context, or has other tokens.
        """
        scores, groups = np.zeros(len(texts), np.float32), {}
        for number, text in enumerate(texts):
            if not 0 < len(text) <= self.model.context:
                raise UserError(
                    f"{self.where}: a text of {len(text):,} tokens can't be scored: this reward model takes texts of 1 "
                    f"to {self.model.context:,}"
                )
            loader.check_vocabulary(text, self.model.vocabulary_size, self.where)
            groups.setdefault(padded_length(len(text), self.model.context), []).append(number)
        for length, numbers in groups.items():
            for start in range(0, len(numbers), AT_ONCE):
                part = numbers[start : start + AT_ONCE]
                tokens, last = np.zeros((AT_ONCE, 1, length), np.int32), np.zeros((AT_ONCE, 1), np.int32)
                for row, number in enumerate(part):
                    tokens[row, 0, : len(texts[number])] = texts[number]
                    last[row] = len(texts[number]) - 1
                found = _scores(self.params, tokens, last, model=self.model, compute=self.compute)
                scores[part] = np.asarray(found)[: len(part)]
        return scores

    def score_conversations(self, conversations: Sequence[Messages]) -> np.ndarray:
        """Returns the scores of conversations that end with an answer, in the template of the training.

        One that is longer than the model's context has -∞: nothing is known of an answer without its end.
        """
        texts = [chat_templates.encode(one, self.template, self.tokenizer).ids for one in conversations]
        scores = np.full(len(texts), -np.inf, np.float32)
        fits = [number for number, text in enumerate(texts) if len(text) <= self.model.context]
        scores[fits] = self.score([texts[number] for number in fits])
        return scores


def load(name: str) -> RewardModel:
    """Loads a reward model from a run of its own, with its adapters merged. UserError where there is none."""
    run = Path(name)
    if not (run / "config.toml").is_file():
        raise UserError(
            f"--reward-model {shown(name)}: not a run's folder (it has no config.toml){command_line.runs_near(run)}"
        )
    found = checkpoints.find(run / "checkpoints", ("params", "about"))
    for message in found.damaged:
        say(message, error=True)
    if objective_of(found.about).name != "reward":
        raise UserError(
            f"--reward-model {shown(name)}: no reward model, but one that draws text. To train one from it: "
            f"{command('--config', 'reward_quickstart', '--init-from', name, '--data.text', 'COMPARISONS.jsonl')}"
        )
    params = checkpoints.scored_params_of(found)
    if lora_of(found.about).rank:
        merge = functools.partial(bases.merged, found=found, open_weights=detect_format.open_weights)
        params = with_scalar.on_model(merge, params)
    mean, deviation = (_kept(found, name, otherwise) for name, otherwise in STANDARD.items())
    head = scalar_head.standardised(params.scalar, mean, deviation or 1.0)
    dtype = found.about["configuration"].get("compute", {}).get("dtype", "float32")
    template = found.about["template"]
    return RewardModel(
        str(found.path),
        params._replace(scalar=head),
        model_of(found.about),
        Compute(dtype=dtype, layers="scanned", attention="blocks"),
        checkpoints.tokenizer_of(found),
        chat_templates.from_state(template) if template else chat_templates.built_in("chatml"),
    )


def _kept(found: Found, name: str, otherwise: float) -> float:
    """Returns a number that the checkpoint keeps. UserError where it is something else."""
    value = found.about["kept"].get(name, otherwise)
    if not isinstance(value, float) or not math.isfinite(value):
        raise UserError(f"{found.path / FILE}: {name} can't be {quoted(value)}. Restore the file from a copy")
    return value


@functools.partial(jax.jit, static_argnames=("model", "compute"))
def _scores(
    params: with_scalar.Params, tokens: Int[Array, "B 1 T"], last: Int[Array, "B 1"], *, model: Model, compute: Compute
) -> Float[Array, " B"]:
    whole = cast(params, jnp.dtype(compute.dtype))
    batch = reward.Batch(tokens, last, jnp.zeros_like(last))
    found, _, _, _ = reward.scores(family(model), whole, batch, Context(model, compute))
    return found[:, 0]
