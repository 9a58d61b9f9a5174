"""The cgroups that this process is in: those of a container, a Slurm job or a service, and the CPU time they allow."""

import math
from pathlib import Path

CGROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
CPU_QUOTAS = (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us"))  # of cgroups 2 and 1: the files of quota, period


def cgroup_folders(controller: str) -> set[Path]:
    """The folders that hold what a controller (`memory`, `cpu`) allows this process: of its cgroups, and of those that
    they are in.
    """
    folders = {CGROUPS, CGROUPS / controller}
    try:
        lines = OWN.read_text().splitlines()
    except OSError:
        return folders
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            folder = CGROUPS / (controller if controllers else "") / path.strip("/")
            folders |= {folder, *(parent for parent in folder.parents if CGROUPS in (parent, *parent.parents))}
    return folders


def cpu_limit() -> float:
    """Cores to which the CPU quotas of this process's cgroups amount (`docker --cpus 1.5`); infinite without one."""
    limits = [math.inf]
    for folder in cgroup_folders("cpu"):
        for names in CPU_QUOTAS:
            try:
                quota, period = map(int, " ".join((folder / name).read_text() for name in names).split())
            except (OSError, ValueError):
                continue  # the other kind of cgroup, or no quota (`max`)
            if quota > 0:  # -1: no quota
                limits.append(quota / period)
    return min(limits)
