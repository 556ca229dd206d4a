"""Rollouts: answers that a policy draws itself, for reinforcement.

They are drawn from the model's own distribution, at temperature 1 and among all tokens, unless the sampling says
otherwise: only then are the model's log-probabilities those that the tokens were drawn with. Each answer's draw is a
pure function of its prompt, the weights and its seed.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from jaxgpt.data.tokenizers import Tokenizer
from jaxgpt.generation.decoder import Decoder
from jaxgpt.layers.cross_entropy import IGNORED
from jaxgpt.models.blocks import Params
from jaxgpt.options.config import Compute, Model, Sampling

MOST_SLOTS = 16  # answers that are drawn side by side
BURST = 8  # tokens of each that are drawn at once; what is drawn beyond an answer's end is lost
AS_IT_IS = Sampling(temperature=1.0)
Ends = Callable[[Sequence[int]], bool]  # whether an answer ends with the last of these tokens of it


def never(answer: Sequence[int]) -> bool:
    """Ends no answer."""
    return False


def end_of_answer(tokenizer: Tokenizer, stops: Sequence[str]) -> Ends:
    """Returns a function that ends an answer with the end of a text, or with one of the texts `stops`."""
    # Every token has at least one byte, so that a stop text that has just become whole is within so many of the last.
    window = max((len(stop.encode()) for stop in stops), default=0)

    def ends(answer: Sequence[int]) -> bool:
        if answer[-1] == tokenizer.end_of_text:
            return True
        text = tokenizer.decode(answer[-window:]) if window else ""
        return any(stop in text for stop in stops)

    return ends


def text_of(answer: Sequence[int], tokenizer: Tokenizer, stops: Sequence[str]) -> str:
    """Returns an answer's text, without what ended it."""
    kept = answer[:-1] if answer and answer[-1] == tokenizer.end_of_text else answer
    text = tokenizer.decode(kept)
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def draw(
    params: Params,
    prompts: Sequence[np.ndarray],
    seeds: Sequence[int],
    *,
    model: Model,
    compute: Compute,
    most: int,
    ends: Ends = never,
    longest: int = 0,
    sampling: Sampling = AS_IT_IS,
) -> list[list[int]]:
    """Returns the tokens of an answer to each prompt: at most `most`, or up to and with the one at which it `ends`.

    Prompt and answer together are at most the model's context, so that nothing is forgotten. `longest` is the number of
    tokens of the longest prompt that there will be in any call, so that all calls run the same programs.
    """
    capacity = max([longest, *map(len, prompts)]) + most
    if capacity > model.context:
        raise ValueError(f"a prompt and {most} tokens are {capacity} tokens, and the context has {model.context}")
    slots = min(len(prompts), MOST_SLOTS)
    decoder = Decoder(params, model, compute, slots=slots, capacity=capacity, burst=BURST)
    answers: list[list[int]] = [[] for _ in prompts]
    waiting, running = list(range(len(prompts)))[::-1], {}

    def take(slot: int, tokens: list[int]) -> None:
        answer = answers[running[slot]]
        for token in tokens:
            answer.append(token)
            if len(answer) == most or ends(answer):
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


def draw_on_devices(
    params: Sequence[Params], prompts: Sequence[np.ndarray], seeds: Sequence[int], **options: Any
) -> list[list[int]]:
    """Returns what `draw` does, drawn on several devices side by side; `params` has the parameters on each of them."""

    def share(place: int) -> list[list[int]]:
        theirs = prompts[place :: len(params)], seeds[place :: len(params)]
        return draw(params[place], *theirs, **options) if len(theirs[0]) else []

    with ThreadPoolExecutor(len(params)) as threads:
        shares = list(threads.map(share, range(len(params))))
    return [shares[number % len(params)][number // len(params)] for number in range(len(prompts))]


def seeds_of(seed: int, rollout: int, places: Iterable[int]) -> list[int]:
    """Returns the seeds of a rollout's answers at these places: pure functions of a run's seed and these numbers."""
    states = (np.random.SeedSequence((seed, rollout, place)).generate_state(1, np.uint64) for place in places)
    return [int(state[0]) for state in states]


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
