"""Instructions whose following a program can check, with the names and parameters of IFEval.

Zhou et al. 2023, arXiv:2311.07911. Each check takes a text and the instruction's parameters. Where theirs takes a
library's words or sentences (NLTK), these are found by expressions here: words are runs of letters and digits,
apostrophes and hyphens within; a sentence ends with . ! or ? before white space or the end. Keywords are texts, and no
regular expressions. The language of a text is not checked (`language:response_language`, and that of
`change_case:english_...`).
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxgpt.evaluation.tasks import Malformed
from jaxgpt.foreign_text import parse_json, quoted

RELATIONS = ("less than", "at least")
WORD = re.compile(r"\w+")
SPOKEN = re.compile(r"\w+(?:['’-]\w+)*")
SENTENCE = re.compile(r"[.!?]+(?=\s|$)")
ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
FENCES = ("```json", "```Json", "```JSON", "```")


class Instruction(NamedTuple):
    """A check, and its parameters with the type of each: a text, a whole number, or (list) some texts."""

    check: Callable[..., bool]
    parameters: dict[str, type] = {}  # noqa: RUF012


def holds(count: int, relation: str, number: int) -> bool:
    return count < number if relation == "less than" else count >= number


def occurrences(text: str, keyword: str) -> int:
    return len(re.findall(re.escape(keyword), text, re.IGNORECASE))


# Keywords


def existence(text: str, keywords: list[str]) -> bool:
    return all(occurrences(text, keyword) for keyword in keywords)


def frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return holds(occurrences(text, keyword), relation, frequency)


def forbidden_words(text: str, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in forbidden_words)


def letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return holds(text.lower().count(letter.lower()), let_relation, let_frequency)


# Lengths


def number_sentences(text: str, num_sentences: int, relation: str) -> bool:
    sentences = [part for part in SENTENCE.split(text) if part.strip()]
    return holds(len(sentences), relation, num_sentences)


def number_words(text: str, num_words: int, relation: str) -> bool:
    return holds(len(WORD.findall(text)), relation, num_words)


def number_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Paragraphs have *** between them; none within may be empty."""
    parts = [part.strip() for part in text.split("***")]
    if not all(parts[1:-1]):
        return False
    return sum(map(bool, parts)) == num_paragraphs


def nth_paragraph_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs have an empty line between them; the first word of one is given."""
    parts = text.split("\n\n")
    count = sum(bool(part.strip()) for part in parts)
    if not 1 <= nth_paragraph <= count:
        return False
    words = parts[nth_paragraph - 1].split()
    first = re.split(r"[.,?!'\"]", words[0].lstrip("'\""))[0] if words else ""
    return count == num_paragraphs and first.lower() == first_word.lower() != ""


# Content and format


def number_placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[[^\n\]]*\]", text)) >= num_placeholders


def postscript(text: str, postscript_marker: str) -> bool:
    spaced = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return bool(re.search(spaced.get(postscript_marker, re.escape(postscript_marker.lower())), text.lower()))


def number_bullet_lists(text: str, num_bullets: int) -> bool:
    lines = [line.lstrip() for line in text.splitlines()]
    return sum(bool(re.match(r"\*[^*]|-", line)) for line in lines) == num_bullets


def constrained_response(text: str) -> bool:
    return any(answer in text for answer in ANSWERS)


def number_highlighted_sections(text: str, num_highlights: int) -> bool:
    single, double = re.findall(r"\*([^\n*]*)\*", text), re.findall(r"\*\*([^\n*]*)\*\*", text)
    return sum(bool(part.strip()) for part in single + double) >= num_highlights


def multiple_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"{re.escape(section_spliter)}\s?\d+", text)) >= num_sections


def json_format(text: str) -> bool:
    text = text.strip()
    text = next((text.removeprefix(fence) for fence in FENCES if text.startswith(fence)), text)
    try:
        parse_json(text.removesuffix("```").strip())
    except ValueError:
        return False
    return True


def title(text: str) -> bool:
    return any(part.strip("<> ") for part in re.findall(r"<<[^\n]+>>", text))


# Combinations, beginnings and ends, case, punctuation


def repeat_prompt(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def two_responses(text: str) -> bool:
    """Two different answers, with ****** between them."""
    parts = [part.strip() for part in text.split("******")]
    if not all(parts[1:-1]):
        return False
    answers = [part for part in parts if part]
    return len(answers) == 2 and answers[0] != answers[1]


def end_checker(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text.startswith('"') and text.endswith('"')


def capital_word_frequency(text: str, capital_frequency: int, capital_relation: str) -> bool:
    return holds(sum(word.isupper() for word in SPOKEN.findall(text)), capital_relation, capital_frequency)


def english_capital(text: str) -> bool:
    return text.isupper()


def english_lowercase(text: str) -> bool:
    return text.islower()


def no_comma(text: str) -> bool:
    return "," not in text


INSTRUCTIONS = {
    "keywords:existence": Instruction(existence, {"keywords": list}),
    "keywords:frequency": Instruction(frequency, {"keyword": str, "frequency": int, "relation": str}),
    "keywords:forbidden_words": Instruction(forbidden_words, {"forbidden_words": list}),
    "keywords:letter_frequency": Instruction(
        letter_frequency, {"letter": str, "let_frequency": int, "let_relation": str}
    ),
    "length_constraints:number_sentences": Instruction(number_sentences, {"num_sentences": int, "relation": str}),
    "length_constraints:number_paragraphs": Instruction(number_paragraphs, {"num_paragraphs": int}),
    "length_constraints:number_words": Instruction(number_words, {"num_words": int, "relation": str}),
    "length_constraints:nth_paragraph_first_word": Instruction(
        nth_paragraph_first_word, {"num_paragraphs": int, "nth_paragraph": int, "first_word": str}
    ),
    "detectable_content:number_placeholders": Instruction(number_placeholders, {"num_placeholders": int}),
    "detectable_content:postscript": Instruction(postscript, {"postscript_marker": str}),
    "detectable_format:number_bullet_lists": Instruction(number_bullet_lists, {"num_bullets": int}),
    "detectable_format:constrained_response": Instruction(constrained_response),
    "detectable_format:number_highlighted_sections": Instruction(number_highlighted_sections, {"num_highlights": int}),
    "detectable_format:multiple_sections": Instruction(
        multiple_sections, {"section_spliter": str, "num_sections": int}
    ),
    "detectable_format:json_format": Instruction(json_format),
    "detectable_format:title": Instruction(title),
    "combination:two_responses": Instruction(two_responses),
    "combination:repeat_prompt": Instruction(repeat_prompt, {"prompt_to_repeat": str}),
    "startend:end_checker": Instruction(end_checker, {"end_phrase": str}),
    "startend:quotation": Instruction(quotation),
    "change_case:capital_word_frequency": Instruction(
        capital_word_frequency, {"capital_frequency": int, "capital_relation": str}
    ),
    "change_case:english_capital": Instruction(english_capital),
    "change_case:english_lowercase": Instruction(english_lowercase),
    "punctuation:no_comma": Instruction(no_comma),
}


def check(name: str, parameters: dict[str, Any], text: str) -> bool:
    """Returns whether a text follows an instruction, whose parameters `arguments` has checked. An empty one doesn't."""
    return bool(text.strip()) and INSTRUCTIONS[name].check(text, **parameters)


def arguments(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """Returns an instruction's parameters. Malformed where one is missing, or is of another type."""
    found = {}
    for key, kind in INSTRUCTIONS[name].parameters.items():
        value = given.get(key)
        if kind is int and type(value) is float and value.is_integer():  # as tables of Parquet have them
            value = int(value)
        texts = value if isinstance(value, list) else [value]
        is_text = bool(texts) and all(isinstance(one, str) and one for one in texts)
        if type(value) is not kind or not (kind is int or is_text):
            expected = {int: "a whole number", str: "a text", list: "a list of texts"}[kind]
            raise Malformed(f"{name}: {key} is {'missing' if value is None else quoted(value)}, and must be {expected}")
        if "relation" in key and value not in RELATIONS:
            raise Malformed(f"{name}: {key} is {quoted(value)}, and must be one of {', '.join(RELATIONS)}")
        found[key] = value
    return found
