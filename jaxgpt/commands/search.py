"""Options of `run.py generate` beyond drawing one text after another: what texts have to be of, and searching for good
ones.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from jaxgpt import files
from jaxgpt.errors import UserError
from jaxgpt.evaluation.reward_model import RewardModel
from jaxgpt.foreign_text import shown
from jaxgpt.generation import batching, beam, choosing, constrained, speculative
from jaxgpt.generation.batching import Piece, Request, UntilStop
from jaxgpt.generation.constrained import Constraint
from jaxgpt.generation.sampling import only_known_tokens
from jaxgpt.interop import loading
from jaxgpt.options import checks
from jaxgpt.options.config import Sampling
from jaxgpt.runs.checkpoints import Trained
from jaxgpt.terminal import say


@dataclass(frozen=True)
class Search:
    """Constraints of texts, and ways to good ones."""

    json_schema: str = ""
    """File with a JSON schema that every text follows."""
    regex: str = ""
    """Regular expression that every text matches as a whole."""
    grammar: str = ""
    """File with a grammar, in Lark's notation, that every text follows."""
    best_of: int = 1
    """Number of texts to draw for each sample; the one whose tokens have the highest mean log-probability is
    printed."""
    reward_model: str = ""
    """Run of a reward model: --best-of prints the text that it scores highest. Where the model that draws was trained
    on conversations, prompts are questions in its chat template."""
    vote: str = ""
    """Regular expression whose last match in a text, or its first group, is the text's answer; the answer that most
    samples of a prompt give is printed."""
    beams: int = 0
    """Number of beams to search for a likely text with, instead of drawing; 0 for no search."""
    draft: str = ""
    """Smaller model of the same tokenizer, which drafts tokens for the model to check: the same greedy text,
    sooner."""
    draft_tokens: int = speculative.DRAFTED
    """Number of tokens that it drafts at a time."""


def check(search: Search, sampling: Sampling) -> None:
    """Raises a UserError for options that don't go together, or an expression that is none."""
    checks.check_number(search.best_of, "", "best_of", positive=True)
    checks.check_number(search.beams, "", "beams")
    checks.check_number(search.draft_tokens, "", "draft_tokens", positive=True)
    kinds = {"--json-schema": search.json_schema, "--regex": search.regex, "--grammar": search.grammar}
    ways = {"--best-of": search.best_of > 1, "--beams": search.beams, "--draft": search.draft}
    for group in (kinds, ways):
        if len(chosen := [name for name, value in group.items() if value]) > 1:
            raise UserError(f"{' and '.join(chosen)} don't go together: choose one")
    if (search.beams or search.draft) and any(kinds.values()):
        raise UserError(
            "--beams and --draft know no constraints: leave them away, or --json-schema, --regex, --grammar"
        )
    if search.draft and (sampling.temperature or sampling.repetition_penalty != 1):
        raise UserError("--draft is for greedy text: give --temperature 0 too, and no --repetition-penalty")
    if search.reward_model and search.best_of < 2:
        raise UserError("--reward-model chooses among the texts of --best-of: give that too, such as --best-of 8")
    if search.vote:
        _expression(search.vote)


def constraint(search: Search, model: Trained) -> Constraint | None:
    """Returns what the texts have to be of. UserError where the file or the grammar is none."""
    if not (search.json_schema or search.regex or search.grammar):
        return None
    known = only_known_tokens(model.config.model, model.tokenizer)
    ends = tuple(batching.end_of_text(model.tokenizer))
    vocabulary = constrained.vocabulary(model.tokenizer, known.vocabulary_size, ends)
    option = "--json-schema" if search.json_schema else "--regex" if search.regex else "--grammar"
    try:
        if search.regex:
            return vocabulary.regex(search.regex)
        text = files.read_text(Path(search.json_schema or search.grammar), constrained.LARGEST_GRAMMAR)
        if search.json_schema:
            return vocabulary.json_schema(constrained.parse_schema(text))
        return vocabulary.lark(text)
    except UserError as error:
        raise UserError(f"{option} {error}") from None


class Judge(NamedTuple):
    """A reward model, and the prompts of the requests as they were typed."""

    model: RewardModel
    prompts: list[str]

    def best(self, number: int, texts: Sequence[choosing.Whole]) -> choosing.Whole:
        """Returns the text with the highest score as the answer to the prompt of request `number`."""
        question = {"role": "user", "content": self.prompts[number]}
        answers = [[question, {"role": "assistant", "content": text.text}] for text in texts]
        return texts[int(self.model.score_conversations(answers).argmax())]


def pieces(model: Trained, requests: Sequence[Request], search: Search, judge: Judge | None = None) -> Iterator[Piece]:
    """Yields pieces of the requests' texts: of all as they come, or the best one of each when it is known."""
    config, tokenizer = model.config, model.tokenizer
    if search.best_of > 1:
        yield from _best(model, requests, search.best_of, judge)
    elif search.beams or search.draft:
        known = only_known_tokens(config.model, tokenizer)
        speaker = speculative.speaker(model.params, known, config.compute)
        drafter = _drafter(search.draft, model, known.vocabulary_size) if search.draft else None
        for number, request in enumerate(requests):
            if drafter:
                count = request.sampling.tokens
                drawn = speculative.speculate(speaker, drafter, request.prompt, count, search.draft_tokens)
            else:
                found = beam.search(speaker, request.prompt, request.sampling.tokens, search.beams, request.ends)
                drawn = iter([found[0].tokens])
            yield from _said(number, request, drawn, model)
    else:
        for number, text, piece in batching.texts(model.params, requests, config.model, config.compute, tokenizer):
            yield Piece(number, piece, bool(text.ended))
            _tell_of_length(number, text)


def votes(texts: Sequence[str], pattern: str) -> str:
    """Returns which answer most texts give, in words."""
    found = choosing.vote(texts, _expression(pattern))
    if found is None:
        return "no text has an answer"
    return f"{found.answer} ({found.votes} of {len(texts)})"


def _expression(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"--vote {shown(pattern)}: no regular expression ({shown(error)})") from None


def _best(model: Trained, requests: Sequence[Request], count: int, judge: Judge | None) -> Iterator[Piece]:
    each = [
        dataclasses.replace(request, seed=request.seed * count + number, scored=True)
        for request in requests
        for number in range(count)
    ]
    config = model.config
    wholes = [choosing.Whole() for _ in each]
    for number, text, piece in batching.texts(model.params, each, config.model, config.compute, model.tokenizer):
        wholes[number].add(piece, len(text.tokens), text.ended, text.scored)
        _tell_of_length(number // count, text)
    for number in range(len(requests)):
        texts = wholes[number * count : (number + 1) * count]
        best = judge.best(number, texts) if judge else choosing.best(texts, 1)[0]
        yield Piece(number, best.text, True)


def _tell_of_length(number: int, text: batching.Text) -> None:
    if text.request.constraint and text.ended == "length":
        say(f"note: text {number + 1} had --tokens {len(text.tokens)} before it was complete", error=True)


def _drafter(run: str, model: Trained, vocabulary_size: int) -> speculative.Speaker:
    """Returns the model that drafts. UserError where its tokenizer is another."""
    found = loading.load(run, devices=1)
    if found.tokenizer.state() != model.tokenizer.state():
        raise UserError(
            f"--draft {shown(run)} has the tokenizer {found.tokenizer.name}, and --run {model.tokenizer.name} of other "
            "tokens: take a model of the same tokenizer"
        )
    known = dataclasses.replace(only_known_tokens(found.config.model, found.tokenizer), vocabulary_size=vocabulary_size)
    return speculative.speaker(found.params, known, found.config.compute)


def _said(number: int, request: Request, drawn: Iterator[list[int]], model: Trained) -> Iterator[Piece]:
    """Yields the text of a request's tokens up to where it ends."""
    decode, left = UntilStop(model.tokenizer, request.sampling.stop), request.sampling.tokens
    for tokens in drawn:
        piece = "".join(map(decode, tokens[:left]))
        left -= len(tokens)
        if decode.stopped:
            break
        yield Piece(number, piece, False)
        piece = ""
    else:
        piece = ""
    yield Piece(number, piece + decode.finish(), True)
