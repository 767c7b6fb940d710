"""The memory and cores that a process may use, with cgroups of both versions."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest

from afterword.system import resources

UNLIMITED = 9223372036854771712  # the value in cgroup version 1 without a limit


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of eight cores with two threads each, with only those cgroups that the test creates."""
    monkeypatch.setattr(resources, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(resources, "MEMBERSHIPS", tmp_path / "memberships")
    monkeypatch.setattr(resources, "CPUS", tmp_path / "cpus")
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 16 if logical else 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    for cpu in range(16):
        write(tmp_path / "cpus" / f"cpu{cpu}" / "topology", core_cpus_list=f"{cpu % 8},{cpu % 8 + 8}")
    return tmp_path


def write(folder: Path, **files: object) -> Path:
    """Write files of one line each. `__` in a name stands for a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")
    return folder


def set_memberships(root: Path, *lines: str) -> None:
    (root / "memberships").write_text("\n".join(lines) + "\n")


def test_without_cgroups_the_machine_is_the_limit() -> None:
    assert 0 < resources.available_memory() <= psutil.virtual_memory().total
    assert resources.cores() == 8


# ---- memory


def test_a_memory_limit_of_cgroup_version_2_applies(tmp_path: Path) -> None:
    assert resources.cgroup_free_memory(tmp_path) is None
    write(tmp_path, memory__max="max", memory__current=700, memory__stat="anon 500\ninactive_file 200")
    assert resources.cgroup_free_memory(tmp_path) is None
    write(tmp_path, memory__max=1000)
    assert resources.cgroup_free_memory(tmp_path) == 500
    write(tmp_path, memory__max=100)
    assert resources.cgroup_free_memory(tmp_path) == 0


def test_a_memory_limit_of_cgroup_version_1_applies(tmp_path: Path) -> None:
    stat = "inactive_file 1\ntotal_inactive_file 200"
    write(tmp_path, memory__limit_in_bytes=UNLIMITED, memory__usage_in_bytes=700, memory__stat=stat)
    assert (resources.cgroup_free_memory(tmp_path) or 0) > 2**60
    write(tmp_path, memory__limit_in_bytes=1000)
    assert resources.cgroup_free_memory(tmp_path) == 500
    write(tmp_path, memory__limit_in_bytes=100)
    assert resources.cgroup_free_memory(tmp_path) == 0


@pytest.mark.parametrize("limited", ["", "outer", "outer/inner"])
def test_every_folder_up_to_the_root_counts(root: Path, limited: str) -> None:
    set_memberships(root, "7:cpu,cpuacct:/", "4:memory:/outer/inner", "0::/")
    write(root / "cgroup" / "memory" / "outer" / "inner")
    limits = {"memory__limit_in_bytes": 1000, "memory__usage_in_bytes": 400}
    write(root / "cgroup" / "memory" / limited, **limits)
    assert resources.available_memory() == 600


@pytest.mark.parametrize(
    ("line", "mount", "files"),
    [
        ("0::/docker/abc", "", {"memory__max": 1000, "memory__current": 400}),
        ("0::/docker/abc", "unified", {"memory__max": 1000, "memory__current": 400}),
        ("5:memory:/docker/abc", "memory", {"memory__limit_in_bytes": 1000, "memory__usage_in_bytes": 400}),
    ],
)
def test_in_a_container_the_root_of_the_mount_counts(
    root: Path, line: str, mount: str, files: Mapping[str, int]
) -> None:
    set_memberships(root, line)
    write(root / "cgroup" / mount, **files)
    assert resources.available_memory() == 600


# ---- cores


@pytest.mark.parametrize(("cpus", "cores"), [({3}, 1), ({3, 11}, 1), ({0, 1, 2}, 3), (set(range(16)), 8)])
def test_the_affinity_mask_counts_in_physical_cores(
    monkeypatch: pytest.MonkeyPatch, cpus: set[int], cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cpus, raising=False)
    assert resources.cores() == cores


def test_without_a_topology_each_allowed_processor_is_a_core(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "CPUS", root / "nowhere")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 2}, raising=False)
    assert resources.cores() == 2


def test_without_affinity_masks_all_cores_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert resources.cores() == 8


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 8), ("400000 100000", 4), ("250000 100000", 2), ("50000 100000", 1), ("", 8)]
)
def test_a_cpu_quota_of_cgroup_version_2_applies(root: Path, quota: str, cores: int) -> None:
    set_memberships(root, "0::/")
    write(root / "cgroup", cpu__max=quota)
    assert resources.cores() == cores


@pytest.mark.parametrize("mount", ["cpu,cpuacct", "cpu"])
@pytest.mark.parametrize(("quota", "cores"), [(-1, 8), (400000, 4), (150000, 1), (1000, 1)])
def test_a_cpu_quota_of_cgroup_version_1_applies(root: Path, mount: str, quota: int, cores: int) -> None:
    set_memberships(root, "3:cpu,cpuacct:/docker/abc", "0::/")
    write(root / "cgroup" / mount, cpu__cfs_quota_us=quota, cpu__cfs_period_us=100000)
    assert resources.cores() == cores


def test_the_smallest_of_mask_and_quotas_applies(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    set_memberships(root, "0::/a/b")
    write(root / "cgroup" / "a" / "b", cpu__max="600000 100000")
    assert resources.cores() == 3
    write(root / "cgroup" / "a", cpu__max="200000 100000")
    assert resources.cores() == 2
