"""The whole way from random weights to an assistant, in a few steps each: every stage's run, figures and pictures."""

import json

import pytest

from benchmarks.assistant import all as everything
from benchmarks.assistant import dpo, measure, ppo, recipes, reward

pytest.importorskip("tokenizers", reason="the sums' tokenizer needs the extra data")
TINY = ("--shrink", "100")


def test_every_stage_comes_behind_what_it_needs():
    order = recipes.needed(["hacked", "grpo"])
    assert order == ["base", "sft", "reward", "hacked", "grpo"]
    for name in recipes.needed(list(recipes.RECIPES)):
        assert recipes.RECIPES[name].parent in ("", *recipes.needed([name])[:-1])


@pytest.mark.slow
def test_the_whole_way(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measure, "ASKED", 10)
    where = ["--folder", str(tmp_path / "runs"), "--output", str(tmp_path / "results"), *TINY]
    assert everything.main(where) == 0
    printed = capsys.readouterr().out
    assert f"--run {tmp_path}/runs/seed_0/grpo --chat --tokens 32" in printed.replace("\n", "")
    figures = json.loads((tmp_path / "results/assistant.json").read_text())
    stages = [row["stage"] for row in figures["rows"]]
    assert stages == ["base", "sft", "reward", "dpo", "ppo", "grpo"]
    assert (tmp_path / "results/assistant.png").read_bytes()[:4] == b"\x89PNG"

    # What is trained is kept, by the other scripts as well, which train the stages that there are not yet.
    before = {name: (tmp_path / f"runs/seed_0/{name}/metrics.jsonl").read_bytes() for name in stages}
    assert everything.main(where) == 0
    assert capsys.readouterr().out.count("is kept") == len(stages)
    for script, name in ((reward, "reward"), (dpo, "dpo"), (ppo, "ppo")):
        assert measure.main(script.__doc__, name, script.proof, script.draw, where) == 0
        assert (tmp_path / f"results/{name}.png").exists()
    assert before == {name: (tmp_path / f"runs/seed_0/{name}/metrics.jsonl").read_bytes() for name in stages}

    # Other options make other runs, which have to have another folder.
    assert everything.main([*where, "--shrink", "50"]) == 2
    assert "was trained with other options" in capsys.readouterr().err
