"""Options from defaults, TOML files and the command line: who overrides whom, what is refused and in what words."""

import ast
import dataclasses
import inspect
import itertools
import math
import tomllib
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.commands import cli, configuration, train
from jaxgpt.errors import UserError
from jaxgpt.options import checks, config
from jaxgpt.options import settings as options
from jaxgpt.options.config import Config

SECTIONS: dict[str, Any] = {field.name: field.default_factory for field in dataclasses.fields(Config)}
TEXT = st.text(st.characters(codec="utf-8"), max_size=20)


def values(kind: Any) -> st.SearchStrategy:
    """Values of an option's type; numbers that no check refuses are not asked for here."""
    if get_origin(kind) is tuple:
        return st.lists(values(get_args(kind)[0]), max_size=3).map(tuple)
    if get_origin(kind) is not None:
        return st.sampled_from(get_args(kind))
    finite = st.floats(allow_nan=False, allow_infinity=False)
    return {int: st.integers(-(2**63), 2**63 - 1), float: finite, str: TEXT, bool: st.booleans()}[kind]


def sections(kind: Any) -> st.SearchStrategy:
    return st.builds(kind, **{name: values(hint) for name, hint in get_type_hints(kind).items()})


CONFIGS = st.builds(Config, **{name: sections(kind) for name, kind in SECTIONS.items()})


def with_option(section: str, key: str, value: Any) -> Config:
    """The defaults but for one option."""
    part = dataclasses.replace(getattr(Config(), section), **{key: value})
    return dataclasses.replace(Config(), **{section: part})


@pytest.fixture
def toml(tmp_path):
    """A function that writes a TOML file and returns its path."""

    def write(text: str | bytes) -> Path:
        path = tmp_path / "mine.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.fixture
def trained(monkeypatch):
    """The configurations that `run.py` would have trained with, instead of training."""
    configs: list[Config] = []
    monkeypatch.setattr(train, "train", configs.append)
    monkeypatch.setattr(
        configuration, "with_weights", lambda config, given: config
    )  # looks at the weights, which aren't there
    return configs


# Writing and reading


@settings(max_examples=50)
@given(CONFIGS)
def test_what_is_written_reads_back_as_the_same(tmp_path_factory, configuration):
    """Any configuration survives the way through a file, bit for bit in its floats."""
    path = tmp_path_factory.getbasetemp() / "round-trip.toml"
    options.write(configuration, path)
    assert options.read(path) == configuration


def test_a_runs_config_names_the_versions_it_ran_on(tmp_path):
    path = tmp_path / "config.toml"
    options.write(Config(), path)
    versions = tomllib.loads(path.read_text())["versions"]
    assert {"jaxgpt", "python", "jax", "jaxlib", "numpy"} <= versions.keys()
    assert all(version[0].isdigit() for version in versions.values())


def test_an_empty_file_is_the_defaults(toml):
    assert options.read(toml("")) == Config()


def test_an_integer_serves_as_a_float(toml):
    clip_norm = options.read(toml("[optimizer]\nclip_norm = 2")).optimizer.clip_norm
    assert clip_norm == 2.0
    assert isinstance(clip_norm, float)


# Who overrides whom


def test_the_file_overrides_defaults_and_the_command_line_both(toml, trained):
    path = toml("[model]\nwidth = 24\nheads = 3\n[run]\nname = 'given'")
    assert cli.main(["--config", str(path), "--model.width", "48", "--data.text=x"]) == 0
    (used,) = trained
    assert (used.model.width, used.data.text) == (48, "x")
    assert (used.model.heads, used.run.name) == (3, "given")
    assert used.model.layers == Config().model.layers
    assert used.optimizer == Config().optimizer


@pytest.mark.parametrize(
    "words", [["--config", "gpt2_350m"], ["--config=gpt2_350m"], ["train", "--config", "gpt2_350m"]]
)
def test_config_by_name_also_names_the_run(trained, words):
    assert cli.main(words) == 0
    (used,) = trained
    assert (used.model.layers, used.run.name) == (24, "gpt2_350m")


def test_without_config_the_quickstart_is_trained(trained):
    assert cli.main([]) == 0
    assert trained[0] == dataclasses.replace(
        options.read(options.find_config("quickstart")), run=config.Run(name="quickstart")
    )


@pytest.mark.parametrize(
    ("section", "key"), [(name, key.name) for name, kind in SECTIONS.items() for key in dataclasses.fields(kind)]
)
def test_every_option_is_one_on_the_command_line(trained, section, key):
    """An option given there changes that option and nothing else. (A process's number means nothing without the
    others.)"""
    own = {"processes": 1, "process": -1, "coordinator": "node1:1", "kv_heads": 4, "rope_high_frequency": 8.25}
    own |= {"fit": "1GB", "fit_keeps": ("parallel.zero", "compute.recompute")}
    also = {"rank": ["--init-from", "weights"], "double_quantization": ["--lora.base", "nf4"]}.get(key, [])
    other: dict[Any, Any] = {int: 8, float: 0.25, str: "x", bool: True}
    kind = get_type_hints(SECTIONS[section])[key]
    several = get_origin(kind) is tuple
    value = (
        own.get(key, ("x", "y"))
        if several
        else get_args(kind)[-1]
        if get_origin(kind)
        else own.get(key, other.get(kind))
    )
    words = list(value) if several else [] if kind is bool else [str(value)]
    assert cli.main([options.option(section, key), *words, *also]) == 0
    assert cli.main(also) == 0
    changed, usual = trained
    if (section, key) == ("data", "text"):  # the run is named after it
        usual = dataclasses.replace(usual, run=dataclasses.replace(usual.run, name="quickstart-x"))
    expected = dataclasses.replace(getattr(usual, section), **{key: value})
    assert changed == dataclasses.replace(usual, **{section: expected})


# Files that are refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[modle]\nlayers = 2", r"unknown table \[modle\]; did you mean model\?"),
        ("[zzz]\nlayers = 2", r"unknown table \[zzz\]\.$"),
        ("layers = 2", r"unknown table \[layers\]"),
        ("model = 2", r"unknown table \[model\]"),
        ("[model]\nlayer = 2", r"unknown key layer in \[model\]; did you mean layers\?"),
        (
            "[optimizer]\nlearning-rate = 1e-3",
            r"unknown key learning-rate in \[optimizer\]; did you mean learning_rate\?",
        ),
        ("[model]\nlayers = '2'", r"layers in \[model\] is '2', and must be of type int"),
        ("[model]\nlayers = 2.0", r"layers in \[model\] is 2.0, and must be of type int"),
        ("[model]\nlayers = true", r"layers in \[model\] is True, and must be of type int"),
        ("[optimizer]\nepsilon = '1'", r"epsilon in \[optimizer\] is '1', and must be of type float"),
        ("[optimizer]\nepsilon = true", r"epsilon in \[optimizer\] is True, and must be of type float"),
        ("[run]\noverwrite = 1", r"overwrite in \[run\] is 1, and must be of type bool"),
        ("[run]\nname = 1", r"name in \[run\] is 1, and must be of type str"),
        ("[data]\ntokenizer = 'gpt3'", r"tokenizer in \[data\] is 'gpt3', and must be one of gpt2, characters, bytes"),
        ("[compute]\ndtype = ['float32']", r"dtype in \[compute\] is a list of 1 values, and must be one of"),
        ("[model\nlayers = 2", "not a TOML file"),
        ("[model]\nlayers = 2\nlayers = 3", "not a TOML file"),
        (b"[run]\nname = '\xff'", "not a TOML file"),
    ],
)
def test_a_wrong_file_is_refused_with_its_path_and_what_is_wrong(toml, text, message):
    path = toml(text)
    with pytest.raises(UserError, match=message) as raised:
        options.read(path)
    assert str(raised.value).startswith(f"{path}: ")


def test_a_name_without_a_config_gets_the_nearest_one():
    with pytest.raises(UserError, match=r"did you mean gpt2_124m\?") as raised:
        options.find_config("gpt2_142m")
    assert all(name in str(raised.value) for name in options.config_names())


def test_a_path_without_a_file_is_called_that(tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        options.find_config(str(tmp_path / "mine.toml"))


# Values that are refused

NOT_POSITIVE = [
    ("evaluation", "batch_size", 0),
    ("model", "layers", 0),
    ("model", "heads", 0),
    ("model", "width", 0),
    ("model", "context", -1),
    ("model", "norm_epsilon", 0.0),
    ("model", "rope_base", 0.0),
    ("model", "rope_factor", 0.0),
    ("model", "rope_low_frequency", 0.0),
    ("model", "rope_original_context", 0),
    ("model", "experts_per_token", 0),
    ("lora", "alpha", 0.0),
    ("compute", "classifier_chunk", 0),
    ("compute", "attention_block", 0),
    ("compute", "fp8_history", 0),
    ("training", "steps", 0),
    ("training", "batch_size", 0),
    ("training", "micro_batches", 0),
    ("training", "stop_after_nonfinite", 0),
    ("optimizer", "learning_rate", 0.0),
    ("optimizer", "epsilon", 0.0),
    ("checkpoint", "keep_last", 0),
    ("objective", "beta", 0.0),
    ("objective", "clip", 0.0),
    ("objective", "program_seconds", 0.0),
    ("objective", "program_memory_mib", 0),
    *(("rollouts", key, 0) for key in ("answers", "tokens", "minibatches", "epochs")),
]
NEGATIVE = [
    ("model", "vocabulary_size", -1),
    ("model", "kv_heads", -1),
    ("model", "head_width", -1),
    ("model", "feed_forward", -1),
    ("model", "window", -1),
    ("model", "logit_soft_cap", -1.0),
    ("model", "experts", -1),
    ("model", "router_balance", -0.1),
    ("model", "router_z", -0.1),
    ("lora", "rank", -1),
    *(("objective", key, -0.1) for key in ("centre", "margin", "clip_above", "value_clip")),
    *(("objective", f"{key}_coefficient", -0.1) for key in ("kl", "entropy", "value")),
    *(("objective", key, -0.1) for key in ("kl_penalty", "kl_target")),
    ("compute", "memory_limit_gib", -0.1),
    ("compute", "fp8_error_every", -1),
    ("data", "skip_bad", -1),
    ("parallel", "devices", -1),
    ("parallel", "processes", -1),
    ("training", "sequence_length", -1),
    ("training", "seed", -1),
    ("training", "evaluate_every", -1),
    ("training", "patience", -1),
    ("evaluation", "every", -1),
    ("evaluation", "limit", -1),
    ("training", "evaluation_batches", -1),
    ("optimizer", "muon_learning_rate", -0.1),
    ("optimizer", "warmup_steps", -1),
    ("optimizer", "final_fraction", -0.1),
    ("optimizer", "weight_decay", -0.1),
    ("optimizer", "clip_norm", -1.0),
    ("sampling", "tokens", -1),
    ("sampling", "temperature", -0.1),
    ("sampling", "top_k", -1),
    ("checkpoint", "every_steps", -1),
    ("checkpoint", "every_minutes", -0.1),
    ("checkpoint", "keep_every", -1),
    ("checkpoint", "stop_minutes_before_end", -1.0),
    ("run", "sample_every", -1),
]
OTHERS = [
    ("model", "width", 100, "divisible by the number of heads, 12"),
    ("model", "kv_heads", 5, "a divisor of the number of heads, 12"),
    ("model", "dropout", 1.0, "at least 0 and below 1"),
    ("model", "dropout", -0.1, "at least 0 and below 1"),
    ("model", "rope_high_frequency", 1.0, "above --model.rope-low-frequency, 1.0"),
    ("objective", "completions", 1, "at least 2"),
    ("objective", "label_smoothing", 0.5, "at least 0 and below 0.5"),
    ("objective", "discount", 1.1, "at least 0 and at most 1"),
    ("objective", "advantage_decay", -0.1, "at least 0 and at most 1"),
    ("training", "sequence_length", 1025, "at most the model's context, 1024"),
    ("compute", "fp8_history", 4097, "at most 4096"),
    ("training", "steps", 2**31, "at most 2147483647"),
    ("training", "seed", 2**31, "at most 2147483647"),
    ("parallel", "process", 0, "left away where --parallel.processes is not given, or 1"),
    ("data", "validation_fraction", 0.0, "between 0 and 1"),
    ("data", "validation_fraction", 1.0, "between 0 and 1"),
    ("optimizer", "beta1", 1.0, "at least 0 and below 1"),
    ("optimizer", "beta1", -0.1, "at least 0 and below 1"),
    ("optimizer", "beta2", 1.0, "at least 0 and below 1"),
    ("optimizer", "momentum", 1.0, "at least 0 and below 1"),
    ("optimizer", "momentum", -0.1, "at least 0 and below 1"),
    ("optimizer", "final_fraction", 1.5, "at most 1"),
    ("training", "loss_spike_z", -1.0, "at least 0, and below 11.27 to skip any step"),
    ("training", "grad_norm_spike_z", 11.3, "at least 0, and below 11.27 to skip any step"),
    ("sampling", "top_p", 0.0, "above 0 and at most 1"),
    ("sampling", "top_p", 1.1, "above 0 and at most 1"),
    ("sampling", "min_p", -0.1, "at least 0 and at most 1"),
    ("sampling", "min_p", 1.1, "at least 0 and at most 1"),
    ("sampling", "repetition_penalty", 0.0, "greater than 0"),
]
REFUSED = [
    *((*case, "greater than 0") for case in NOT_POSITIVE),
    *((*case, "0 or more") for case in NEGATIVE),
    *OTHERS,
]
FLOATS = [(name, key) for name, kind in SECTIONS.items() for key, hint in get_type_hints(kind).items() if hint is float]
NUMBERS = {
    (name, key) for name, kind in SECTIONS.items() for key, hint in get_type_hints(kind).items() if hint in (int, float)
}


@pytest.mark.parametrize(("section", "key", "value", "requirement"), REFUSED)
def test_a_value_that_no_run_could_use_is_refused(section, key, value, requirement):
    """The message has the option as one writes it, the value, and what would do."""
    with pytest.raises(UserError) as raised:
        checks.check(with_option(section, key, value))
    message = str(raised.value)
    assert message.startswith(f"{options.option(section, key)} is {value}, and must be {requirement}")


def test_every_number_has_a_check():
    # What a run fills in by itself, and no person gives, is checked beside.
    assert {(section, key) for section, key, *_ in REFUSED} == NUMBERS - {("model", "document_start")}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("section", "key"), FLOATS)
def test_no_float_may_be_nan_or_infinite(section, key, value):
    with pytest.raises(UserError, match=options.option(section, key)):
        checks.check(with_option(section, key, value))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("training", "sequence_length", 1024),
        ("training", "seed", 2**31 - 1),
        ("training", "evaluate_every", 0),
        ("optimizer", "beta1", 0.0),
        ("optimizer", "momentum", 0.0),
        ("optimizer", "weight_decay", 0.0),
        ("optimizer", "clip_norm", 0.0),
        ("optimizer", "final_fraction", 1.0),
        ("sampling", "temperature", 0.0),
        ("sampling", "top_p", 1.0),
        ("sampling", "min_p", 1.0),
        ("sampling", "tokens", 0),
    ],
)
def test_values_at_the_edge_of_what_is_allowed_pass(section, key, value):
    checks.check(with_option(section, key, value))


# Meanings


def test_every_option_has_its_meaning_in_its_source():
    """Each field of each class of options is followed by a docstring, which --help shows."""
    for kind in SECTIONS.values():
        (tree,) = ast.parse(inspect.getsource(kind)).body
        assert isinstance(tree, ast.ClassDef)
        body = tree.body
        documented = {
            field.target.id
            for field, text in itertools.pairwise(body)
            if isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
            and str(text.value.value).strip()
        }
        assert documented == {field.name for field in dataclasses.fields(kind)}


def test_differences_of_what_a_run_saved_and_what_is_asked():
    """JSON makes lists of tuples. An option that did not exist when the run was saved had its default."""
    saved = dataclasses.asdict(Config())
    saved["sampling"]["stop"] = []
    assert options.differences(saved, Config()) == []
    del saved["model"]["family"], saved["evaluation"]
    saved["model"] |= {"layers": 3, "no_more": 1}
    assert options.differences(saved, Config()) == [("model", "layers", 3, 12)]
    asked = Config(model=config.Model(layers=3, family="llama"), evaluation=config.Evaluation(limit=5))
    found = options.differences(saved, asked)
    assert found == [("model", "family", "gpt2", "llama"), ("evaluation", "limit", 0, 5)]
    assert [one.option for one in found] == ["--model.family", "--evaluation.limit"]
