"""Checkpoints on the disk: they come back whole or not at all, and damage is reported."""

import dataclasses
import os
import shutil

import jax
import numpy as np
import pytest

from jaxgpt.errors import UserError
from jaxgpt.models import blocks, gpt2, with_scalar
from jaxgpt.options.config import Checkpoint, Compute, Config, Model, Objective
from jaxgpt.runs import checkpoints, checksums, saving
from jaxgpt.training.state import TrainState, init_state

MODEL = Model(layers=2, heads=2, width=16, context=8, vocabulary_size=50)
CONFIG = Config(model=MODEL, compute=Compute(layers="scanned"))
ABOUT = {"configuration": {"model": dataclasses.asdict(MODEL)}, "tokenizer": {"characters": "ab\né漢\x00"}}


def save(run, state, step):
    with saving.Writer(run / "checkpoints", Checkpoint()) as writer:
        return writer.save_and_wait(state._replace(step=jax.numpy.int32(step)), ABOUT)


@pytest.fixture(scope="module")
def state() -> TrainState:
    """A train state of which no two parts are the same."""
    return distinct(CONFIG)


def distinct(config: Config) -> TrainState:
    made = jax.jit(lambda: init_state(config))()
    leaves, structure = jax.tree.flatten(made._replace(key=None))
    return jax.tree.unflatten(structure, [leaf + i for i, leaf in enumerate(leaves)])._replace(key=made.key)


@pytest.fixture(scope="module")
def saved(state, tmp_path_factory):
    """A run with a checkpoint of step 3; tests copy it before they damage it."""
    run = tmp_path_factory.mktemp("saved")
    save(run, state, 3)
    return run


@pytest.fixture
def run(saved, tmp_path):
    """A copy of the saved run."""
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_parameters_come_back_bit_for_bit(state, saved):
    params, found = checkpoints.load_params(saved, MODEL)
    assert_same(params, state.params)
    assert jax.tree.structure(params) == jax.tree.structure(state.params)
    assert {key: found.about[key] for key in (*ABOUT, "step")} == ABOUT | {"step": 3}
    assert found.path == saved / "checkpoints" / "3"
    assert found.damaged == []


def test_the_whole_state_comes_back_bit_for_bit(state, saved):
    """Moments, key, counts and spike windows too."""
    target = jax.eval_shape(lambda: init_state(CONFIG))
    restored = checkpoints.load_state(saved / "checkpoints" / "3", target)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert (jax.random.key_data(restored.key) == jax.random.key_data(state.key)).all()
    assert_same(restored._replace(key=None), state._replace(key=None, step=np.int32(3)))


def test_unrolled_and_scanned_runs_read_each_others(saved, tmp_path):
    """Layers are stacked on the disk."""
    unrolled = dataclasses.replace(CONFIG, compute=Compute(layers="unrolled"))
    apart = distinct(unrolled)
    assert not isinstance(apart.params.blocks, gpt2.Block)
    path = save(tmp_path, apart, 3)
    for config in (CONFIG, unrolled):
        restored = checkpoints.load_state(path, jax.eval_shape(lambda config=config: init_state(config)))
        assert isinstance(restored.params.blocks, gpt2.Block) == (config is CONFIG)
        for mine, theirs in zip((restored.params, *restored.moments), (apart.params, *apart.moments), strict=True):
            assert_same(blocks.stacked(mine), blocks.stacked(theirs))


def test_it_comes_back_where_the_target_lies(saved):
    """It has the target's shardings, whatever shardings it was saved with."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shapes = jax.eval_shape(lambda: init_state(CONFIG))
    restored = checkpoints.load_state(
        saved / "checkpoints" / "3", jax.tree.map(lambda shape: shape.update(sharding=sharding), shapes)
    )
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(restored.params))
    assert restored.key.sharding == sharding


def test_saving_leaves_the_state_in_use(state, saved):
    """A run goes on with it."""
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_a_model_without_a_vocabulary_size_takes_the_checkpoints(state, saved):
    params, _ = checkpoints.load_params(saved, dataclasses.replace(MODEL, vocabulary_size=0))
    assert_same(params, state.params)


def test_the_newest_checkpoint_is_read(state, run):
    later = jax.tree.map(lambda array: array + 1, state.params)
    assert save(run, state._replace(params=later), 20) == run / "checkpoints" / "20"
    params, found = checkpoints.load_params(run, MODEL)
    assert found.about["step"] == 20
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
    with pytest.raises(UserError, match="there is no whole checkpoint"):
        checkpoints.load_params(tmp_path, MODEL)


@pytest.mark.parametrize("name", ["3.orbax-checkpoint-tmp", "3"])
def test_a_run_that_was_killed_while_it_saved_its_first(run, name):
    """Such a run leaves a folder under orbax's name for unfinished ones, or, killed later, one without checksums."""
    (run / "checkpoints" / "3" / checksums.NAME).unlink()
    (run / "checkpoints" / "3").rename(run / "checkpoints" / name)
    with pytest.raises(UserError, match="there is no whole checkpoint"):
        checkpoints.load_params(run, MODEL)


def test_a_run_that_was_killed_while_it_saved_another(state, run):
    """The one before it is read."""
    half = run / "checkpoints" / "20.orbax-checkpoint-tmp"
    shutil.copytree(run / "checkpoints" / "3" / "params", half / "params")
    params, found = checkpoints.load_params(run, MODEL)
    assert found.about["step"] == 3
    assert_same(params, state.params)


# Damaged


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def files(checkpoint):
    return sorted(path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file())


@pytest.mark.parametrize("harm", [cut, flip, lambda path: path.unlink()], ids=["cut in half", "one bit", "removed"])
def test_damage_to_any_file_is_found(saved, tmp_path, harm):
    """The message names the file; damage to the list of checksums, and an added file, are found too."""
    checkpoint = saved / "checkpoints" / "3"
    names = files(checkpoint)
    assert len(names) > 10
    for number, name in enumerate(names):
        copy = shutil.copytree(checkpoint, tmp_path / str(number))
        assert checksums.damage(copy) == ""
        harm(copy / name)
        damage = checksums.damage(copy)
        assert damage
        assert str(name) in damage or name.name == checksums.NAME
    (copy := shutil.copytree(checkpoint, tmp_path / "more")).joinpath("params", "new").write_text("")
    assert checksums.damage(copy) == f"params/new is not in {checksums.NAME}"


def pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def endless(path):
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def elsewhere(path):
    """A link to what was there: the content is right."""
    path.rename(path.parents[1] / "moved")
    path.symlink_to(path.parents[1] / "moved")


@pytest.mark.parametrize("harm", [pipe, endless, elsewhere])
@pytest.mark.parametrize(
    "name", ["SHA256SUMS", "_CHECKPOINT_METADATA", "params/_METADATA", "about/metadata", "params/x"]
)
def test_what_is_no_file_is_damage(run, harm, name):
    """A link may lead anywhere, and a pipe may never end; this holds for reading only the parameters too."""
    if harm is elsewhere and name == "params/x":
        pytest.skip("there is nothing to move")
    harm(run / "checkpoints" / "3" / name)
    for parts in (None, ("params", "about")):
        with pytest.raises(UserError, match=r"not whole|there is no whole checkpoint"):
            checkpoints.find(run / "checkpoints", parts)


def test_a_list_of_checksums_that_is_too_large_is_not_read(run):
    with (run / "checkpoints" / "3" / checksums.NAME).open("r+b") as file:
        file.truncate(1 << 40)  # of which the disk has almost nothing
    with pytest.raises(UserError, match=r"3: this checkpoint is not whole .*1,099,511,627,776 bytes"):
        checkpoints.find(run / "checkpoints")


def largest(checkpoint, item):
    return max(
        (path for path in (checkpoint / item).rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )


def test_the_one_before_a_damaged_one_is_used_and_it_is_said(state, run):
    later = save(run, state._replace(params=jax.tree.map(lambda array: array + 1, state.params)), 20)
    flip(name := largest(later, "params"))
    params, found = checkpoints.load_params(run, MODEL)
    assert_same(params, state.params)
    (message,) = found.damaged
    assert message == (
        f"{later}: this checkpoint is not whole ({name.relative_to(later)} is not what was written); the one before "
        "it is used"
    )


def test_what_is_not_read_does_not_matter(state, run):
    """A model can be used whose optimizer state is damaged; training doesn't go on from it."""
    flip(largest(run / "checkpoints" / "3", "optimizer"))
    assert_same(checkpoints.load_params(run, MODEL)[0], state.params)
    with pytest.raises(UserError, match=r"3: this checkpoint is not whole \(optimizer/.*and there is no other that is"):
        checkpoints.find(run / "checkpoints")


def test_what_orbax_cannot_read_is_told_in_one_line(run, capfd):
    """Damage that its checksums agree with, as of a file that was never written right."""
    checkpoint = run / "checkpoints" / "3"
    cut(largest(checkpoint, "params"))
    checksums.write(checkpoint)
    with pytest.raises(UserError, match="3: this checkpoint can't be read") as raised:
        checkpoints.load_params(run, MODEL)
    assert "\n" not in str(raised.value)
    out, err = capfd.readouterr()
    assert out + err == ""  # orbax's threads say nothing beside it


@pytest.mark.parametrize("numpy", [False, True])
def test_a_policy_with_values_is_read_as_its_model(tmp_path, numpy):
    objective = Objective(name="policy", value_coefficient=0.5)
    config = dataclasses.replace(CONFIG, objective=objective)
    whole = distinct(config).params
    about = ABOUT | {"configuration": dataclasses.asdict(config)}
    checkpoints.save_params(tmp_path / "checkpoints" / "1", whole, about)
    found = checkpoints.find(tmp_path / "checkpoints")
    read = checkpoints.numpy_params_of(found, np.float32) if numpy else checkpoints.params_of(found)
    assert_same(read, with_scalar.model_of(whole))
    assert jax.tree.structure(read) == jax.tree.structure(with_scalar.model_of(whole))
