"""All benchmarks: a table, and JSON for docs/trials.md.

python -m tests.benchmarks [--quick] [--only NAME ...] --output bench.json
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from sfkt_cli.files import write_json
from sfkt_cli.settings.stage import versions
from tests.benchmarks.measuring import Row

NAMES = (
    "startup",
    "loader",
    "step_time",
    "per_image",
    "processes",
    "scaling",
    "commands",
    "prepare_speed",
    "time_to_accuracy",
)
"""One module a comparison, with ``run(quick) -> rows``."""


def main() -> None:
    """Run what was asked for; the file is written after each benchmark."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short forms, for trying out")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME")
    parser.add_argument("--output", type=Path, default=Path("bench.json"))
    asked = parser.parse_args()
    found: dict[str, Any] = {"machine": machine(), "quick": asked.quick, "benchmarks": {}}
    for name in asked.only:
        began = time.perf_counter()
        rows: list[Row] = import_module(f"tests.benchmarks.{name}").run(asked.quick)
        took = round(time.perf_counter() - began, 1)
        found["benchmarks"][name] = {"seconds": took, "rows": [row.as_dict() for row in rows]}
        write_json(asked.output, found)
        print(f"{name} ({took} s)")
        for row in rows:
            print(f"  {row.name:58} {row.value:12,.3f} {row.unit:10} {row.target}", flush=True)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")
    return {
        "cpu": model or platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
        "versions": versions(),
    }


if __name__ == "__main__":
    main()
