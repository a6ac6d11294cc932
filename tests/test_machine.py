"""The cores of this process."""

from __future__ import annotations

import os

import pytest

from sfkt_cli.machine import cores, cores_each


def test_cores_are_those_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5}, raising=False)
    assert cores() == 2
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS has none
    assert cores() == 64


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 12),
        ({"LOCAL_WORLD_SIZE": "4"}, 3),  # torchrun, or runtime.processes
        ({"SLURM_CPUS_PER_TASK": "8"}, 8),  # srun, which does not always bind tasks to cores
        ({"SLURM_CPUS_PER_TASK": "8", "LOCAL_WORLD_SIZE": "4"}, 2),  # torchrun in a task
        ({"SLURM_CPUS_PER_TASK": "64"}, 12),
        ({"LOCAL_WORLD_SIZE": "16"}, 1),
    ],
)
def test_processes_share_the_cores_that_they_may_use(
    environment: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)), raising=False)
    for name in ("SLURM_CPUS_PER_TASK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cores_each() == expected
