"""DPO and its relatives from the command line: they learn, resume without the reference, are sharded, and draw text."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from jaxgpt.commands import cli
from jaxgpt.data import chat_templates, tokenizers
from jaxgpt.evaluation.scoring import ScoringRequest, make_scorer
from jaxgpt.options import settings
from jaxgpt.options.config import Config
from jaxgpt.reports import page
from jaxgpt.reports.history import History
from jaxgpt.runs import checkpoints
from tests import comparison_runs, small_run
from tests.comparison_runs import params
from tests.nightly import nightly

STEPS, SAVED = 20, 10
OPTIONS = {
    "config": "dpo_quickstart",
    "training.steps": STEPS,
    "training.evaluate-every": 10,
    "training.micro-batches": 2,
    "objective.beta": 0.1,
    "optimizer.learning-rate": 0.01,
    "optimizer.warmup-steps": 5,
    "sampling.tokens": 8,
    "sampling.temperature": 0.0,
    "parallel.devices": 1,
}


def train(name, *more, **changes):
    return comparison_runs.train(OPTIONS, name, *more, **changes)


@pytest.fixture(scope="module", autouse=True)
def work(tmp_path_factory):
    with comparison_runs.in_folder(tmp_path_factory.mktemp("work")) as folder:
        yield folder


@pytest.fixture(scope="module")
def trained(work):
    return small_run.saved_at(SAVED, train, "dpo")


def answers_logp(run):
    """The log-probabilities of the held-out answers under a run's model, as multiple choice scores continuations."""
    lines = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()][9::10]
    template, tokenizer = chat_templates.built_in("chatml"), tokenizers.make("bytes", "")
    requests = []
    for line in lines:
        question = [{"role": "user", "content": line["prompt"]}]
        context = chat_templates.encode(question, template, tokenizer, add_generation_prompt=True).ids
        for answer in (line["chosen"], line["rejected"]):
            said = [*question, {"role": "assistant", "content": answer}]
            found = chat_templates.encode(said, template, tokenizer)
            ends = int(np.flatnonzero(found.mask)[-1]) + 1  # a line break follows, which isn't the assistant's
            requests.append(ScoringRequest(context.tolist(), found.ids[len(context) : ends].tolist()))
    model = settings.read_trained(Path("runs", run)).model
    found = checkpoints.find(Path("runs", run, "checkpoints"))
    trained = checkpoints.params_of(found)
    config = Config(model=checkpoints.model_of(found.about))
    assert config.model.width == model.width
    scores = make_scorer(config, 4)(trained, requests)
    lengths = np.array([len(request.completion) for request in requests]).reshape(-1, 2)
    return np.array([score.log_likelihood for score in scores]).reshape(-1, 2), lengths


def test_it_learns_which_answer_is_preferred(trained):
    first, last = (line for line in trained.metrics if line["step"] in (0, STEPS) and "val_loss" in line)
    assert first["val_loss"] == pytest.approx(np.log(2), rel=1e-6)
    assert first["val_margin"] == 0
    assert last["val_loss"] < 0.3
    assert last["val_accuracy"] == 1
    assert last["val_chosen_reward"] > last["val_rejected_reward"]
    assert last["val_margin"] == pytest.approx(last["val_chosen_reward"] - last["val_rejected_reward"], rel=1e-5)
    names = {"accuracy", "margin", "chosen_reward", "rejected_reward"}
    assert all(names <= line.keys() for line in trained.steps)
    assert "reference log-probabilities of 42 pairs" in trained.printed  # one line is a ranking of three
    assert "generate runs/dpo --chat" in trained.printed.splitlines()[-2]


FORMS = {
    "dpo": {},
    "ipo": {"objective_preference_loss": "square"},
    "simpo": {
        "objective_reference_free": True,
        "objective_length_normalised": True,
        "objective_beta": 2.0,
        "objective_margin": 0.5,
    },
}


@pytest.mark.parametrize("form", nightly(FORMS, every_time=list(FORMS)[-1:]))
def test_the_validation_loss_is_the_formula_of_the_paper(trained, form):
    """DPO's equation 7, IPO's equation 17, SimPO's equation 6, of log-probabilities that another program computes."""
    changes = {name: str(value) if value is not True else "True" for name, value in FORMS[form].items()}
    flags = [f"--{name.replace('_', '.', 1).replace('_', '-')}" for name, value in FORMS[form].items() if value is True]
    changes = {name: value for name, value in changes.items() if value != "True"}
    finished = trained if form == "dpo" else train(form, *flags, **changes)
    assert finished.status == 0, finished.errors
    (logp, lengths), (reference, _) = answers_logp(form), answers_logp("sft")
    beta = 0.1
    if form == "simpo":
        chosen, rejected = (2.0 * logp / lengths).T
        expected = np.mean(np.log1p(np.exp(-(chosen - rejected - 0.5))))
        assert not Path("runs/simpo/reference.json").exists()
    else:
        chosen, rejected = (logp - reference).T
        ratio = chosen - rejected
        dpo, ipo = np.log1p(np.exp(-beta * ratio)), (ratio - 1 / (2 * beta)) ** 2
        expected = np.mean(dpo if form == "dpo" else ipo)
    assert finished.validation[STEPS] == pytest.approx(expected, rel=1e-4)


def test_a_resumed_run_has_the_same_bits_and_needs_no_reference(trained):
    shutil.copytree(trained.folder, "runs/again")
    shutil.rmtree(f"runs/again/checkpoints/{STEPS}")
    Path("runs/sft").rename("runs/away")
    try:
        finished = train("again", "--resume")
    finally:
        Path("runs/away").rename("runs/sft")
    assert finished.status == 0, finished.errors
    assert "reference log-probabilities" not in finished.printed
    for one, other in zip(params("dpo"), params("again"), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("damage", nightly(["lost", "other"], every_time=["lost"]))
def test_a_lost_reference_is_computed_again(trained, damage):
    name = f"after_{damage}"
    shutil.copytree(trained.folder, f"runs/{name}")
    shutil.rmtree(f"runs/{name}/checkpoints/{STEPS}")
    path = Path("runs", name, "reference.json")
    if damage == "lost":
        path.unlink()
    else:
        path.write_text(path.read_text().replace("[[-", "[[-1", 1))
    finished = train(name, "--resume")
    assert finished.status == 0, finished.errors
    assert "reference log-probabilities of 42 pairs" in finished.printed
    assert path.read_text() == Path("runs/dpo/reference.json").read_text()
    for one, other in zip(params("dpo"), params(name), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("weights", ["gone", "others"])
def test_a_lost_reference_that_cannot_be_computed_again(trained, weights):
    name = f"without_{weights}"
    shutil.copytree(trained.folder, f"runs/{name}")
    Path("runs", name, "reference.json").unlink()
    Path("runs/sft").rename("runs/away")
    if weights == "others":
        shutil.copytree(trained.folder, "runs/sft")
    try:
        finished = train(name, "--resume")
    finally:
        shutil.rmtree("runs/sft", ignore_errors=True)
        Path("runs/away").rename("runs/sft")
    assert finished.status == 2
    assert "reference.json: the log-probabilities of the reference" in finished.errors
    assert "Restore the file from a copy" in finished.errors
    assert finished.errors.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_two_devices_do_what_one_does(trained, zero):
    finished = train(f"zero{zero}", parallel_devices=2, parallel_zero=zero, training_steps=5)
    assert finished.status == 0, finished.errors
    one = train(f"one{zero}", training_steps=5)
    for line, other in zip(one.steps, finished.steps, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-3, abs=1e-6)


@pytest.mark.slow
def test_adapters_are_trained_against_their_base(trained):
    finished = small_run.saved_at(SAVED, train, "adapters", lora_rank=4, lora_base="float32")
    assert finished.validation[0] == pytest.approx(np.log(2), rel=1e-6)
    assert finished.validation[STEPS] < 0.5
    shutil.rmtree(f"runs/adapters/checkpoints/{STEPS}")
    Path("runs/adapters/reference.json").unlink()
    before = finished.metrics[-1]
    resumed = train("adapters", "--resume", lora_rank=4, lora_base="float32")
    assert resumed.status == 0, resumed.errors
    assert resumed.metrics[-1]["val_loss"] == before["val_loss"]


def test_it_draws_text_as_any_model(trained, capsys):
    assert "--- sample after training ---" in trained.printed
    assert cli.main(["generate", "--run", "runs/dpo", "--prompt", "a", "--tokens", "2", "--temperature", "0"]) == 0
    assert len(capsys.readouterr().out) >= len("a") + 2


def test_the_report_names_its_curves(trained):
    shown = page.of_run(trained.folder, History(trained.folder / "metrics.jsonl").read_all())
    assert shown["loss_unit"] == "per pair"
    assert {"Pairs in the right order, %", "Reward of chosen answers"} <= shown["further"].keys()


def test_another_form_is_refused_on_resume(trained):
    shutil.copytree(trained.folder, "runs/free")
    finished = train("free", "--resume", "--objective.reference-free")
    assert finished.status == 2
    assert "--objective.reference-free was False and is True" in finished.errors
