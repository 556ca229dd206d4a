"""`--plan-for`: what it prints, that its command is one that runs, and what it refuses."""

import re
import shlex

import jax
import pytest

from jaxgpt.commands import cli, plan
from jaxgpt.options import command_line, settings
from jaxgpt.options.config import Config
from jaxgpt.training import step
from jaxgpt.training.device_memory import CARDS

SMALL = ["--config", "llama_tiny", "--model.vocabulary-size", "256", "--compute.recompute", "auto"]


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch):
    """Makes it an error to compile or to ask for a device; the environment says nothing of a card's memory."""

    def refuse(*_, **__):
        raise AssertionError("a plan needs no program and no device")

    monkeypatch.setattr(step, "compile_step", refuse)
    monkeypatch.setattr(jax, "devices", refuse)
    for name in ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)


def planned(capsys, *words: str) -> tuple[int, str]:
    status = cli.main(list(words))
    return status, capsys.readouterr().out


def pasted(printed: str) -> tuple[list[str], Config]:
    """Returns the last line's words, and the configuration that they make."""
    start, *words = shlex.split(printed.splitlines()[-1])
    assert [start, words.pop(0)] == ["python", "run.py"]
    name, rest = command_line.take(words, "--config")
    assert name
    defaults = cli.Train(name, options=settings.read_defaults(settings.find_config(name)))
    return words, command_line.read(cli.Train, rest, "", default=defaults).options


def memory(printed: str) -> dict[int, list[str]]:
    """Returns the cells of the table of memory, by stage."""
    table = printed.split("memory ")[1].split("network ")[0]
    return {int(row[0]): row[1:] for line in table.splitlines()[2:] if (row := line.split())[:1] != ["zero"] and row}


def test_a_model_of_eight_billion_parameters(capsys):
    status, printed = planned(capsys, "--config", "llama3_8b", "--plan-for", "h100:8")
    assert status == 0
    assert "8 x NVIDIA H100" in printed
    assert "8,030,261,248 parameters" in printed
    rows = memory(printed)
    assert sorted(rows) == [0, 1, 2, 3]
    assert all(len(row) == 5 for row in rows.values())
    numbers = {zero: [float(cell.strip("()").replace(",", "")) for cell in row] for zero, row in rows.items()}
    # 16 P bytes at stage 0 for masters, moments and gradients alone are 120 GiB; at stage 3 they are divided by 8.
    assert min(numbers[0]) > 16 * 8.03e9 / 2**30 > 4 * min(numbers[3]) > 0
    assert all(cell.startswith("(") for cell in rows[0])
    assert not rows[3][-1].startswith("(")
    words, config = pasted(printed)
    assert words[:2] == ["--config", "llama3_8b"]
    assert "--plan-for" not in words
    assert config.parallel.devices == 8
    assert config.parallel.zero >= 2


def test_the_step_sends_what_the_formula_says(capsys):
    """Each of 4 devices sends three quarters of the tensors' bytes, of an all-reduce twice that."""
    _, printed = planned(capsys, *SMALL, "--plan-for", "a100:4", "--model.width", "1024", "--compute.dtype", "bfloat16")
    parameters = int(re.findall(r"([\d,]+) parameters", printed)[0].replace(",", ""))
    sent = {int(row.split()[0]): row.split()[1:4] for row in printed.split("network ")[1].splitlines()[2:6]}
    gigabytes = parameters / 1e9
    assert sent[0] == [f"{gigabytes * 4 * 1.5:.2f}", "0.00", "0.00"]
    assert sent[1] == ["0.00", f"{gigabytes * 4 * 0.75:.2f}", f"{gigabytes * 2 * 0.75:.2f}"]


def test_what_fits_is_the_command_with_the_least_time(capsys):
    """A small model fits in any way: nothing is sharded, and nothing recomputed."""
    status, printed = planned(capsys, *SMALL, "--plan-for", "4090")
    assert status == 0
    words, config = pasted(printed)
    assert (config.parallel.zero, config.compute.recompute) == (0, "none")
    assert "--parallel.devices" not in words


def test_the_level_that_was_asked_for_is_kept_where_it_fits(capsys):
    _, printed = planned(capsys, *SMALL[:-1], "block", "--plan-for", "4090:2")
    assert pasted(printed)[1].compute.recompute == "block"


@pytest.mark.slow
def test_smaller_micro_batches_where_whole_ones_do_not_fit(capsys):
    words = [*SMALL, "--training.batch-size", "64", "--compute.memory-limit-gib", "0.06", "--plan-for", "h100:2"]
    status, printed = planned(capsys, *words)
    assert status == 0
    assert all(cell.startswith("(") for row in memory(printed).values() for cell in row)
    training = pasted(printed)[1].training
    assert training.batch_size < 64
    assert training.batch_size * training.micro_batches == 64


@pytest.mark.slow
def test_nothing_fits(capsys):
    status, printed = planned(capsys, *SMALL, "--compute.memory-limit-gib", "0.001", "--plan-for", "h100:2")
    assert status == 1
    assert "Nothing fits" in printed
    assert "python run.py" not in printed


def test_simulated_devices_share_the_machine(capsys, monkeypatch):
    monkeypatch.setattr(plan, "capacity", lambda _: plan.Capacity(8 * 2**30, "what is available"))
    _, printed = planned(capsys, *SMALL, "--plan-for", "cpu:4")
    assert "of 2.0, a device's share of what is available" in printed


def test_the_share_that_jax_takes(capsys, monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".5")
    _, printed = planned(capsys, *SMALL, "--plan-for", "h100")
    assert f"of {CARDS['h100'].memory / 2**31:.1f}, $XLA_PYTHON_CLIENT_MEM_FRACTION" in printed
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "half")
    assert cli.main([*SMALL, "--plan-for", "h100"]) == 2
    assert "must be a share such as 0.9" in capsys.readouterr().err


def test_fit_may_split_what_does_not_divide_among_the_devices(capsys):
    """8 x 2 sequences are 1 x 16 for 8 devices. A number of micro-batches on the command line stays."""
    words = ["--config", "gpt2_124m_fineweb", "--training.batch-size", "2"]
    words += ["--plan-for", "h100:8", "--compute.fit", "24GB"]
    status, printed = planned(capsys, *words)
    assert status == 0
    assert re.search(r"^ +\d+ x (8|16) sequences, recompute", printed, re.M)
    assert cli.main([*words, "--training.micro-batches", "8"]) == 2
    assert "--training.batch-size is 2, and must be divisible by the 8 devices" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ("h1000:8", "did you mean h100?"),
        ("h100:0", "must be DEVICE:COUNT"),
        ("h100:eight", "no such device"),
        ("h100:3", "must be divisible by the 3 devices"),
    ],
)
def test_mistakes(capsys, devices, message):
    assert cli.main([*SMALL, "--plan-for", devices]) == 2
    assert message in capsys.readouterr().err
