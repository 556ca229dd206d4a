"""A run that an earlier version wrote is resumed, read, converted and shown by this one.

`compatibility/` has what commit e316edc made of `e316edc.toml` beside `text.txt`: two layers, 40 steps, checkpoints
after 20 and 40.
"""

import json
import shutil
from pathlib import Path

import pytest

from jaxgpt.commands import cli

WRITTEN = Path(__file__).parent / "compatibility"


@pytest.fixture
def old_run(tmp_path, monkeypatch):
    """The folder of the old run, in the current folder as it was then."""
    for name in ("text.txt", "e316edc.toml"):
        shutil.copy(WRITTEN / name, tmp_path)
    shutil.copytree(WRITTEN / "e316edc", tmp_path / "runs" / "e316edc")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "e316edc"


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_resumed_at_20_it_has_the_losses_of_then(old_run, capsys):
    then = metrics(old_run)
    shutil.rmtree(old_run / "checkpoints" / "40")
    assert cli.main(["--config", "e316edc.toml", "--resume"]) == 0
    assert "resuming after step 20" in capsys.readouterr().out
    now = metrics(old_run)
    assert [line["step"] for line in now] == [line["step"] for line in then]
    # A norm is less even than a loss: where a gradient is large, rounding has changed it by 1e-5 after 35 steps.
    for key, limit in {"loss": 1e-6, "val_loss": 1e-6, "grad_norm": 5e-5}.items():
        before, after = ([line[key] for line in lines if key in line] for lines in (then, now))
        assert len(before) >= 3  # validated at 0, 20 and 40
        assert after == pytest.approx(before, abs=limit * max(1, *before))


def test_it_is_generated_from_and_evaluated(old_run, capsys):
    assert cli.main(["generate", "--run", "runs/e316edc", "--tokens", "8", "--temperature", "0"]) == 0
    assert len(capsys.readouterr().out) > 8
    assert cli.main(["evaluate", "--run", "runs/e316edc", "--data", "text.txt", "--output", "figures.json"]) == 0
    figures = json.loads(Path("figures.json").read_text())
    assert any(4 < value < 5 for value in figures.values() if isinstance(value, float))


def test_it_is_converted_and_back(old_run):
    assert cli.main(["convert", "runs/e316edc", "exported"]) == 0
    config = json.loads(Path("exported/config.json").read_text())
    assert (config["n_layer"], config["n_head"], config["n_embd"], config["n_positions"]) == (2, 2, 16, 32)
    assert cli.main(["convert", "exported", "runs/again"]) == 0
    assert Path("runs/again/config.toml").is_file()


def test_it_is_reported(old_run):
    assert cli.main(["report", "runs/e316edc"]) == 0
    assert "e316edc" in (old_run / "report.html").read_text()
