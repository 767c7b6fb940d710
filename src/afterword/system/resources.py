"""Memory and processor cores that this process may use, within the limits of its cgroups.

It reads both versions of cgroups, and every folder from the process's own cgroup up to the root of the mount: each
may set a limit. In a container the path in `/proc/self/cgroup` may not exist; then the root of the mount is the
process's own cgroup. Everything is read again at each call; the module keeps no state.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil

T = TypeVar("T")

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIPS = Path("/proc/self/cgroup")
CPUS = Path("/sys/devices/system/cpu")


def available_memory() -> int:
    """Bytes of memory that can still be allocated: what the machine has left, or less where a cgroup sets a limit."""
    free = (cgroup_free_memory(folder) for folder in cgroups("memory"))
    return min([int(psutil.virtual_memory().available), *(size for size in free if size is not None)])


def cores() -> int:
    """Physical cores that this process may keep busy: those of its affinity mask, within its CPU quota; at least 1.

    More compute threads than that wait for each other most of the time.
    """
    quotas = (cpu_quota(folder) for folder in cgroups("cpu"))
    return max(1, min([allowed_cores(), *(int(quota) for quota in quotas if quota is not None)]))


def allowed_cores() -> int:
    """Physical cores of the affinity mask; all of the machine's cores where the system has no affinity masks."""
    all_cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if not hasattr(os, "sched_getaffinity"):
        return all_cores
    return min(all_cores, len({_siblings(cpu) for cpu in os.sched_getaffinity(0)}))


def cgroups(controller: str) -> Iterator[Path]:
    """The folders of both versions that can limit this process's use of `controller` ("memory" or "cpu")."""
    try:
        lines = MEMBERSHIPS.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    for line in lines or ["0::/"]:
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        mounts = [CGROUPS / names, CGROUPS / controller] if names else [CGROUPS, CGROUPS / "unified"]
        for mount in dict.fromkeys(mounts):
            own = mount / path.lstrip("/")
            yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(mount) and folder.is_dir())


def cgroup_free_memory(folder: Path) -> int | None:
    """Bytes left under a cgroup's memory limit, with its inactive file cache counted as free; None without a limit."""
    if (folder / "memory.max").exists():
        return _free_memory(folder, "memory.max", "memory.current", "inactive_file")
    return _free_memory(folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def cpu_quota(folder: Path) -> float | None:
    """A cgroup's CPU quota as a number of cores; None without a limit."""
    if (folder / "cpu.max").exists():
        return _read(lambda: _ratio(*(folder / "cpu.max").read_text().split()))
    quota, period = folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us"
    return _read(lambda: _ratio(quota.read_text(), period.read_text()))


def _free_memory(folder: Path, limit: str, used: str, cache: str) -> int | None:
    """As `cgroup_free_memory`. `limit` and `used` are names of files, `cache` is a row of `memory.stat`."""
    maximum = _read(lambda: int((folder / limit).read_text()))
    usage = _read(lambda: int((folder / used).read_text()))
    if maximum is None or usage is None:
        return None
    rows = (line.split() for line in (_read((folder / "memory.stat").read_text) or "").splitlines())
    free = next((int(row[1]) for row in rows if row[0] == cache), 0)
    return max(0, maximum - max(0, usage - free))


def _ratio(quota: str, period: str) -> float | None:
    """`quota / period`; None if `quota` is negative, which means no limit. "max" raises `ValueError`."""
    return int(quota) / int(period) if int(quota) > 0 and int(period) > 0 else None


def _read(read: Callable[[], T]) -> T | None:
    """The result of `read`; None if the file does not exist or has no number in it, such as "max"."""
    try:
        return read()
    except (OSError, ValueError, TypeError):  # TypeError: a row of `cpu.max` has too few words
        return None


def _siblings(cpu: int) -> str:
    """The list of logical processors on the same physical core, as the kernel writes it; it identifies the core."""
    for name in ("core_cpus_list", "thread_siblings_list"):
        if (found := _read((CPUS / f"cpu{cpu}" / "topology" / name).read_text)) is not None:
            return found
    return str(cpu)
