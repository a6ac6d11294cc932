"""What the machine gives this process."""

import os


def cores() -> int:
    """Number of cores that this process may use; all of them where the system does not tell."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cores_each() -> int:
    """Cores for each of several processes that train here: what SLURM gives a task, or a share."""
    of_task = min(cores(), int(os.environ.get("SLURM_CPUS_PER_TASK", cores())))
    return max(of_task // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
