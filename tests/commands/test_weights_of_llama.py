"""Every command on folders of Llama's relatives: begin with them, draw from them, score them, convert them."""

import dataclasses
from pathlib import Path

import pytest

from jaxgpt import writing
from jaxgpt.commands import cli
from jaxgpt.data import tokenizers
from jaxgpt.interop import detect_format, huggingface
from jaxgpt.options import settings
from jaxgpt.runs import checksums
from tests.interop.weights import LLAMA, assert_same_bits, random_params

pytestmark = pytest.mark.usefixtures("work")

MODEL = dataclasses.replace(LLAMA, vocabulary_size=256, context=16)
MODELS = {
    "llama": MODEL,
    "mistral": dataclasses.replace(MODEL, window=5),
    "mixtral": dataclasses.replace(MODEL, family="mixtral", experts=3),
    "qwen3": dataclasses.replace(MODEL, query_key_norm=True, head_width=6, tied=True),
}
TRAIN = ["--data.text=text.txt", "--training.steps=1", "--sampling.tokens=2", "--run.name=a", "--init-from=hf"]


def export(model=MODEL):
    params = random_params(model)
    with writing.new_folder(Path("hf")) as folder:
        huggingface.write_folder(folder, params, model, "float32", tokenizers.Bytes(), 1 << 30)
    return params


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "llama")) for name in MODELS])
def test_from_a_folder_to_a_fine_tuned_one(work, capsys, name):
    params = export(MODELS[name])
    assert cli.main(TRAIN) == 0
    assert "weights   from hf: a Hugging Face folder, float32, " in capsys.readouterr().out
    assert settings.read(Path("runs/a/config.toml")).model == MODELS[name]
    assert cli.main(["convert", "runs/a", "tuned"]) == 0
    tuned = detect_format.open_weights("tuned")
    assert tuned.model == MODELS[name]
    assert tuned.load().final_norm.scale.tolist() != params.final_norm.scale.tolist()
    assert cli.main(["convert", "hf", "runs/b"]) == 0
    assert_same_bits(detect_format.open_weights("runs/b").load(), params)


def test_a_folder_is_drawn_from_and_scored_as_a_run_of_its_weights_is(work, capsys):
    """The text goes past the context."""
    export(MODELS["mistral"])
    assert cli.main(["convert", "hf", "runs/b"]) == 0
    said = []
    for weights in ("hf", "runs/b"):
        capsys.readouterr()
        words = ["--prompt=ab", "--tokens=24", "--temperature=0.5", "--seed=3"]
        assert cli.main(["generate", "--run", weights, *words]) == 0
        assert cli.main(["evaluate", "--run", weights, "--data", "text.txt"]) == 0
        said.append(capsys.readouterr().out.rpartition(" (")[0])
    assert said[0] == said[1]
    assert said[0].startswith("ab")


def test_what_weights_do_not_say(work, fails):
    export()
    assert "--run hf: weights that don't say on which text they were trained. Name one with --data" in fails(
        "evaluate", "--run", "hf"
    )
    Path("hf/tokenizer.json").unlink()
    assert "--run hf: they don't say with which tokenizer they were trained" in fails("generate", "--run", "hf")
    assert "hf doesn't say with which tokenizer it was trained" in fails("convert", "hf", "runs/b")


def test_a_tokenizer_that_is_larger_than_the_model(work, fails):
    export(dataclasses.replace(MODEL, vocabulary_size=100))
    assert "--run hf: its tokenizer has 256 tokens, more than the model. Make" in fails("generate", "--run", "hf")
    assert "hf: its tokenizer has 256 tokens, more than the model. Name" in fails("convert", "hf", "runs/b")
    assert "is outside the vocabulary of 100 tokens" in fails(*TRAIN, "--data.tokenizer=bytes")
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.window=7"], "--model.window is 7 and they have 5"),
        (["--model.window=0"], "--model.window is 0 and they have 5"),
        (["--model.tied"], "--model.tied is True and they have False"),
        (["--model.kv-heads=4"], "--model.kv-heads is 4 and they have 2"),
        (["--model.rope-base=5"], "--model.rope-base is 5.0 and they have 10000.0"),
        (["--model.family=gpt2"], "--model.family is gpt2 and they have llama"),
    ],
)
def test_another_shape_than_the_weights(work, fails, words, message):
    export(MODELS["mistral"])
    assert message in fails(*TRAIN, *words)


def test_the_same_shape_in_other_words(work):
    export()
    given = ["--model.head-width=4", "--model.kv-heads=2", "--model.no-tied", "--model.router-z=0.5"]
    assert cli.main([*TRAIN, *given]) == 0
    assert settings.read(Path("runs/a/config.toml")).model == dataclasses.replace(MODEL, router_z=0.5)


def test_what_transformers_has_no_architecture_for(work, fails):
    export()
    assert cli.main(["convert", "hf", "runs/b"]) == 0
    path = Path("runs/b/checkpoints/0/about/metadata")
    path.write_text(path.read_text().replace('"logit_soft_cap": 0.0', '"logit_soft_cap": 30.0'))
    sums = Path("runs/b/checkpoints/0/SHA256SUMS")
    sums.unlink()
    checksums.write(sums.parent)
    assert "a model with --model.logit-soft-cap can't be written for transformers" in fails("convert", "runs/b", "out")
    assert not Path("out").exists()
