"""Commands with mistakes are refused with a helpful message, with status 2, and leave no folder."""

import re
from pathlib import Path

import pytest

from jaxgpt.commands import cli, train
from jaxgpt.commands.generate import Generate
from jaxgpt.options import command_line, help_page
from tests.small_run import TINY

pytestmark = pytest.mark.usefixtures("work")


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
        (["--resume", "runs/x"], "--resume runs/x: not a run's folder (it has no config.toml). There is no run yet"),
        (["--resume", "runs/x", "--config", "quickstart"], "which run goes on, and how: leave --config away"),
        (["--resume=runs/x", "--run.name", "y"], "which run goes on, and how: leave --run.name away"),
        (["--config", "gpt2"], "error: --config gpt2: there is no such config; did you mean gpt2_124m?"),
        (
            ["generate", "--run", "x"],
            "x: not a run's folder (it has no config.toml). There is no run yet: python",
        ),
        (["report", "x"], "x: there is no such folder. There is no run yet: python run.py trains one"),
        (["prepare", "finweb-10B"], "'finweb-10B'; did you mean fineweb-10B? Data sets: tinyshakespeare"),
        (["prepare", "text.txt", "--output", "text.txt"], "--output text.txt is a file, where a folder is to be made"),
        (["prepare", "--verify", "."], ".: not a folder that run.py prepare made to its end (it has no manifest.json)"),
        (["gradcheck", "--config", "quikstart"], "did you mean quickstart?"),
        (["--training.steps"], "error: --training.steps needs a value"),
        (["--data.text", "--training.steps", "3"], "error: --data.text needs a value"),
        (
            ["--config", "finetune", "--data.text", "text.txt"],
            "--config finetune goes on from a model: name it by --init",
        ),
        (["--config", ""], "error: --config needs a value"),
        (["--config", "GPT-2"], "there is no such config; did you mean gpt2_124m?"),
        (["--config", "gpt2.toml"], "there is no such file; did you mean --config gpt2_124m?"),
        (["gpt2"], "gpt2: there is no such command; did you mean --config gpt2_124m?"),
        (["help"], "help: there is no such command; did you mean --help?"),
        (["resume", "runs/x"], "resume: there is no such command; did you mean --resume runs/NAME?"),
        (["text.txt"], "text.txt: there is no such command; did you mean --data.text text.txt?"),
        (["x" * 5000], "there is no such command"),
        (["--training.steps", "many"], "Error parsing --training.steps"),
        (["--training.steps", "1.5"], "Error parsing --training.steps"),
        (["--optimizer.learning-rate", "high"], "Error parsing --optimizer.learning-rate"),
        (["--compute.dtype", "float16"], "invalid choice 'float16' for argument '--compute.dtype'"),
        (["--data.tokenizer", "gpt3"], "invalid choice 'gpt3' for argument '--data.tokenizer'"),
        (["--objective.name", "policy"], "error: --objective.name policy goes on from a model that was fine-tuned on"),
        (["--objective.name", "reward"], "error: --objective.name reward goes on from a model that was fine-tuned on"),
        (
            ["generate"],
            "name a run's folder: python run.py generate runs/NAME. There is no run yet: python run.py trains",
        ),
        (["serve", "--port", "80"], "name a run's folder: python run.py serve runs/NAME. There is no run yet"),
        (["generate", "runs/x"], "x: not a run's folder (it has no config.toml)"),
        (["generate", "--prompt", "a", "runs/x"], "runs/x: not a run's folder (it has no config.toml)"),
        (["generate", "--chat", "runs/x"], "runs/x: not a run's folder (it has no config.toml)"),
        (["generate", "--run=runs/x", "--prompt", "-5", "--stop", "a", "b"], "runs/x: not a run's folder"),
        (["generate", "runs/x", "The "], "The : no option takes this word. A value with spaces needs quotes; python"),
        (["--model.layers", "2", "stray"], "stray: no option takes this word. A value with spaces needs quotes"),
    ],
)
def test_a_mistake_in_the_words(fails, words, message):
    assert message in fails(*words)


def test_a_run_in_the_place_of_a_command_or_a_config(fails):
    folder = Path("runs/mine")
    folder.mkdir(parents=True)
    (folder / "config.toml").touch()
    assert "did you mean generate runs/mine, or --resume runs/mine to train on?" in fails("runs/mine")
    assert "did you mean runs/mine/config.toml?" in fails("--config", "runs/mine/")
    assert "did you mean --config runs/mine/config.toml?" in fails("runs/mine/config.toml")
    assert "give the folder that it is in, runs/mine" in fails("generate", "runs/mine/config.toml")
    assert "name a run's folder: python run.py generate runs/NAME. In runs there are: mine" in fails("generate")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        # mistyped
        ("--optimizer.learning-rte 1e-3", "--optimizer.learning-rate"),
        ("--optimizer.learning-rte=1e-3", "--optimizer.learning-rate"),
        ("--optimizer-learning-rate 1e-3", "--optimizer.learning-rate"),
        ("--evaluation.batch-siz 4", "--evaluation.batch-size"),
        ("--confg quickstart", "--config"),
        ("-steps 5", "--training.steps"),
        ("generate --run x --temprature 1", "--temperature"),
        ("generate --temprature 1", "--temperature"),  # before what is missing
        ("gradcheck --dtpye float32", "--dtype"),
        # without its section, or in another one
        ("--learning-rate 1e-3", "--optimizer.learning-rate"),
        ("--training.learning-rate 1e-3", "--optimizer.learning-rate"),
        ("--steps 5", "--training.steps"),
        ("--batch-size 4", "--training.batch-size or --evaluation.batch-size"),
        ("--batch_size=4", "--training.batch-size or --evaluation.batch-size"),
        ("--beta 0.9", "--objective.beta"),
        ("--beta-1 0.9", "--optimizer.beta1"),
        ("--warmup 10", "--optimizer.warmup-steps"),
        ("--no-report", "--run.no-report"),
        ("--no-run.report", "--run.no-report"),
        # as others call it
        ("--lr 1e-3", "--optimizer.learning-rate"),
        ("--optimizer.lr=1e-3", "--optimizer.learning-rate"),
        ("--wd 0.1", "--optimizer.weight-decay"),
        ("--grad_clip=1.0", "--optimizer.clip-norm"),
        ("--n-layer 4", "--model.layers"),
        ("--n_head=4", "--model.heads"),
        ("--model.n_embd=128", "--model.width"),
        ("--block-size 64", "--model.context"),
        ("--vocab-size 256", "--model.vocabulary-size"),
        ("--max_iters=2000", "--training.steps"),
        ("--warmup_iters=100", "--optimizer.warmup-steps"),
        ("--gradient_accumulation_steps=8", "--training.micro-batches"),
        ("--val_loss_every 250", "--training.evaluate-every"),
        ("--zero_stage 1", "--parallel.zero"),
        ("--out_dir=out", "--run.folder"),
        ("generate --run x --max_new_tokens=100", "--tokens"),
        ("generate --run x --num_samples 3", "--samples"),
    ],
)
def test_an_option_that_there_is_not(fails, typed, meant):
    words = typed.split()
    (word,) = (word.partition("=")[0] for word in words if word.startswith("-") and word not in ("--run", "x"))
    assert fails(*words) == f"error: {word}: there is no such option; did you mean {meant}?"


def test_options_that_there_are_not_are_all_said(fails):
    assert fails("--n_layer=4", "--training.steps=5", "--foo", "1", "--n_layer=4", "--dropout", "0.1") == (
        "error: --n_layer: there is no such option; did you mean --model.layers? "
        "--foo: there is no such option; python run.py --help lists all "
        "--dropout: there is no such option; did you mean --model.dropout?"
    )
    assert "python run.py prepare --help lists all" in fails("prepare", "text.txt", "--foo")


def test_what_others_call_an_option_leads_to_one_of_ours():
    """Each entry of the table, for one command or another."""
    known = {kind: list(command_line.names(kind)) for kind in (cli.Train, Generate)}
    for other in command_line.OTHERS:
        found = [name for names in known.values() for name in command_line.meant(f"--{other}", names)]
        assert any(command_line.OTHERS[other] in (name, name.rpartition(".")[2]) for name in found), other
    for other in command_line.OTHERS.keys() | command_line.ABSENT:
        assert not any(other in names for names in known.values()), other


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_options_of_a_command_are_those_of_its_help(capsys, monkeypatch, command):
    """No option is refused that the command's own parser would take."""
    kinds, page = [cli.Train], help_page.page
    monkeypatch.setattr(help_page, "page", lambda kind, *rest: kinds.append(kind) or page(kind, *rest))
    with pytest.raises(SystemExit):
        cli.main([command, command_line.ALL])
    shown = re.findall(r"^  ((?:-h, )?--[a-z].+?)(?:$| [A-Z{\[])", capsys.readouterr().out, re.MULTILINE)
    listed = {name for line in shown for name in re.findall(r"--([a-z][\w.-]*)", line)}
    assert listed == {*command_line.names(kinds[-1]), "help"}


@pytest.mark.parametrize(
    "words", [["--run.report=False"], ["--run.report", "false"], ["--run.no-report=1"], ["--run.report="]]
)
def test_a_switch_that_is_given_a_value(fails, words):
    option = words[0].partition("=")[0]
    message = f"error: {option} takes no value: --run.report is on, and --run.no-report is off"
    assert fails(*words) == message


def test_values_that_look_like_options(monkeypatch):
    configs = []
    monkeypatch.setattr(train, "train", configs.append)
    assert cli.main(["--run.note=--lr 3", "--run.prompt", "--- a -b", "--model.document-start", "-1"]) == 0
    assert (configs[0].run.note, configs[0].run.prompt, configs[0].model.document_start) == ("--lr 3", "--- a -b", -1)


def test_a_mistake_in_a_config_file(fails, work):
    """The file, the table, the key, and the nearest one that there is."""
    (work / "mine.toml").write_text("[model]\nlayer = 2\n")
    assert fails("--config", "mine.toml") == "error: mine.toml: unknown key layer in [model]; did you mean layers?"
    (work / "mine.toml").write_text("[training]\nlr = 0.1\n")
    message = "error: mine.toml: unknown key lr in [training]; did you mean learning_rate in [optimizer]?"
    assert fails("--config", "mine.toml") == message


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
        "runs/a/checkpoints": ". The run's folder is runs/a",
    }.items():
        assert fails("generate", "--run", run) == f"error: {message.format(run, hint)}"
    assert "runs/a/checkpoints/3: this checkpoint is not whole" in fails("generate", "--run", "runs/a/checkpoints/3")
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
        (["--data.text=x/*.bin"], "there are no such files. python run.py prepare SOURCE makes token files of text"),
        (["--data.text=latin1.txt"], "latin1.txt is not UTF-8: byte 0xe9 at offset 3"),
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
