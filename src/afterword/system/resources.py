"""What this process may use of the machine: bytes of memory and cores, within the limits of its cgroups.

Both versions of cgroups are read, and every folder from the process's own to the root of the mount: each may set a
limit. In a container the path that `/proc/self/cgroup` names may not exist; the root of the mount is then its own.
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
    """Bytes that can still be taken: what the machine has left, or less where a cgroup sets a limit."""
    rooms = (memory_room(folder) for folder in cgroups("memory"))
    return min([int(psutil.virtual_memory().available), *(room for room in rooms if room is not None)])


def cores() -> int:
    """Physical cores that this process may keep busy: those of its affinity mask, within its CPU quota; at least 1.

    More threads than that wait for each other most of the time.
    """
    quotas = (cpu_quota(folder) for folder in cgroups("cpu"))
    return max(1, min([allowed_cores(), *(int(quota) for quota in quotas if quota is not None)]))


def allowed_cores() -> int:
    """Physical cores of the affinity mask; all of the machine's where the system has no such mask."""
    everywhere = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if not hasattr(os, "sched_getaffinity"):
        return everywhere
    return min(everywhere, len({_siblings(cpu) for cpu in os.sched_getaffinity(0)}))


def cgroups(controller: str) -> Iterator[Path]:
    """The folders that can limit this process's use of `controller` ("memory", "cpu"), in both versions."""
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


def memory_room(folder: Path) -> int | None:
    """Bytes left under a cgroup's limit, its file cache counted as free; None if it sets none."""
    if (folder / "memory.max").exists():
        return _room(folder, "memory.max", "memory.current", "inactive_file")
    return _room(folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def cpu_quota(folder: Path) -> float | None:
    """Cores' worth of time that a cgroup may use; None if it sets no limit."""
    if (folder / "cpu.max").exists():
        return _read(lambda: _ratio(*(folder / "cpu.max").read_text().split()))
    quota, period = folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us"
    return _read(lambda: _ratio(quota.read_text(), period.read_text()))


def _room(folder: Path, limit: str, used: str, cache: str) -> int | None:
    """`limit` and `used` are names of files, `cache` is a row of `memory.stat`."""
    most = _read(lambda: int((folder / limit).read_text()))
    taken = _read(lambda: int((folder / used).read_text()))
    if most is None or taken is None:
        return None
    rows = (line.split() for line in (_read((folder / "memory.stat").read_text) or "").splitlines())
    free = next((int(row[1]) for row in rows if row[0] == cache), 0)
    return max(0, most - max(0, taken - free))


def _ratio(quota: str, period: str) -> float | None:
    """`quota` is "max" (which is a ValueError) or negative where there is no limit."""
    return int(quota) / int(period) if int(quota) > 0 and int(period) > 0 else None


def _read(read: Callable[[], T]) -> T | None:
    """What `read` returns; None where there is no such file or no number in it, such as "max"."""
    try:
        return read()
    except (OSError, ValueError, TypeError):  # TypeError: a row of `cpu.max` with too few words
        return None


def _siblings(cpu: int) -> str:
    """Names the physical core of a logical one."""
    for name in ("core_cpus_list", "thread_siblings_list"):
        if (found := _read((CPUS / f"cpu{cpu}" / "topology" / name).read_text)) is not None:
            return found
    return str(cpu)
