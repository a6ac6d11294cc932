"""The place of this process among others, as torchrun or SLURM tell it; needs no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """Processes that work together on one stage.

    Attributes:
        rank: Number of this process over all machines.
        local_rank: Number of this process on its machine.
        size: Number of processes over all machines.
        address: Host of process 0.
        port: TCP port there.
    """

    rank: int
    local_rank: int
    size: int
    address: str
    port: int


def found_world(environment: Mapping[str, str] | None = None) -> World | None:
    """The world that torchrun or ``srun`` put this process into; None where it is alone."""
    known = os.environ if environment is None else environment
    try:
        if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(known):
            return World(
                int(known["RANK"]),
                int(known.get("LOCAL_RANK", "0")),
                int(known["WORLD_SIZE"]),
                known["MASTER_ADDR"],
                int(known["MASTER_PORT"]),
            )
        # A batch script itself, too, has SLURM_PROCID; only a step of srun has these.
        if {"SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_PROCID"} <= set(known):
            size = int(known["SLURM_STEP_NUM_TASKS"])
            address = known.get("MASTER_ADDR") or first_host(known["SLURM_STEP_NODELIST"])
            port = known.get("MASTER_PORT") or 20_000 + int(known.get("SLURM_JOB_ID", "0")) % 20_000
            rank, local = int(known["SLURM_PROCID"]), int(known.get("SLURM_LOCALID", "0"))
            return World(rank, local, size, address, int(port)) if size > 1 else None
    except ValueError:
        return None
    return None


def is_main(environment: Mapping[str, str] | None = None) -> bool:
    """Whether this process writes files and speaks: process 0, or the only one."""
    world = found_world(environment)
    return world is None or world.rank == 0


def first_host(nodes: str) -> str:
    """The first host of a SLURM list such as ``gpu[03-05,9],cpu1``: ``gpu03``."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", nodes)
    return "localhost" if match is None else match.group(1) + (match.group(2) or "")
