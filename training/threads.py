"""Limits torch's threads to the process's CPU quota: in a container this may be less than the host's cores."""

import math
import os
from pathlib import Path

import torch


CGROUPS = Path("/sys/fs/cgroup")


def fit_threads() -> None:
    """Reduces torch's threads to the quota of the process's cgroup, unless OMP_NUM_THREADS is set."""
    quota = cpu_quota()
    if quota is not None and "OMP_NUM_THREADS" not in os.environ:
        # Rounded up: two threads use one and a half cores, and wait a quarter of the time.
        torch.set_num_threads(max(1, min(torch.get_num_threads(), math.ceil(quota))))


def cpu_quota(cgroups: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> float | None:
    """
    Cores' worth of time that the kernel lets this process use, the least of what its cgroup and those above it allow;
    None where nothing limits it. Reads cgroup version 2 (cpu.max) and 1 (cpu.cfs_quota_us).

    Args:
        cgroups: where the cgroups are mounted.
        own: the file that names the process's cgroup, a line for each hierarchy: `0::/path` in version 2.
    """
    lines = own.read_text().splitlines() if own.exists() else []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = cgroups / "cpu" if controllers else cgroups
        inside = Path(path.lstrip("/"))
        # In a container the path may be the host's, and the mount show only the container's own part: the root's files.
        found += [quota for folder in (inside, *inside.parents) if (quota := _quota(root / folder))]
    return min(found, default=None)


def _quota(folder: Path) -> float | None:
    """The quota that this folder's files give, in cores; None where there is none."""
    try:
        if (version_2 := folder / "cpu.max").exists():
            quota, period = version_2.read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
    except OSError:
        return None
    return None if quota in ("max", "-1") else int(quota) / int(period)
