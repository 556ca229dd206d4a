"""Instructions and whether texts follow them, by the words of IFEval's paper, and the shares that are followed."""

import numpy as np
import pytest

from jaxgpt.data import tokenizers
from jaxgpt.errors import UserError
from jaxgpt.evaluation import ifeval
from jaxgpt.evaluation.instructions import INSTRUCTIONS, arguments, check
from jaxgpt.evaluation.interface import Engine, Options, Subject
from jaxgpt.options.config import Model
from tests.evaluation.task_folders import INSTRUCTED, write_lines

SUBJECT = Subject(tokenizers.Bytes(), Model(layers=1, heads=2, width=16, context=512, vocabulary_size=256))
IN_THE_PAPER = {  # of the 25 in its table; the language of a text is not checked
    *("keywords:existence", "keywords:frequency", "keywords:forbidden_words", "keywords:letter_frequency"),
    *("length_constraints:number_sentences", "length_constraints:number_paragraphs", "length_constraints:number_words"),
    *("length_constraints:nth_paragraph_first_word", "detectable_content:number_placeholders"),
    *("detectable_content:postscript", "detectable_format:number_bullet_lists", "detectable_format:title"),
    *("detectable_format:constrained_response", "detectable_format:number_highlighted_sections"),
    *("detectable_format:multiple_sections", "detectable_format:json_format", "combination:repeat_prompt"),
    *("combination:two_responses", "startend:end_checker", "startend:quotation", "punctuation:no_comma"),
    *("change_case:capital_word_frequency", "change_case:english_capital", "change_case:english_lowercase"),
}


def at_least(number: int, key: str) -> dict:
    return {key: number, "relation": "at least"}


def less_than(number: int, key: str) -> dict:
    return {key: number, "relation": "less than"}


THIRD = {"num_paragraphs": 3, "nth_paragraph": 3, "first_word": "end"}
CASES = [  # name, parameters, texts that follow it, texts that don't
    ("keywords:existence", {"keywords": ["cat", "a.b"]}, ["A.B, Cats"], ["cat", "cat axb"]),
    ("keywords:frequency", {"keyword": "no", **at_least(2, "frequency")}, ["No, no", "nonono"], ["no"]),
    ("keywords:frequency", {"keyword": "no", **less_than(2, "frequency")}, ["no", "yes"], ["no no"]),
    ("keywords:forbidden_words", {"forbidden_words": ["cat", "dog"]}, ["cats, dogma"], ["a Cat.", "dog"]),
    (
        "keywords:letter_frequency",
        {"letter": "E", "let_frequency": 3, "let_relation": "at least"},
        ["eEe"],
        ["ee, abc"],
    ),
    (
        "length_constraints:number_sentences",
        at_least(2, "num_sentences"),
        ["Hi! How?", "A. B"],
        ["One 1.5 a.b", "A..."],
    ),
    ("length_constraints:number_sentences", less_than(2, "num_sentences"), ["Hi there."], ["Hi. There."]),
    ("length_constraints:number_words", at_least(3, "num_words"), ["a b c", "it's so"], ["a, b"]),
    ("length_constraints:number_words", less_than(3, "num_words"), ["a b"], ["a b c"]),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, ["a\n***\nb", "***a***b***"], ["a", "a******b"]),
    (
        "length_constraints:nth_paragraph_first_word",
        THIRD,
        ["a\n\nb\n\nEnd, c", 'a\n\nb\n\n"end" c'],
        ["End\n\na\n\nb"],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        THIRD,
        ["a\n\nb\n\nend"],
        ["a\n\nend", "a\n\nb\n\nend\n\nc", "a\n\nb\n\n..."],
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[name] of [town]"], ["[name]", "[a\nb] [c]"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["a\nP.S. b", "p. s. b"], ["PS b"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["P.P.S b", "p. p. s b"], ["P.S. b"]),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* a\n  - b"],
        ["* a", "**a**\n* b", "* a\n* b\n* c"],
    ),
    ("detectable_format:constrained_response", {}, ["My answer is no."], ["no", "My answer is no"]),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*a b* and **c**", "*a* *b*"],
        ["**a**", "* a\n* b", "** ** *a*"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Day", "num_sections": 2},
        ["Day 1 a Day 2 b"],
        ["Day 1", "Day one Day two", "day 1 day 2"],
    ),
    (
        "detectable_format:json_format",
        {},
        ['{"a": 1}', '```json\n["a"]\n```', "```\n1\n```"],
        ["{a: 1}", 'so: {"a": 1}'],
    ),
    ("detectable_format:title", {}, ["<<a poem>>\nb"], ["<a>", "<<>>", "<<  >>"]),
    ("combination:two_responses", {}, ["a\n******\nb"], ["a", "a******a", "a******b******c", "a************b"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say a."}, [" say A. Here: a"], ["a"]),
    ("startend:end_checker", {"end_phrase": "Any more?"}, ['So "any MORE?"'], ["Any more? No."]),
    (
        "startend:quotation",
        {},
        ['"a"', ' "a" b"\n'],
        ["a", '"', '"a'],
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["NO, I say"],
        ["No I"],
    ),
    ("change_case:english_capital", {}, ["HI 1!"], ["Hi", "1"]),
    ("change_case:english_lowercase", {}, ["hi 1!"], ["Hi", "1"]),
    ("punctuation:no_comma", {}, ["a; b"], ["a, b"]),
]


@pytest.mark.parametrize(("name", "parameters", "follow", "dont"), CASES)
def test_an_instruction(name, parameters, follow, dont):
    checked = arguments(name, parameters | {"of others": None})
    assert [check(name, checked, text) for text in follow] == [True] * len(follow)
    assert [check(name, checked, text) for text in dont] == [False] * len(dont)
    assert not check(name, checked, " \n"), "an empty answer follows nothing"


def test_all_but_one_are_checked():
    assert set(INSTRUCTIONS) == IN_THE_PAPER
    assert {name for name, *_ in CASES} == IN_THE_PAPER, "each has a case"


def answering(answers: list[str]) -> Engine:
    return Engine(None, None, lambda requests: answers)  # type: ignore[arg-type]


def test_the_shares_that_are_followed(tmp_path):
    """2 of 3 prompts, and 4 of 5 instructions, whose error is of prompts, which are drawn, and not of instructions."""
    rows = [INSTRUCTED[0], INSTRUCTED[1], INSTRUCTED[0] | {"prompt": "again"}]
    task = ifeval.load(write_lines(tmp_path / "a.jsonl", rows), SUBJECT, Options())
    (result,) = task.results(answering(["<<a>>", "two words", "no title"]))
    assert (result.examples, result.accuracy) == (3, pytest.approx(2 / 3))
    assert result.standard_error == pytest.approx(np.std([1, 1, 0], ddof=1) / np.sqrt(3))
    assert (result.instructions, result.accuracy_instructions) == (5, pytest.approx(4 / 5))
    followed, asked = np.array([2, 1, 1]), np.array([2, 1, 2])
    residual = followed - 0.8 * asked
    assert result.standard_error_instructions == pytest.approx(np.std(residual, ddof=1) * np.sqrt(3) / 5)


def test_what_is_not_checked_is_named(tmp_path):
    task = ifeval.load(write_lines(tmp_path / "a.jsonl", INSTRUCTED), SUBJECT, Options())
    assert [SUBJECT.tokenizer.decode(prompt.tokens) for prompt in task.asked.prompts] == [
        row["prompt"] for row in INSTRUCTED[:2]
    ]
    (result,) = task.results(answering(["<<a>>", "two words"]))
    assert (result.accuracy, result.left_out, result.unknown) == (1, 1, "language:response_language")
    assert result.line() == (
        "ifeval: accuracy 1.0000 ± 0.0000, of 3 instructions 1.0000 ± 0.0000, 2 examples, 1 left out, whose "
        "instructions are not checked here: language:response_language"
    )
    only = write_lines(tmp_path / "b.jsonl", INSTRUCTED[2:])
    with pytest.raises(
        UserError, match=r"b.jsonl: every prompt has an instruction that is not checked here: language:"
    ):
        ifeval.load(only, SUBJECT, Options())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": None}, "prompt is missing. Is it a file of the task ifeval"),
        ({"instruction_id_list": "x"}, "instruction_id_list is not a list of texts"),
        ({"kwargs": [{}]}, "kwargs is not a list of 2 objects, one for each instruction"),
        ({"kwargs": [{}, 1]}, "kwargs has 1, where an object is expected"),
        (
            {"instruction_id_list": ["length_constraints:number_words"], "kwargs": [{"num_words": "3"}]},
            "length_constraints:number_words: num_words is '3', and must be a whole number",
        ),
        (
            {"instruction_id_list": ["length_constraints:number_words"], "kwargs": [{"num_words": 3, "relation": "<"}]},
            "relation is '<', and must be one of less than, at least",
        ),
        (
            {"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": []}]},
            "keywords is a list of 0 values, and must be a list of texts",
        ),
    ],
)
def test_a_malformed_line(tmp_path, change, message):
    path = write_lines(tmp_path / "a.jsonl", [INSTRUCTED[0], INSTRUCTED[0] | change])
    with pytest.raises(UserError, match=rf"a.jsonl: line 2: .*{message}"):
        ifeval.load(path, SUBJECT, Options())


def test_nothing_is_shown_before_a_prompt(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", INSTRUCTED)
    with pytest.raises(UserError, match="--shots 2: before the prompts of ifeval nothing is shown"):
        ifeval.load(path, SUBJECT, Options(shots=2))
    with pytest.raises(UserError, match="task ifeval: no file is named"):
        ifeval.load("", SUBJECT, Options())
