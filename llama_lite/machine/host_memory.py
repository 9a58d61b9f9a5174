"""Memory of this machine that a process can still take."""

import psutil

from ..cgroups import cgroup_folders

SNAPSHOT_FRACTION = 0.8  # of available memory: the most that the copy that a save is written from may take
# of cgroups 2 and 1: limit, use, and the name in memory.stat of what the kernel would give back
FILES = (("memory.max", "memory.current", "file"), ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"))


def available_memory() -> int:
    """Bytes that can be allocated: what the machine has available, within the limits of this process's cgroups (of a
    container, a Slurm job).
    """
    found = [psutil.virtual_memory().available]
    for folder in cgroup_folders("memory"):
        for limit_file, use_file, cache_name in FILES:
            try:
                limit, use = ((folder / name).read_text().strip() for name in (limit_file, use_file))
                statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                if limit != "max":
                    found.append(int(limit) - int(use) + int(statistics.get(cache_name, 0)))
            except (OSError, ValueError):
                continue  # the other kind of cgroup, or none
    return max(0, min(found))
