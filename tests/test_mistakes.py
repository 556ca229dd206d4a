"""Commands that can't be followed: in what words they are refused, with status 2 and no folder left."""

import pytest

pytestmark = pytest.mark.usefixtures("quickly_compiled", "work")

TINY = ["--model.layers=1", "--model.heads=2", "--model.width=8", "--model.context=16", "--data.text=text.txt"]


# Mistakes in the words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["trian"],
            "error: trian: there is no such command; did you mean train? There are: train, prepare, generate, serve",
        ),
        (
            ["--config", "gpt2_142m"],
            "error: --config gpt2_142m: there is no such config; did you mean gpt2_124m? There",
        ),
        (["--config", "no/such.toml"], "error: --config no/such.toml: there is no such file"),
        (["--config", "quickstart.toml"], "there is no such file; did you mean --config quickstart?"),
        (["--config"], "error: --config needs a value"),
        (["gpt2_124m"], "error: gpt2_124m: there is no such command; did you mean --config gpt2_124m?"),
        (["--resume", "runs/x"], "--resume auto also begins one"),
        (
            ["generate", "--run", "x"],
            "x: not a run's folder (it has no config.toml). There is no run yet: python",
        ),
        (["report", "x"], "x: there is no such folder. There is no run yet: python run.py trains one"),
        (["prepare", "finweb-10B"], "'finweb-10B'; did you mean fineweb-10B? Data sets: tinyshakespeare"),
        (["prepare", "text.txt", "--output", "text.txt"], "--output text.txt is a file, where a folder is to be made"),
        (["prepare", "--verify", "."], ".: not a folder that run.py prepare made to its end (it has no manifest.json)"),
        (["gradcheck", "--config", "quikstart"], "did you mean quickstart?"),
        (["--optimizer.learning-rte", "1e-3"], "Unrecognized options: --optimizer.learning-rte, 1e-3"),
        (["--optimizer.learning-rte", "1e-3"], "Perhaps you meant: --optimizer.learning-rate FLOAT"),
        (["--optimizer.learning-rte=1e-3"], "--optimizer.learning-rate FLOAT"),
        (["--learning-rate", "1e-3"], "--optimizer.learning-rate FLOAT"),
        (["generate", "--run", "x", "--temprature", "1"], "--temperature FLOAT"),
        (["gradcheck", "--dtpye", "float32"], "--dtype {float64,float32,bfloat16}"),
        (["--training.steps"], "Missing value for argument '--training.steps'"),
        (["--training.steps", "many"], "Error parsing --training.steps"),
        (["--training.steps", "1.5"], "Error parsing --training.steps"),
        (["--optimizer.learning-rate", "high"], "Error parsing --optimizer.learning-rate"),
        (["--compute.dtype", "float16"], "invalid choice 'float16' for argument '--compute.dtype'"),
        (["--data.tokenizer", "gpt3"], "invalid choice 'gpt3' for argument '--data.tokenizer'"),
        (["generate"], "--run STR"),
        (["generate", "runs/x"], "Unrecognized options: runs/x"),
        (["--model.layers", "2", "stray"], "Unrecognized options: stray"),
    ],
)
def test_a_mistake_in_the_words(fails, words, message):
    assert message in fails(*words)


def test_a_mistake_in_a_config_file(fails, work):
    """The file, the table, the key, and the nearest one that there is."""
    (work / "mine.toml").write_text("[model]\nlayer = 2\n")
    assert fails("--config", "mine.toml") == "error: mine.toml: unknown key layer in [model]; did you mean layers?"


@pytest.mark.parametrize("value", ["5", "true", "1.0", '"1"'])
def test_a_choice_among_numbers(fails, work, value):
    (work / "mine.toml").write_text(f"[parallel]\nzero = {value}\n")
    assert "zero in [parallel] is " in (message := fails("--config", "mine.toml"))
    assert message.endswith(", and must be one of 0, 1, 2, 3")


def test_a_run_that_is_elsewhere(fails, work):
    (work / "runs/a/checkpoints/3").mkdir(parents=True)
    (work / "runs/a/config.toml").write_text("")
    (work / "b").mkdir()
    message = "--run {}: not a run's folder (it has no config.toml){}"
    for run, hint in {
        "a": "; did you mean runs/a?",
        "runs": ". In runs there are: a",
        "b": ". In runs there are: a",
        "runs/a/checkpoints/3": ". The run's folder is runs/a",
    }.items():
        assert fails("generate", "--run", run) == f"error: {message.format(run, hint)}"
    assert fails("report", "a") == "error: a: there is no such folder; did you mean runs/a?"
    assert fails("report", "b") == "error: b: not a run's folder (it has no metrics.jsonl). In runs there are: a"


# Values and texts that no run can use; none of them leaves a folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--training.sequence-length=17"],
            "--training.sequence-length is 17, and must be at most the model's context, 16",
        ),
        (["--model.width=7"], "--model.width is 7, and must be divisible by the number of heads, 2 (--model.heads)"),
        (["--optimizer.learning-rate=nan"], "--optimizer.learning-rate is nan, and must be greater than 0"),
        (["--optimizer.learning-rate=inf"], "--optimizer.learning-rate is inf, and must be finite"),
        (["--optimizer.learning-rate=-1"], "--optimizer.learning-rate is -1.0, and must be greater than 0"),
        (["--training.steps=0"], "--training.steps is 0, and must be greater than 0"),
        (["--training.seed=4294967296"], "--training.seed is 4294967296, and must be at most 2147483647"),
        (["--sampling.top-p=0"], "--sampling.top-p is 0.0, and must be above 0 and at most 1"),
        (["--data.text=text.tx"], "there is no text 'text.tx'"),
        (["--data.text=text.tx"], "did you mean text.txt?"),
        (["--data.text=empty.txt"], "empty.txt is empty"),
        (["--data.text=."], ". is a folder"),
        (["--data.text=a/photo.bin"], "a/photo.bin: a .bin file is taken for tokens, and "),
        (["--data.text=a/photo.bin"], "/a has no token files for validation: those have _val_ in their names"),
        (["--data.text=toke"], "or a folder of token files; did you mean tokens?"),
        (["--data.text=x/*.bin"], "there are no such files. python run.py prepare makes token files of text"),
        (["--data.text=latin1.txt"], "latin1.txt is not UTF-8 text: byte 0xe9 at offset 3"),
        (["--data.text=short.txt"], "the text has 16 tokens, and one sequence of length 16 needs 17"),
        (["--data.validation-fraction=0.001"], "the validation split has 1 tokens and needs at least 2"),
        (
            ["--model.vocabulary-size=100"],
            "--data.text text.txt: token 116 at position 0 is outside the vocabulary of 100",
        ),
        (["--run.prompt=é", "--model.vocabulary-size=128"], "--run.prompt: token 195 at position 0 is outside"),
        (["--run.prompt=é", "--data.tokenizer=characters"], "the character 'é' (U+00E9) at position 0 is unknown"),
        (["--data.text=fineweb-10B"], "--data.text fineweb-10B: these 10 billion tokens of web pages are not in data"),
        (["--data.mixture=a=1, b"], "'b' is not a source and its weight above 0"),
        (["--data.mixture=text.txt=0"], "'text.txt=0' is not a source and its weight above 0"),
    ],
)
def test_a_run_that_cannot_be(fails, work, words, message):
    (work / "empty.txt").write_text("")
    (work / "latin1.txt").write_bytes("café".encode("latin-1"))
    (work / "short.txt").write_text("eighteen letters__")
    for folder in ("a", "tokens"):
        (work / folder).mkdir()
    (work / "a/photo.bin").write_bytes(b"\xff\xd8")
    (work / "tokens/a_train_000001.bin").write_bytes(b"")
    assert message in fails(*TINY, *words)
    assert not (work / "runs").exists()


def test_the_recipe_whose_data_are_not_there(fails, work, monkeypatch):
    """One clear message, which ends with the command that gets them."""
    monkeypatch.setenv("JAXGPT_DATA", "elsewhere")
    message = fails("--config", "gpt2_124m_fineweb")
    assert message.endswith(
        "are not in elsewhere/fineweb-10B yet. Get them there by: python run.py prepare fineweb-10B"
    )
