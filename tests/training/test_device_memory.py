"""The memory that a run may have."""

import types

import jax
import pytest

from jaxgpt.options.config import Compute
from jaxgpt.training import device_memory

GIB = 2**30


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


@pytest.fixture
def left(tmp_path):
    """A function from the kernel's account of a process's groups to what their limits leave it."""

    def read(membership: str) -> list[int]:
        (tmp_path / "cgroup").write_text(membership)
        return sorted(device_memory._cgroups_left(tmp_path / "sys", tmp_path / "cgroup"))

    return read


def test_version_2_counts_every_group_above(tmp_path, left):
    """Files that the kernel caches, and would give up, are not counted as used; "max" is no limit."""
    root = tmp_path / "sys"
    write(root / "jobs" / "one", memory__max=3 * GIB, memory__current=2 * GIB, memory__stat=f"inactive_file {GIB}")
    write(root / "jobs", memory__max=10 * GIB, memory__current=9 * GIB + 1)
    write(root, memory__max="max")
    assert left("0::/jobs/one\n") == [GIB - 1, 2 * GIB]


def test_version_1(tmp_path, left):
    files = {"memory__limit_in_bytes": 4 * GIB, "memory__usage_in_bytes": GIB, "memory__stat": "total_inactive_file 5"}
    write(tmp_path / "sys" / "memory" / "box", **files)
    assert left("9:cpu:/elsewhere\n4:hugetlb,memory:/box\n") == [3 * GIB + 5]


def test_a_path_of_the_hosts_is_looked_up_at_the_root(tmp_path, left):
    """A container sees its own group as the root."""
    write(tmp_path / "sys", memory__max=GIB, memory__current=0)
    assert left("0::/docker/0123abcd\n") == [GIB]
    assert left("0::/../../other\n") == [GIB]


def test_without_groups_there_is_no_limit(tmp_path, left):
    assert left("0::/\n") == []
    assert device_memory._cgroups_left(tmp_path, tmp_path / "absent") == []


def test_a_cpu_has_what_is_available():
    has = device_memory.capacity(Compute())
    assert has.bytes is not None
    assert 2**20 < has.bytes < 2**50
    assert "available to this process" in has.source


def test_the_option_comes_first():
    has = device_memory.capacity(Compute(memory_limit_gib=1.5))
    assert has == device_memory.Capacity(3 * GIB // 2, "--compute.memory-limit-gib")


def test_an_accelerator_has_what_it_reports(monkeypatch):
    def device(stats):
        return lambda: [types.SimpleNamespace(memory_stats=lambda: stats, device_kind="NVIDIA H100", platform="gpu")]

    monkeypatch.setattr(jax, "local_devices", device({"bytes_limit": 8 * GIB, "bytes_in_use": GIB}))
    assert device_memory.capacity(Compute()).bytes == 7 * GIB
    monkeypatch.setattr(jax, "local_devices", device(None))
    assert device_memory.capacity(Compute()).bytes is None
