"""Writing checkpoints: when, which are kept, and what happens where it fails."""

import resource
import time

import jax
import pytest

from jaxgpt.errors import RunError
from jaxgpt.options.config import Checkpoint, Config, Model
from jaxgpt.runs import checkpoints, checksums, saving
from jaxgpt.runs.saving import Writer
from jaxgpt.training.state import init_state

MODEL = Model(layers=1, heads=1, width=8, context=8, vocabulary_size=50)


@pytest.fixture(scope="module")
def initial():
    return jax.jit(lambda: init_state(Config(model=MODEL)))()


@pytest.fixture
def state(initial):
    """A function that makes a state after so many steps."""
    return lambda step: initial._replace(step=jax.numpy.int32(step))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


@pytest.fixture
def slow(monkeypatch):
    """Makes each checkpoint take another half second in the background."""
    write = checksums.write

    def wait_and_write(path):
        time.sleep(0.5)
        write(path)

    monkeypatch.setattr(checksums, "write", wait_and_write)


@pytest.mark.parametrize(
    ("steps", "last", "every", "expected"),
    [
        ([], 2, 0, set()),
        ([10], 2, 0, {10}),
        ([10, 20, 30], 2, 0, {20, 30}),
        ([10, 20, 30, 40, 50, 60], 1, 20, {20, 40, 60}),
        ([7, 14, 21, 28, 35, 42], 1, 20, {21, 42}),  # the first at or after 20 and 40
        ([5, 99, 100, 199, 201], 2, 100, {100, 199, 201}),
        ([90, 350], 1, 100, {350}),
    ],
)
def test_which_are_kept(steps, last, every, expected):
    assert saving.kept(steps, last, every) == expected
    remaining = sorted(expected)
    assert saving.kept(remaining, last, every) == expected  # deleting the others makes no further one go


def test_a_series_of_checkpoints_leaves_those_to_be_kept(state, folder):
    with Writer(folder, Checkpoint(keep_last=2, keep_every=4)) as writer:
        for step in range(1, 8):
            writer.save(state(step), {})
        assert writer.problem == ""
    assert checkpoints.whole_steps(folder) == [4, 6, 7]
    assert {path.name for path in folder.iterdir()} == {"4", "6", "7"}
    for step in (4, 6, 7):
        assert checksums.damage(folder / str(step)) == ""


def test_what_is_saved_may_be_overwritten_at_once(initial, folder, slow):
    """The next step donates its state while the file is still being written."""
    advance = jax.jit(lambda params: jax.tree.map(lambda leaf: leaf + 1, params), donate_argnums=0)
    params = jax.tree.map(lambda leaf: leaf + 0, initial.params)
    with Writer(folder, Checkpoint()) as writer:
        writer.save(initial._replace(params=params), {})
        for _ in range(5):
            params = advance(params)
    target = jax.eval_shape(lambda: init_state(Config(model=MODEL)))
    restored = checkpoints.load_state(folder / "0", target).params
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(initial.params), strict=True))


def test_it_is_written_while_training_goes_on(state, folder, slow):
    with Writer(folder, Checkpoint(every_steps=2, every_minutes=0)) as writer:
        assert [writer.due(step) for step in (1, 2)] == [False, True]
        writer.save(state(2), {})
        assert not writer.due(4)  # the last is not finished
        assert checkpoints.whole_steps(folder) == []
        writer._wait()
        assert checkpoints.whole_steps(folder) == [2]
        assert writer.due(5)  # made up for
        writer.save(state(5), {})
        assert not writer.due(5)


def test_due_by_the_clock(state, folder, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(saving.time, "monotonic", lambda: now[0])
    writer = Writer(folder, Checkpoint(every_steps=0, every_minutes=0.5))
    assert not writer.due(1)
    now[0] += 30
    assert writer.due(2)
    assert not Writer(folder, Checkpoint(every_steps=0, every_minutes=0)).due(2)


def test_a_step_is_not_saved_twice(state, folder):
    with Writer(folder, Checkpoint()) as writer:
        path = writer.save_and_wait(state(3), {})
        before = (path / checksums.NAME).stat().st_mtime_ns
        assert writer.save_and_wait(state(3), {}) == path
        assert (path / checksums.NAME).stat().st_mtime_ns == before


def test_one_that_was_not_finished_is_written_anew(state, folder):
    (folder / "3" / "params").mkdir(parents=True)
    with Writer(folder, Checkpoint()) as writer:
        writer.save_and_wait(state(3), {})
    assert checkpoints.whole_steps(folder) == [3]


# Where it can't be written


@pytest.fixture
def small_files():
    """A limit on the size of files stands in for a full disk: the system refuses to write on, as it does then."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_is_full_is_told_and_leaves_the_older_checkpoint(state, folder, request, capfd):
    with Writer(folder, Checkpoint()) as writer:
        writer.save_and_wait(state(3), {})
        request.getfixturevalue("small_files")
        writer.save(state(20), {})
        writer._wait()
        assert writer.problem.startswith(f"{folder}: the checkpoint of step 20 could not be written: ")
        assert "File too large" in writer.problem
        with pytest.raises(RunError, match=r"the checkpoint of step 21 could not be written: .*File too large"):
            writer.save_and_wait(state(21), {})
    assert [path.name for path in folder.iterdir()] == ["3"]
    assert checksums.damage(folder / "3") == ""
    out, err = capfd.readouterr()
    assert out + err == ""


def test_after_a_failure_the_next_is_written(state, folder):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Writer(folder, Checkpoint()) as writer:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        writer.save(state(1), {})
        writer._wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert writer.problem
        writer.save_and_wait(state(2), {})
    assert checkpoints.whole_steps(folder) == [2]


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["{tmp}/file/checkpoints", "/proc/checkpoints"])
def test_a_folder_that_cannot_be_made_fails_the_run(state, tmp_path, folder):
    (tmp_path / "file").write_text("")
    folder = tmp_path.joinpath(folder.format(tmp=tmp_path))
    with (
        Writer(folder, Checkpoint()) as writer,
        pytest.raises(RunError, match=f"{folder}: the checkpoint of step 0 could not be written: "),
    ):
        writer.save_and_wait(state(0), {})


def test_ctrl_c_while_saving_is_no_error_of_the_disk(state, folder, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(saving.ocp.AsyncCheckpointer, "save", interrupted)
    with Writer(folder, Checkpoint()) as writer, pytest.raises(KeyboardInterrupt):
        writer.save(state(0), {})
