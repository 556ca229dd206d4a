"""Checkpoints: what is saved comes back, whole or not at all, and what is damaged is said to be."""

import dataclasses
import resource
import shutil

import jax
import numpy as np
import pytest

from jaxgpt.config import Compute, Config, Model
from jaxgpt.errors import RunError, UserError
from jaxgpt.training import checkpoints
from jaxgpt.training.step import TrainState, init_state

pytestmark = pytest.mark.usefixtures("quickly_compiled")

MODEL = Model(layers=2, heads=2, width=16, context=8, vocabulary_size=50)
TOKENIZER = {"name": "characters", "characters": "ab\né漢\x00"}


@pytest.fixture(scope="module")
def state() -> TrainState:
    return jax.jit(lambda: init_state(Config(model=MODEL, compute=Compute(layers="scanned"))))()


@pytest.fixture(scope="module")
def saved(state, tmp_path_factory):
    """A run with a checkpoint of step 3; tests copy it before they damage it."""
    run = tmp_path_factory.mktemp("saved")
    checkpoints.save(run / "checkpoints", state._replace(step=state.step + 3), MODEL, TOKENIZER)
    return run


@pytest.fixture
def run(saved, tmp_path):
    """A copy of the saved run."""
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_what_was_saved_comes_back_bit_for_bit(state, saved):
    params, about = checkpoints.load_params(saved, MODEL)
    assert_same(params, state.params)
    assert jax.tree.structure(params) == jax.tree.structure(state.params)
    assert about == {"step": 3, "model": dataclasses.asdict(MODEL), "tokenizer": TOKENIZER}


def test_saving_leaves_the_state_in_use(state, saved):
    """A run goes on with it."""
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_a_model_without_a_vocabulary_size_takes_the_checkpoints(state, saved):
    params, _ = checkpoints.load_params(saved, dataclasses.replace(MODEL, vocabulary_size=0))
    assert_same(params, state.params)


def test_the_newest_checkpoint_is_read(state, run):
    later = jax.tree.map(lambda array: array + 1, state.params)
    where = checkpoints.save(run / "checkpoints", state._replace(params=later, step=state.step + 20), MODEL, TOKENIZER)
    assert where == run / "checkpoints" / "20"
    params, about = checkpoints.load_params(run, MODEL)
    assert about["step"] == 20
    assert_same(params, later)


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"layers": 3}, "layers is 2 there and 3 here"),
        ({"heads": 4}, "heads is 2 there and 4 here"),
        ({"width": 32, "context": 9}, "width is 16 there and 32 here, context is 8 there and 9 here"),
        ({"vocabulary_size": 51}, "vocabulary_size is 50 there and 51 here"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_with_what_differs(saved, other, difference):
    with pytest.raises(UserError, match=f"another model than the run's config.toml describes: {difference}$"):
        checkpoints.load_params(saved, dataclasses.replace(MODEL, **other))


# Missing


def test_a_run_without_checkpoints(tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint"):
        checkpoints.load_params(tmp_path, MODEL)


def test_a_run_that_was_killed_while_it_saved_its_first(run):
    """What is left then is a folder under a name that Orbax gives to what is not finished."""
    whole = run / "checkpoints" / "3"
    whole.rename(whole.with_name("3.orbax-checkpoint-tmp"))
    with pytest.raises(UserError, match="no checkpoint is whole"):
        checkpoints.load_params(run, MODEL)


def test_a_run_that_was_killed_while_it_saved_another(state, run):
    """The one before it is read."""
    half = run / "checkpoints" / "20.orbax-checkpoint-tmp"
    shutil.copytree(run / "checkpoints" / "3" / "params", half / "params")
    params, about = checkpoints.load_params(run, MODEL)
    assert about["step"] == 3
    assert_same(params, state.params)


# Damaged


def test_damage_to_any_file_is_noticed_or_harmless(state, saved, tmp_path, capfd):
    """Each file that is read, cut in half. Either it is an error, told in one line, or the parameters are the same."""
    parts = [path.relative_to(saved) for path in sorted(saved.rglob("*")) if path.is_file()]
    noticed = []
    for number, part in enumerate(parts):
        if part.parts[2] == "optimizer":  # which is not read
            continue
        run = tmp_path / str(number)
        shutil.copytree(saved, run)
        content = (saved / part).read_bytes()
        (run / part).write_bytes(content[: len(content) // 2])
        params, message = None, ""
        try:
            params, _ = checkpoints.load_params(run, MODEL)
        except UserError as error:
            message = str(error)
        if message:
            assert message.startswith(f"{run / 'checkpoints'}: the newest checkpoint is damaged (")
            assert message.endswith("). Restore it from a copy, or train anew")
            assert "\n" not in message
            noticed.append(part)
        else:
            assert_same(params, state.params)
    largest = max((part for part in parts if part.parts[2] == "params"), key=lambda part: (saved / part).stat().st_size)
    assert largest in noticed
    out, err = capfd.readouterr()
    assert out + err == ""  # Orbax's threads say nothing beside it


def test_a_file_that_is_gone_is_noticed(run):
    parameters = [path for path in (run / "checkpoints" / "3" / "params").rglob("*") if path.is_file()]
    max(parameters, key=lambda path: path.stat().st_size).unlink()
    with pytest.raises(UserError, match="the newest checkpoint is damaged"):
        checkpoints.load_params(run, MODEL)


# Where it can't be written


def test_a_disk_that_is_full_fails_the_run_and_leaves_the_older_checkpoint(state, run, capfd):
    """A limit on the size of files stands in for it: the system refuses to write on, as it does then."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(RunError, match=r"the checkpoint of step 20 could not be written: .*File too large"):
            checkpoints.save(run / "checkpoints", state._replace(step=state.step + 20), MODEL, TOKENIZER)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    out, err = capfd.readouterr()
    assert out + err == ""
    assert checkpoints.load_params(run, MODEL)[1]["step"] == 3


@pytest.mark.parametrize("folder", ["{tmp}/file/checkpoints", "/proc/checkpoints"])
def test_a_folder_that_cannot_be_made_fails_the_run(state, tmp_path, folder):
    (tmp_path / "file").write_text("")
    folder = folder.format(tmp=tmp_path)
    with pytest.raises(RunError, match=f"{folder}: the checkpoint of step 0 could not be written: "):
        checkpoints.save(tmp_path.joinpath(folder), state, MODEL, TOKENIZER)


def test_ctrl_c_while_saving_is_no_error_of_the_disk(state, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.ocp.CheckpointManager, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(tmp_path / "checkpoints", state, MODEL, TOKENIZER)
