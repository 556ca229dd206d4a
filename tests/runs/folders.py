"""A run's folder with something in it, to compare with."""

from jaxgpt.runs.folder import RunFolder


def files(folder):
    """All that is in a folder, with its contents."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def files_of_step_two(config):
    """A run whose step 2 was saved, and what it has written since."""
    folder = RunFolder(config())
    folder.metric(step=1, loss=3.0)
    folder.metric(step=2, loss=2.0)
    folder.metric(step=2, val_loss=2.0)
    folder.sample(2, "é")
    lengths = folder.lengths()
    (folder.checkpoints / "2").mkdir(parents=True)
    before = files(folder.path)
    folder.metric(step=2, val_loss=2.5)  # as a run that was stopped evaluates at its end
    folder.metric(step=3, loss=1.0)
    folder.sample(4, "later")
    folder.close()
    return before, lengths
