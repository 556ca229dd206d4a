"""The record that Weights & Biases' own program keeps of an offline run, read with its own schema."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxgpt.options.config import Config, Run
from jaxgpt.reports import trackers

wandb = pytest.importorskip("wandb", reason="the trackers extra is not installed")
schema = pytest.importorskip("wandb.proto.wandb_internal_pb2", reason="the trackers extra is not installed")

HEADER, BLOCK = 7, 32 * 1024
WHOLE, LAST = (1, 4)  # types of LevelDB's log records: of one part, and the last of several


def records(path: Path) -> Iterator:
    """Yields the records of a .wandb file, a LevelDB log: blocks of 32 KiB, each part with a checksum, length and
    type."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    place, parts = HEADER, b""
    while place < len(data):
        left = BLOCK - place % BLOCK
        if left < 7:  # the rest of a block that has no room for a part
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (WHOLE, LAST):
            record = schema.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


@pytest.mark.filterwarnings("default")  # of its own
def test_wandb_offline_has_every_number(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = Config(run=Run(name="try", note="a note", trackers="wandb"))
    for first in (1, 3):  # begun, and resumed: the same run there
        (tracker,) = trackers.start(config, tmp_path)
        tracker.write({"step": first, "loss": 2.5, "mfu": None, "skipped": 0})
        tracker.write({"step": first + 1, "loss": 1.5, "task": "hellaswag", "accuracy": 0.25})
        tracker.close()
    wandb.teardown()  # as at the end of a process: until then its own one may still be writing
    read, runs = [], []
    for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")):
        for record in records(path):
            if record.HasField("run"):
                runs.append(record.run)
            if record.HasField("history"):
                items = {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                read.append({key: value for key, value in items.items() if not key.startswith("_")})
    assert read == [
        values
        for first in (1, 3)
        for values in (
            {"step": first, "loss": 2.5, "skipped": 0},
            {"step": first + 1, "hellaswag/loss": 1.5, "hellaswag/accuracy": 0.25},
        )
    ]
    identity = (tmp_path / trackers.IDENTITY).read_text().strip()
    assert {(run.run_id, run.display_name, run.notes) for run in runs} == {(identity, "try", "a note")}
