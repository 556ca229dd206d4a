"""Advice after a run that failed names options that would change something."""

import re
from dataclasses import fields

import pytest

from jaxgpt.options.config import Compute, Config, Optimizer
from jaxgpt.training import advice


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("parameters", ["float32", "bfloat16"])
@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("step", [1, 1000])
def test_nothing_that_is_so_already(dtype, parameters, clip_norm, warmup, step):
    config = Config(
        compute=Compute(dtype=dtype, parameters=parameters),
        optimizer=Optimizer(clip_norm=clip_norm, warmup_steps=warmup),
    )
    text = advice.after_nonfinite(config, step)
    assert "--optimizer.learning-rate" in text
    for option, value in re.findall(r"--([a-z.-]+\.[a-z-]+) ([a-z0-9]+)", text):
        section, key = option.replace("-", "_").split(".")
        if value in ("float32", "1"):
            assert str(getattr(getattr(config, section), key)) != value
    assert ("--compute.dtype" in text) == (dtype != "float32")
    assert ("--compute.parameters" in text) == (parameters != "float32")
    assert ("a smaller --optimizer.clip-norm" in text) == (clip_norm > 0)
    assert ("gradients are not clipped" in text) == (clip_norm == 0)
    assert ("a longer --optimizer.warmup-steps" in text) == (warmup > 0 and step <= 20)


def test_every_option_that_is_advised_exists():
    config = Config(compute=Compute(dtype="bfloat16", parameters="bfloat16"), optimizer=Optimizer(clip_norm=0))
    for option in re.findall(r"--([a-z.-]+\.[a-z-]+)", advice.after_nonfinite(config, 1)):
        section, key = option.replace("-", "_").split(".")
        assert key in {field.name for field in fields(getattr(config, section))}
