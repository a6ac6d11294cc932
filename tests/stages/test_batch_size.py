"""A stage with runtime.batch_size=auto remembers what it found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from sfkt_cli.settings.config import Config, as_dict, build
from sfkt_cli.settings.runs import Run
from sfkt_cli.stages.bridge import bridge


def test_a_stage_remembers_it(untrained_run: Run, untrained_config: Config, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", force=True)
    shutil.copytree(untrained_run.folder, run.folder)
    changes = {"runtime": {"batch_size": "auto"}, "bridge": {"epochs": 1, "width": 4}}
    config = build(as_dict(untrained_config), changes, {"training": {"min_steps": 1}})
    bridge(config, run)
    found = json.loads(run.path("bridge", "batch_size.json").read_text())["batch_size"]
    assert found & (found - 1) == 0
    record = run.record("bridge")
    assert record["settings"]["runtime.batch_size"] == "auto"
    bridge(config, Run(run.folder))
    assert run.record("bridge") == record
