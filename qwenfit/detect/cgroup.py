"""The CPU and memory limits that control groups (v1 and v2) put on this process: what a container may really use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class Limits:
    """None where nothing limits. `memory_free` is limit minus use, the reclaimable file cache not counted as used."""

    memory: int | None = None  # bytes, the tightest of the nested groups
    memory_free: int | None = None  # bytes, the least of the nested groups
    cpus: float | None = None  # CPU seconds a second


def read_limits(root: Path = Path("/")) -> Limits:
    """The limits of this process's groups and of every group above them that is visible, read under `root`."""
    limits: list[int] = []
    free: list[int] = []
    cpus: list[float] = []
    for group in _groups(root, "memory"):
        for limit, used in (_memory_v2(group), _memory_v1(group)):
            if limit is not None:
                limits.append(limit)
                free.append(max(0, limit - used))
    for group in _groups(root, "cpu"):
        quota = _quota_v2(group) or _quota_v1(group)
        if quota is not None:
            cpus.append(quota)
    return Limits(min(limits, default=None), min(free, default=None), min(cpus, default=None))


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's group for a controller and of its parents, up to where the hierarchy is mounted."""
    paths = dict(_memberships(root))
    for mount_point, mount_root, kind, options in _mounts(root):
        if kind == "cgroup2":
            path = paths.get("")
        elif kind == "cgroup" and controller in options:
            path = paths.get(controller)
        else:
            continue
        if path is None:
            continue
        top = root / mount_point.lstrip("/")
        # Inside a container the mount shows only the part of the hierarchy below mount_root.
        inner = PurePosixPath(path)
        if mount_root != "/":
            inner = inner.relative_to(mount_root) if inner.is_relative_to(mount_root) else PurePosixPath()
        parts = [part for part in inner.parts if part not in ("/", "..")]
        for depth in range(len(parts), -1, -1):
            yield top.joinpath(*parts[:depth])


def _memberships(root: Path) -> Iterator[tuple[str, str]]:
    """(controller, path) of /proc/self/cgroup; the controller of the v2 hierarchy is ""."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        fields = line.split(":", 2)
        if len(fields) == 3:
            for controller in fields[1].split(","):
                yield controller, fields[2]


def _mounts(root: Path) -> Iterator[tuple[str, str, str, list[str]]]:
    """(mount point, root within the hierarchy, file system, super options) of the cgroup mounts."""
    for line in _text(root / "proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        before, after = left.split(), right.split()
        if len(before) >= 5 and len(after) >= 3 and after[0].startswith("cgroup"):
            yield before[4], before[3], after[0], after[2].split(",")


def _memory_v2(group: Path) -> tuple[int | None, int]:
    limit = _number(group / "memory.max")
    used = (_number(group / "memory.current") or 0) - _inactive(group, "inactive_file")
    return limit, used


def _memory_v1(group: Path) -> tuple[int | None, int]:
    limit = _number(group / "memory.limit_in_bytes")
    if limit is not None and limit >= 1 << 60:  # the kernel's way to say "unlimited"
        limit = None
    used = (_number(group / "memory.usage_in_bytes") or 0) - _inactive(group, "total_inactive_file")
    return limit, used


def _inactive(group: Path, key: str) -> int:
    """File cache that the kernel drops when memory is wanted; counted in the group's use."""
    for line in _text(group / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == key and value.isdecimal():
            return int(value)
    return 0


def _quota_v2(group: Path) -> float | None:
    fields = _text(group / "cpu.max").split()
    if len(fields) == 2 and fields[0].isdecimal() and fields[1].isdecimal() and int(fields[1]) > 0:
        return int(fields[0]) / int(fields[1])
    return None


def _quota_v1(group: Path) -> float | None:
    quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
    return quota / period if quota and period else None


def _number(path: Path) -> int | None:
    """The whole number in a file; None for "max", -1 or no file."""
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
