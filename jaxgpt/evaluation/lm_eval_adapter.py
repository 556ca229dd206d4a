"""EleutherAI's lm-evaluation-harness (lm_eval 0.4) scores a run: its command line, with a model called jaxgpt.

python -m jaxgpt.evaluation.lm_eval_adapter run --model jaxgpt --model_args run=runs/NAME --tasks hellaswag

lm_eval finds models by name among those that are registered, and looks for none in other packages; this module
registers its own and hands over to lm_eval's command. What is asked of a model (a log-likelihood, a text's in windows
of the context, text up to a stop) is lm_eval's; the answers are those of `scoring.py` and `generation/`.
"""

import os
import re
import sys
from typing import Any

import numpy as np

from jaxgpt.errors import JaxgptError, UserError

try:
    from lm_eval import utils
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError as error:
    raise UserError(f"to be scored by lm_eval a package is needed ({error}): make env EXTRAS=lm-eval") from None

from jaxgpt.evaluation import multiple_choice
from jaxgpt.evaluation.scoring import Score, ScoringRequest, make_scorer
from jaxgpt.foreign_text import shown
from jaxgpt.generation import batching
from jaxgpt.interop import loading
from jaxgpt.options.config import Sampling
from jaxgpt.terminal import say

BATCH_SIZE = 16  # where lm_eval leaves it to the model


@register_model("jaxgpt")
class JaxGPT(LM):
    """A run's newest whole checkpoint or other weights, on so many devices (0: all). UserError as `loading.load`."""

    def __init__(
        self, run: str, devices: int = 0, batch_size: int | str = BATCH_SIZE, max_gen_toks: int = 256, **others: Any
    ):
        super().__init__()  # `others` are what lm_eval hands to every model: max_batch_size, device
        self.model = loading.load(run, _whole("devices", devices))
        size = 0 if str(batch_size).startswith("auto") else _whole("batch_size", batch_size)
        self.scorer = make_scorer(self.model.config, size or BATCH_SIZE)
        self.max_gen_toks = _whole("max_gen_toks", max_gen_toks)

    @property
    def max_length(self) -> int:
        """Tokens of the model's context."""
        return self.model.config.model.context

    @property
    def tokenizer_name(self) -> str:
        return self.model.tokenizer.name

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Returns each continuation's log-likelihood, in nats, and whether it is what would be drawn greedily."""
        pairs: list[Any] = [request.args for request in requests]
        asked = [multiple_choice.split(str(context), str(text), self.model.tokenizer) for context, text in pairs]
        answers = [(score.log_likelihood, score.greedy) for score in self._scores(asked)]
        return self._kept("loglikelihood", requests, answers)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Returns each text's log-likelihood; its tokens are predicted once each, in windows as long as the context."""
        tokenizer = self.model.tokenizer
        asked, counts = [], []
        for request in requests:
            windows = utils.get_rolling_token_windows(
                token_list=tokenizer.encode(request.args[0]).tolist(),
                prefix_token=multiple_choice.prefix(tokenizer),
                max_seq_len=self.max_length,
                context_len=1,
            )
            disjoint = [ScoringRequest(*utils.make_disjoint_window(window)) for window in windows]
            asked += disjoint
            counts.append(len(disjoint))
        scores = iter(self._scores(asked))
        answers = [sum(next(scores).log_likelihood for _ in range(count)) for count in counts]
        return self._kept("loglikelihood_rolling", requests, answers)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Draws a text for each context, up to one of its stops or the end of a text."""
        tokenizer, config = self.model.tokenizer, self.model.config
        asked = [self._to_draw(*request.args[:2], seed=seed) for seed, request in enumerate(requests)]
        answers = [""] * len(requests)
        if asked:
            for piece in batching.generate(self.model.params, asked, config.model, config.compute, tokenizer):
                answers[piece.number] += piece.text
        return self._kept("generate_until", requests, answers)

    def _kept(self, kind: str, requests: list[Instance], answers: list[Any]) -> list[Any]:
        """Hands the answers to lm_eval's cache, and returns them."""
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial(kind, request.args, answer)
        return answers

    def _to_draw(self, context: str, options: dict[str, Any], seed: int) -> batching.Request:
        chosen: dict[str, Any] = dict(normalize_gen_kwargs(options, self.max_gen_toks))
        tokens = min(chosen["max_gen_toks"], self.max_length - 1)
        sampling = Sampling(
            tokens=tokens,
            temperature=chosen["temperature"] if chosen["do_sample"] else 0.0,
            top_k=chosen.get("top_k", 0),
            top_p=chosen.get("top_p", 1.0),
            stop=tuple(stop for stop in chosen["until"] if stop),
        )
        tokenizer = self.model.tokenizer
        room = self.max_length - tokens - (tokenizer.begin_of_text is not None)
        prompt = tokenizer.begin(tokenizer.encode(context)[-room:] if room > 0 else np.empty(0, np.int32))
        if not len(prompt):
            prompt = np.array([multiple_choice.prefix(tokenizer)], np.int32)
        return batching.Request(prompt, sampling, seed, batching.end_of_text(tokenizer))

    def _scores(self, requests: list[ScoringRequest]) -> list[Score]:
        """Returns the requests' scores. UserError for a continuation that is longer than the context."""
        longest = max((len(request.completion) for request in requests), default=0)
        if longest > self.max_length:
            raise UserError(f"a continuation has {longest:,} tokens, and the model's context is {self.max_length:,}")
        return self.scorer(self.model.params, requests)


def _whole(name: str, value: int | str) -> int:
    """Returns a number of --model_args, which lm_eval may leave as text. UserError where it is none."""
    text = str(value)
    if not re.fullmatch("[0-9]{1,9}", text):
        raise UserError(f"--model_args {name}={shown(text)}: must be a whole number of at most nine digits")
    return int(text)


def main() -> int:
    """Runs lm_eval's command; mistakes about the run are reported as this project reports them."""
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # it would fork for its bootstraps, which JAX's threads forbid
    try:
        cli_evaluate()
    except JaxgptError as error:
        say(f"error: {error}", error=True)
        return error.status
    return 0


if __name__ == "__main__":
    sys.exit(main())
