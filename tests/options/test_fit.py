"""`compute.fit`: the sizes that it takes, and which options it leaves alone."""

import dataclasses

import pytest

from jaxgpt.errors import UserError
from jaxgpt.options import fit, settings
from jaxgpt.options.config import Compute, Config, Objective


def asked(size: str = "24GB", **compute) -> Config:
    return Config(compute=Compute(fit=size, **compute))


@pytest.mark.parametrize(
    ("words", "size"),
    [("24GB", 24 * 10**9), ("22.5 gib", 45 * 2**29), ("300MB", 3 * 10**8), ("1MiB", 2**20), ("device", None)],
)
def test_a_size(words, size):
    assert fit.size(words) == size


@pytest.mark.parametrize("words", ["24", "GB", "0GB", "-1GB", "24 apples", "1e3GB", "24GB/s", "\x1b[31m"])
def test_what_is_no_size(words):
    with pytest.raises(
        UserError, match=r"--compute\.fit is .*, and must be device, or a size such as 24GB or 22\.5GiB"
    ):
        fit.check(asked(words))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (asked(memory_limit_gib=1.0), "--compute.memory-limit-gib: leave it away, since --compute.fit says"),
        (
            asked(fit_keeps=("training.steps",)),
            "--compute.fit-keeps training.steps: fit chooses among training.micro_b",
        ),
        (dataclasses.replace(asked(), objective=Objective(name="policy")), "--compute.fit: leave it away with --objec"),
    ],
)
def test_what_does_not_go_together(config, message):
    with pytest.raises(UserError) as refused:
        fit.check(config)
    assert str(refused.value).startswith(message)


def test_what_somebody_has_said_is_kept():
    """Given options are kept, but for "auto"; the split of a step is kept only if the command line gives it."""
    typed, in_file = {"compute.classifier_chunk", "training.steps"}, {"parallel.zero", "training.micro_batches"}
    kept = fit.keeping(asked(), typed, in_file).compute.fit_keeps
    assert kept == ("compute.classifier_chunk", "parallel.zero")
    assert fit.keeping(asked(), {"training.micro_batches"}, set()).compute.fit_keeps == ("training.micro_batches",)
    assert fit.keeping(asked(recompute="auto"), {"compute.recompute"}, set()).compute.fit_keeps == ()
    assert fit.keeping(asked(""), typed, in_file).compute.fit_keeps == ()


def test_a_resumed_run_keeps_what_it_kept():
    """Its config.toml says so, and the command line that resumes it may add to that."""
    resumed = fit.keeping(asked(fit_keeps=("parallel.zero",)), {"compute.recompute"}, set())
    assert resumed.compute.fit_keeps == ("compute.recompute", "parallel.zero")
    assert "compute.recompute" not in fit.free(resumed)


def test_without_fit_only_auto_is_free():
    assert fit.free(Config()) == ()
    assert fit.free(Config(compute=Compute(recompute="auto"))) == ("compute.recompute",)
    assert set(fit.free(asked())) == set(fit.FREE)


def test_the_options_in_words():
    changed = settings.changed(Config(), training=fit.split(Config(), 2), parallel={"zero": 1})
    assert fit.words(Config(), changed) == "--parallel.zero 1 --training.batch-size 2 --training.micro-batches 4"
