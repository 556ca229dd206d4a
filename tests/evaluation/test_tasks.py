"""Questions from the rows of public files: the prompts, and what is refused."""

import json

import pytest

from jaxgpt.errors import UserError
from jaxgpt.evaluation import task_files
from jaxgpt.evaluation.tasks import TASKS, Question

HELLASWAG = {
    "ind": 4,
    "activity_label": "Removing ice from car",
    "ctx_a": "Then, the man writes over the snow covering the window of a car, and a woman wearing winter clothes "
    "smiles.",
    "ctx_b": "then",
    "ctx": "Then, the man writes over the snow covering the window of a car, and a woman wearing winter clothes "
    "smiles. then",
    "endings": [", the man adds wax.", ", [substeps] a person boards [title] a ski lift.", "[step] it  ends.", "x"],
    "label": "3",
}
HELLASWAG_CONTEXT = (
    "Removing ice from car: Then, the man writes over the snow covering the window of a car, and a woman wearing "
    "winter clothes smiles. "
)
MMLU = {
    "question": "Find the degree of the extension. ",
    "subject": "abstract_algebra",
    "choices": ["0", "4", "2", "6"],
    "answer": 1,
}
ARC = {
    "id": "Mercury_7",
    "question": {
        "stem": "Which is a mammal?",
        "choices": [{"text": "trout", "label": "1"}, {"text": "a dog", "label": "2"}, {"text": "ant", "label": "3"}],
    },
    "answerKey": "2",
}
ARC_OF_THE_HUB = {
    "question": "Which is a mammal?",
    "choices": {"text": ["trout", "a dog", "ant"], "label": ["1", "2", "3"]},
    "answerKey": "2",
}
PIQA = {"goal": "How do I open a jar?", "sol1": "Twist the lid.", "sol2": "Sing to it.", "label": 0}
WINOGRANDE = {
    "sentence": "Sarah was a better surgeon than Maria so _ always got the easier cases.",
    "option1": "Sarah",
    "option2": "Maria",
    "answer": "2",
}
OPENBOOKQA = {
    "question_stem": "The sun is responsible for",
    "choices": {"text": ["puppies learning tricks", "plants growing"], "label": ["A", "B"]},
    "answerKey": "B",
}
LAMBADA = {"text": "in my palm is a clear stone , and inside it is a small ivory statue . a guardian angel ."}


def same(context: str, choices: list[str], label: int) -> Question:
    return Question((context,) * len(choices), tuple(f" {choice}" for choice in choices), label)


EXPECTED = {
    "hellaswag": (
        HELLASWAG,
        same(
            HELLASWAG_CONTEXT + "Then",
            [", the man adds wax.", ", a person boards. a ski lift.", " it ends.", "x"],
            3,
        ),
    ),
    "hellaswag without its parts": (
        {key: value for key, value in HELLASWAG.items() if key not in ("ctx_a", "ctx_b")},
        same(
            HELLASWAG_CONTEXT + "then",
            [", the man adds wax.", ", a person boards. a ski lift.", " it ends.", "x"],
            3,
        ),
    ),
    "hellaswag_llmc": (HELLASWAG, same(HELLASWAG["ctx"], HELLASWAG["endings"], 3)),
    "mmlu": (
        MMLU,
        same(
            "The following are multiple choice questions (with answers) about abstract algebra.\n\nFind the degree of "
            "the extension.\nA. 0\nB. 4\nC. 2\nD. 6\nAnswer:",
            ["A", "B", "C", "D"],
            1,
        ),
    ),
    "mmlu with a letter": (
        {**MMLU, "answer": "B", "subject": None},
        same("Find the degree of the extension.\nA. 0\nB. 4\nC. 2\nD. 6\nAnswer:", ["A", "B", "C", "D"], 1),
    ),
    "arc_easy": (ARC, same("Question: Which is a mammal?\nAnswer:", ["trout", "a dog", "ant"], 1)),
    "arc_challenge": (ARC_OF_THE_HUB, same("Question: Which is a mammal?\nAnswer:", ["trout", "a dog", "ant"], 1)),
    "piqa": (PIQA, same("Question: How do I open a jar?\nAnswer:", ["Twist the lid.", "Sing to it."], 0)),
    "winogrande": (
        WINOGRANDE,
        Question(
            (
                "Sarah was a better surgeon than Maria so Sarah",
                "Sarah was a better surgeon than Maria so Maria",
            ),
            (" always got the easier cases.",) * 2,
            1,
        ),
    ),
    "openbookqa": (
        OPENBOOKQA,
        same("The sun is responsible for", ["puppies learning tricks", "plants growing"], 1),
    ),
    "lambada": (LAMBADA, same(LAMBADA["text"].removesuffix(" ."), ["."], 0)),
}


@pytest.mark.parametrize("case", EXPECTED)
def test_the_prompts(case):
    row, expected = EXPECTED[case]
    assert TASKS[case.split()[0]].question(row) == expected


HARNESS = {
    "hellaswag": ("hellaswag/hellaswag", HELLASWAG),
    "arc_easy": ("arc/arc_easy", ARC_OF_THE_HUB),
    "arc_challenge": ("arc/arc_challenge", ARC_OF_THE_HUB),
    "piqa": ("piqa/piqa", PIQA),
    "winogrande": ("winogrande/default", WINOGRANDE),
    "openbookqa": ("openbookqa/openbookqa", OPENBOOKQA),
    "mmlu": ("mmlu/default/mmlu_abstract_algebra", MMLU),
    "lambada": ("lambada/lambada_openai", LAMBADA),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # its own
@pytest.mark.parametrize("name", HARNESS)
def test_the_prompts_are_those_of_lm_eval(name):
    """Its own task files, rendered by its own code, without the data sets that they would download."""
    pytest.importorskip("lm_eval", reason="compares with lm_eval: pip install -e .[lm-eval]")
    from tests.evaluation import harness

    file, row = HARNESS[name]
    assert TASKS[name].question(row) == harness.question(file, row)


# Files


def written(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_labels_may_lie_beside(tmp_path):
    """PIQA and WinoGrande are published with a file of labels beside the questions."""
    (tmp_path / "valid-labels.lst").write_text("1\n0\n")
    path = written(tmp_path / "valid.jsonl", 2 * [{key: PIQA[key] for key in ("goal", "sol1", "sol2")}])
    assert [question.label for question in task_files.questions("piqa", path)] == [1, 0]
    (tmp_path / "valid-labels.lst").write_text("1\n")
    with pytest.raises(UserError, match="1 labels for 2 examples"):
        task_files.questions("piqa", path)


def test_mmlu_as_its_authors_published_it(tmp_path):
    """A folder of CSV files without headers; with shots, the first rows of the folder dev come before each question."""
    for split, answers in (("test", "AB"), ("dev", "CDA")):
        (tmp_path / split).mkdir()
        for subject in ("anatomy", "high_school_physics"):
            rows = [f'"{subject}, number {i}?",w,x,"y ""z""",v,{answer}\n' for i, answer in enumerate(answers)]
            (tmp_path / split / f"{subject}_{split}.csv").write_text("".join(rows))
    folder = str(tmp_path / "test")
    found = task_files.questions("mmlu", folder)
    assert [question.label for question in found] == [0, 1, 0, 1]
    heading = "The following are multiple choice questions (with answers) about high school physics.\n\n"
    choices = '\nA. w\nB. x\nC. y "z"\nD. v\nAnswer:'
    assert found[3].contexts[0] == f"{heading}high_school_physics, number 1?{choices}"
    shown = task_files.questions("mmlu", folder, shots=2)[3].contexts[0]
    assert shown == (
        f"{heading}high_school_physics, number 0?{choices} C\n\nhigh_school_physics, number 1?{choices} D\n\n"
        f"high_school_physics, number 1?{choices}"
    )
    one = task_files.questions("mmlu", f"{folder}/anatomy_test.csv")
    assert one == found[:2]
    with pytest.raises(UserError, match="of its subject, anatomy, there are 3 examples to show, and not 5"):
        task_files.questions("mmlu", folder, shots=5)


def test_parquet_and_downloads(tmp_path, monkeypatch):
    """The hub's client is asked for a task's file by its name; a file with too few examples is refused."""
    arrow = pytest.importorskip("pyarrow", reason="reads Parquet with pyarrow, which the data extra installs")
    hub = pytest.importorskip("huggingface_hub", reason="huggingface-hub comes with the data extra")
    from pyarrow import parquet

    parquet.write_table(arrow.Table.from_pylist(3 * [ARC_OF_THE_HUB]), tmp_path / "0000.parquet")
    assert task_files.questions("arc_easy", str(tmp_path / "0000.parquet")) == 3 * [EXPECTED["arc_easy"][1]]
    asked = []

    def download(repository, name, **options):
        asked.append((repository, name, options))
        return str(tmp_path / "0000.parquet")

    monkeypatch.setattr(hub, "hf_hub_download", download)
    with pytest.raises(UserError, match="of 3 examples, where the task arc_easy has 2,376"):
        task_files.questions("arc_easy", "")
    options = {"repo_type": "dataset", "revision": "refs/convert/parquet"}
    assert asked == [("allenai/ai2_arc", "ARC-Easy/test/0000.parquet", options)]
    parquet.write_table(arrow.Table.from_pylist(2_376 * [ARC_OF_THE_HUB]), tmp_path / "0000.parquet")
    assert len(task_files.questions("arc_easy", "")) == 2_376

    def unreachable(*arguments, **options):
        raise OSError("no network\nmore")

    monkeypatch.setattr(hub, "hf_hub_download", unreachable)
    with pytest.raises(UserError, match=r"can't be had from the Hugging Face hub \(no network\). Name a file"):
        task_files.questions("arc_easy", "")


ROW = "example 1: {}. Is it a file of the task"


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        ("piqa", "", "there are no examples in it"),
        ("piqa", "{}\n", "example 1: sol1 is missing"),
        ("piqa", json.dumps(PIQA) + "\nno json\n", "line 2 is not JSON"),
        ("piqa", "[1]\n", "line 1 is not a JSON object"),
        ("piqa", "[" * 100_000, "line 1 is not JSON"),
        ("piqa", json.dumps({**PIQA, "label": 2}), ROW.format("the right choice is number 2, counted from 0, of 2")),
        ("piqa", json.dumps({**PIQA, "label": True}), ROW.format("label is True, and must be a number")),
        ("piqa", json.dumps({**PIQA, "sol2": 5}), ROW.format("sol2 is 5, and must be a text")),
        ("hellaswag", json.dumps({**HELLASWAG, "label": ""}), ROW.format("label is missing")),
        ("hellaswag", json.dumps({**HELLASWAG, "endings": []}), ROW.format("endings is not a list of texts")),
        ("mmlu", json.dumps({**MMLU, "choices": ["a", "b"]}), ROW.format("there are 2 choices, and must be 4")),
        ("winogrande", json.dumps({**WINOGRANDE, "sentence": "none"}), ROW.format("the sentence has no blank (_)")),
        ("winogrande", json.dumps({**WINOGRANDE, "answer": ""}), ROW.format("answer is missing")),
        ("arc_easy", json.dumps({**ARC, "answerKey": "C"}), "answerKey 'C' is not among the choices' labels, 1, 2, 3"),
        ("arc_easy", json.dumps({**ARC, "question": {"stem": "?"}}), "question.choices is not a list of objects"),
        ("openbookqa", json.dumps({"question_stem": "x"}), "choices is missing, or not an object"),
        ("lambada", json.dumps({"text": "word"}), ROW.format("the question is empty")),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path, task, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError) as error:
        task_files.questions(task, str(tmp_path / "a.jsonl"))
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.jsonl", "can't be read (No such file or directory)"),
        ("none.txt", "not a kind of file that is read here"),
        ("empty", "a folder without CSV files"),
        ("a\0.jsonl", "can't be read"),
        ("latin.jsonl", "not UTF-8: byte 0xe9 at offset 10"),
        ("bad.csv", "row 2 has 1 fields, and 6 are expected"),
        ("bad.parquet", "bad.parquet: damaged (Parquet magic bytes not found"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="reads Parquet with pyarrow, which the data extra installs")
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe9"}\n')
    (tmp_path / "bad.csv").write_text("q,a,b,c,d,A\nq\n")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError) as error:
        task_files.questions("mmlu", f"{tmp_path}/{name}")
    assert message in str(error.value)
