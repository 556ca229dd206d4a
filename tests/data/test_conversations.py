"""Lines of JSON: each form of a conversation, of a comparison and of a problem, and each way to get it wrong."""

import gzip
import json

import pytest

from jaxgpt.data import conversations
from jaxgpt.data.conversations import Comparison, Problem
from jaxgpt.data.documents import Rows
from jaxgpt.errors import UserError

TURNS = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
WITH_SYSTEM = [{"role": "system", "content": "Be brief."}, *TURNS]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


FORMS = {
    "messages": ({"messages": WITH_SYSTEM}, WITH_SYSTEM),
    "developer": ({"messages": [{"role": "developer", "content": "Be brief."}, *TURNS]}, WITH_SYSTEM),
    "parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "2 + 2?"}]}, TURNS[1]]}, TURNS),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}], "id": "a"},
        TURNS,
    ),
    "ShareGPT with a system field": (
        {"system": "Be brief.", "conversation": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
        WITH_SYSTEM,
    ),
    "Alpaca": ({"instruction": "2 + 2?", "input": "", "output": "4"}, TURNS),
    "Alpaca with an input": (
        {"instruction": "Add.", "input": "2 and 2", "output": "4"},
        [user("Add.\n\n2 and 2"), assistant("4")],
    ),
    "prompt, response": ({"prompt": "2 + 2?", "response": "4", "system": "Be brief."}, WITH_SYSTEM),
    "prompt, completion": ({"prompt": "2 + 2?", "completion": "4"}, TURNS),
    "prompt, completion as messages": ({"prompt": [TURNS[0]], "completion": [TURNS[1]]}, TURNS),
    "question, answer": ({"question": "2 + 2?", "answer": "4"}, TURNS),
    "half a surrogate pair": (
        {"prompt": "2 + 2?", "response": "\ud800"},
        [user("2 + 2?"), assistant("\ufffd")],
    ),
}


@pytest.fixture
def lines(tmp_path):
    """A function that writes rows to a file, a line each, and returns its path."""

    def write(*rows):
        path = tmp_path / "a.jsonl"
        path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
        return path

    return write


@pytest.mark.parametrize("form", FORMS)
def test_every_form(form, lines):
    row, wanted = FORMS[form]
    ((where, found),) = conversations.read([lines(row)], Rows())
    assert found.messages == wanted
    assert where.endswith("a.jsonl, line 1")


def test_calls_of_tools_and_descriptions_are_kept(lines):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    said = [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "4"}]
    tools = [{"type": "function", "function": {"name": "add"}}]
    rows = [{"messages": said, "tools": tools}, {"messages": said, "tools": json.dumps(tools)}]
    for _, found in conversations.read([lines(*rows)], Rows()):
        assert found.messages[1] == {"role": "assistant", "content": "", "tool_calls": [call]}
        assert found.messages[2]["role"] == "tool"
        assert found.tools == tools


MALFORMED = {
    "no JSON": ("{", "Expecting property name"),
    "a list": ("[1]", "a list of 1 values, where an object is expected"),
    "no form": ({"text": "a"}, "none of the forms.*Its fields: text"),
    "no list": ({"messages": "a"}, "messages is 'a', and no list of messages"),
    "no messages": ({"messages": []}, "no messages"),
    "no assistant": ({"messages": [TURNS[0]]}, "no message of the assistant's"),
    "no object": ({"messages": ["a"]}, r"messages\[0\] is 'a', and no object with a role and a content"),
    "a role": ({"messages": [{"role": "me", "content": "a"}]}, r"the role of messages\[0\] is 'me', and should be one"),
    "no role": ({"messages": [{"content": "a"}]}, r"the role of messages\[0\] is None"),
    "a sender": ({"conversations": [{"from": 3, "value": "a"}]}, r"the from of conversations\[0\] is 3"),
    "no content": (
        {"messages": [TURNS[0], {"role": "assistant"}]},
        r"the content of messages\[1\] is None, and no text",
    ),
    "a number": ({"messages": [{"role": "user", "content": 4}]}, r"the content of messages\[0\] is 4, and no text"),
    "a picture": ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "no text, but 'image'"),
    "calls": ({"messages": [{"role": "assistant", "tool_calls": [1]}]}, r"the tool_calls of messages\[0\] are a list"),
    "tools": ({"messages": TURNS, "tools": {"a": 1}}, "tools is an object of 1 values, and no list of objects"),
    "instruction": ({"instruction": 3, "output": "4"}, "instruction is 3, and no text"),
    "output": ({"instruction": "a", "output": None}, "output is None, and no text"),
    "response": ({"prompt": "a", "response": 4}, "response is 4, and no text"),
    "a prompt's end": ({"prompt": TURNS, "completion": "a"}, "prompt ends with a message of the assistant"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_line_is_named_with_what_is_wrong(case, lines):
    row, wrong = MALFORMED[case]
    path = lines({"messages": TURNS}, row, {"messages": TURNS})
    with pytest.raises(UserError, match=rf"a\.jsonl, line 2: .*{wrong}"):
        list(conversations.read([path], Rows()))
    rows = Rows()
    assert len(list(conversations.read([path], rows, skip_bad=1))) == 2
    assert rows.bad == 1


def test_more_bad_lines_than_are_allowed(lines):
    with pytest.raises(UserError, match=r"more than --skip-bad 1 rows are bad. The first: .*line 1"):
        list(conversations.read([lines("{", "{", {"messages": TURNS})], Rows(), skip_bad=1))


def test_blank_lines_are_passed_over_and_counted_as_lines(lines):
    ((where, _),) = conversations.read([lines("", " ", {"messages": TURNS})], Rows())
    assert where.endswith("line 3")


def test_packed_files_and_a_last_line_without_an_end(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps({"messages": TURNS}).encode()))
    assert [found.messages for _, found in conversations.read([path], Rows())] == [TURNS]


def test_a_list_in_json_is_told_how_to_become_lines(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"messages": TURNS}]))
    with pytest.raises(UserError, match="a list in JSON, where an object is expected on each line"):
        list(conversations.read([path], Rows()))


def test_a_line_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(conversations, "LONGEST_LINE", 100)
    monkeypatch.setattr(conversations, "AT_ONCE", 64)
    (tmp_path / "a.jsonl").write_text("{" + " " * 1000)
    with pytest.raises(UserError, match="longer than 100 bytes"):
        list(conversations.read([tmp_path / "a.jsonl"], Rows()))


ASKED = [user("2 + 2?")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
        {"prompt": ASKED, "chosen": [assistant("4")], "rejected": [assistant("5")]},
        {"prompt": "2 + 2?", "chosen": [*ASKED, assistant("4")], "rejected": [*ASKED, assistant("5")]},
        {"chosen": [*ASKED, assistant("4")], "rejected": [*ASKED, assistant("5")]},
        {"prompt": "2 + 2?", "ranked": ["4", "5"]},
    ],
)
def test_every_form_of_a_comparison(row, lines):
    ((_, found),) = conversations.read_rankings([lines(row)], Rows())
    assert found == [Comparison(ASKED, [assistant("4")], [assistant("5")])]


def test_a_ranking_makes_all_its_pairs(lines):
    ((_, found),) = conversations.read_rankings([lines({"prompt": "a", "ranked": [*"wxyz"]})], Rows())
    texts = [(pair.chosen[0]["content"], pair.rejected[0]["content"]) for pair in found]
    assert texts == [("w", "x"), ("w", "y"), ("w", "z"), ("x", "y"), ("x", "z"), ("y", "z")]


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        ({"prompt": "a", "chosen": "b"}, "a comparison without a field 'rejected'"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        ({"prompt": "a", "ranked": ["b"]}, "no list of 2 to 64 completions"),
        ({"prompt": "a", "chosen": [user("b")], "rejected": "c"}, "doesn't begin with a message of the assistant's"),
        ({"chosen": [assistant("b")], "rejected": [assistant("c")]}, "behind a common beginning"),
        ({"chosen": "b", "rejected": "c"}, "chosen is 'b', and no list of messages"),
        ({"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("b")]}, "behind a common beginning"),
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, "prompt is 3, and no text"),
    ],
)
def test_a_malformed_comparison(row, wrong, lines):
    with pytest.raises(UserError, match=f"line 1: .*{wrong}"):
        list(conversations.read_rankings([lines(row)], Rows()))


def test_problems(lines):
    rows = [{"prompt": "2 + 2?", "answer": "4"}, {"question": "2 + 2?", "answer": 4}, {"prompt": ASKED, "answer": "4"}]
    assert [found for _, found in conversations.read_problems([lines(*rows)], Rows())] == [Problem(ASKED, "4")] * 3
    for answer in ("", None, True, ["4"]):
        with pytest.raises(UserError, match=r"line 1: answer is .*, and no text"):
            list(conversations.read_problems([lines({"prompt": "a", "answer": answer})], Rows()))
