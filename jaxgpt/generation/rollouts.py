"""Rollouts: answers that a policy draws itself, for reinforcement.

They are drawn from the model's own distribution, at temperature 1 and among all tokens, unless the sampling says
otherwise: only then are the model's log-probabilities those that the tokens were drawn with. Each answer's draw is a
pure function of its prompt, the weights and its seed.
"""

from collections.abc import Sequence

import numpy as np

from jaxgpt.generation.decoder import Decoder
from jaxgpt.layers.cross_entropy import IGNORED
from jaxgpt.models.blocks import Params
from jaxgpt.options.config import Compute, Model, Sampling

MOST_SLOTS = 16  # answers that are drawn side by side
AS_IT_IS = Sampling(temperature=1.0)


def draw(
    params: Params,
    prompts: Sequence[np.ndarray],
    seeds: Sequence[int],
    *,
    model: Model,
    compute: Compute,
    most: int,
    end: int | None = None,
    sampling: Sampling = AS_IT_IS,
) -> list[list[int]]:
    """Returns the tokens of an answer to each prompt: at most `most`, or up to and with the token `end`.

    Prompt and answer together are at most the model's context, so that nothing is forgotten.
    """
    longest = max(map(len, prompts)) + most
    if longest > model.context:
        raise ValueError(f"a prompt and {most} tokens are {longest} tokens, and the context has {model.context}")
    decoder = Decoder(params, model, compute, slots=min(len(prompts), MOST_SLOTS), capacity=longest)
    answers: list[list[int]] = [[] for _ in prompts]
    waiting, running = list(range(len(prompts)))[::-1], {}

    def take(slot: int, tokens: list[int]) -> None:
        answer = answers[running[slot]]
        for token in tokens:
            answer.append(token)
            if token == end or len(answer) == most:
                decoder.stop(slot)
                del running[slot]
                return

    while waiting or running:
        for slot in decoder.free():
            if waiting:
                number = running[slot] = waiting.pop()
                take(slot, [decoder.start(slot, prompts[number], sampling, seeds[number])])
        if running:
            for slot, tokens in decoder.go_on(most).items():
                if slot in running:
                    take(slot, tokens)
    return answers


def arrays(
    prompts: Sequence[np.ndarray], answers: Sequence[Sequence[int]], length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens and targets, int32 (B, length): each place's next token where it was drawn, else IGNORED."""
    tokens = np.zeros((len(prompts), length), np.int32)
    targets = np.full((len(prompts), length), IGNORED, np.int32)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        text = [*prompt, *answer]
        tokens[row, : len(text) - 1] = text[:-1]
        targets[row, len(prompt) - 1 : len(text) - 1] = answer
    return tokens, targets
