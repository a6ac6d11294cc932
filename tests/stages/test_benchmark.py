"""The benchmark: its file, sharing between cells, resumption, tables and curves."""

from __future__ import annotations

import csv
import errno
import json
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sfkt_cli.benchmark.plan import (
    DEMO,
    GRID,
    BenchmarkPlan,
    VariantPlan,
    cells_of,
    read_plan,
    trial_cells,
    tuned,
)
from sfkt_cli.benchmark.report import (
    Key,
    Measured,
    Result,
    draw_sweeps,
    missing_rows,
    narrow,
    paired,
    results_of,
    sensor_tables,
    tables_of,
)
from sfkt_cli.benchmark.run import benchmark, dry_run, gpus_of, run_cells
from sfkt_cli.errors import ConfigError, DataError, Interrupted, RunError
from sfkt_cli.evaluation.report import MEANINGS, Row, latex_tables
from sfkt_cli.files import read_record, write_record
from sfkt_cli.methods import METHODS
from sfkt_cli.scores import holm
from sfkt_cli.settings.config import Config, read_yaml
from sfkt_cli.settings.stage import Done
from tests.data.make_archives import depth, folders, save, scene
from tests.stages.evaluation_runs import save_weights

TINY: dict[str, Any] = {
    "dataset": "synthetic", "synthetic.pairs": 60, "image_size": 16,
    "source": {"epochs": 1, "width": 4, "bottleneck": 8}, "bridge": {"epochs": 1, "width": 4},
    "transfer.epochs": 1, "training.min_steps": 2, "prepare.workers": 1,
    "runtime": {"gpus": 0, "batch_size": 16, "threads": 1},
}  # fmt: skip
PLAN = BenchmarkPlan.model_validate(
    {
        "title": "Tiny",
        "methods": ["source-only", "bridge-only", "shot", "tgkt"],
        "seeds": [0],
        "settings": TINY,
        "variants": [
            {"name": "default"},
            {"name": "no L_f", "settings": {"tgkt.beta_f": 0}, "methods": ["tgkt"]},
        ],
        "sweeps": [{"setting": "tgkt.beta_im", "values": [1.0, 0.5]}],
    }
)

DEFAULT: dict[str, Any] = {"variants": PLAN.variants[:1], "sweeps": ()}
"""A change of a plan: no other settings are compared."""


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark") / "out"
    benchmark(PLAN, folder, processes=0)
    return folder


def ran_again(plan: BenchmarkPlan, output: Path) -> list[str]:
    return run_cells(cells_of(plan, {}), output, 0, {})


def told(output: Path) -> dict[str, Any]:
    """The content of benchmark.json."""
    found: dict[str, Any] = json.loads((output / "benchmark.json").read_text(encoding="utf-8"))
    return found


def stages(output: Path) -> dict[str, int]:
    names = [path.name.rpartition("-")[0] for path in (output / "stages").iterdir()]
    return {name: names.count(name) for name in sorted(set(names))}


def test_cells_share_the_stages_on_whose_settings_they_agree(output: Path) -> None:
    expected = {"prepare": 1, "source": 1, "bridge": 1, "transfer-shot": 1, "transfer-tgkt": 3}
    assert stages(output) == dict(sorted(expected.items()))
    cells = [output / cell.folder for cell in cells_of(PLAN, {})]
    assert len({path.joinpath("bridge").resolve() for path in cells}) == 1
    default, without, same, half = (path.joinpath("transfer/tgkt").resolve() for path in cells)
    assert default == same
    assert len({default, without, half}) == 3


def test_a_cell_is_finished_before_the_next_begins(output: Path) -> None:
    first, *others = (output / cell.folder for cell in cells_of(PLAN, {}))
    evaluated = (first / "evaluate/done.json").stat().st_mtime_ns
    trained = [(cell / "transfer/tgkt/done.json").stat().st_mtime_ns for cell in others]
    assert evaluated < max(trained)


def test_nothing_is_done_twice(output: Path) -> None:
    assert ran_again(PLAN, output) == []
    claimed = {path.name.partition("-")[0] for path in (output / "claims").iterdir()}
    assert claimed == {"prepare", "source"}  # they look whether an archive or a model changed


def test_a_further_method_is_added_to_what_is_there(output: Path) -> None:
    more = PLAN.model_copy(update={**DEFAULT, "methods": (*PLAN.methods, "aad")})
    assert [name.rpartition("-")[0] for name in ran_again(more, output)] == [
        "transfer-aad",
        "cells/synthetic/default/seed",
    ]


def test_tables_and_curves_are_written(output: Path) -> None:
    files = {path.name for path in output.iterdir() if path.is_file()}
    assert files == {
        "benchmark.md", "benchmark.csv", "benchmark.json", "benchmark-long.csv", "benchmark.tex",
        "sweep-tgkt.beta_im-target.png", "sweep-tgkt.beta_im-test.png",
    }  # fmt: skip
    found = told(output)
    assert found["failed"] == []
    methods = [
        r["method"] for r in found["rows"] if (r["split"], r["variant"]) == ("test", "default")
    ]
    assert methods == ["source-only", "bridge-only", "shot", "tgkt"]
    assert all(len(row["accuracies"]) == 1 and row["deviation"] is None for row in found["rows"])
    lines = list(csv.DictReader((output / "benchmark.csv").read_text("utf-8").splitlines()))
    assert len(lines) == len(found["rows"])
    words = {"dataset", "variant", "method", "split", "versus", "note"}
    for line in lines:
        assert all(
            text == "" or np.isfinite(float(text)) for k, text in line.items() if k not in words
        )
    long = list(csv.DictReader((output / "benchmark-long.csv").read_text("utf-8").splitlines()))
    keys = [tuple(line[k] for k in line if k != "value") for line in long]
    assert len(set(keys)) == len(keys)
    (value,) = (
        float(line["value"])
        for line in long
        if [line[k] for k in ("variant", "method", "seed", "split", "metric")]
        == ["default", "tgkt", "0", "test", "accuracy"]
    )
    expected = next(r for r in found["rows"] if (r["split"], r["method"]) == ("test", "tgkt"))
    assert value == expected["mean"]
    tables = (output / "benchmark.tex").read_text(encoding="utf-8")
    assert tables.count(r"\toprule") == tables.count(r"\bottomrule") == 4
    assert r"\textbf{" in tables
    assert max(line.count("&") for line in tables.splitlines()) < 10
    text = (output / "benchmark.md").read_text(encoding="utf-8")
    assert MEANINGS["bridge-only"] in text
    assert "sweep-tgkt.beta_im-test.png" in text


def test_a_stage_that_fails_leaves_the_others(output: Path, tmp_path: Path) -> None:
    off = {f"bridge.alpha_{term}": 0 for term in ("rec", "f", "p")}
    broken = {"name": "no TI", "settings": off}
    variants = (PLAN.variants[0], VariantPlan.model_validate(broken))
    changes = {"variants": variants, "methods": ("source-only", "shot", "tgkt"), "sweeps": ()}
    plan = PLAN.model_copy(update=changes)
    with pytest.raises(RunError, match="2 stages failed or were left out"):
        benchmark(plan, output, processes=0)
    found = told(output)
    shown = {(row["variant"], row["method"]) for row in found["rows"]}
    assert ("no TI", "shot") in shown
    assert ("no TI", "tgkt") not in shown
    problem, left_out = found["failed"]
    assert "alpha_f" in problem
    assert left_out == "left out because of these: 1 stage"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("a bug"), "RuntimeError: a bug"),
        (MemoryError(), "the memory is full: end other programs"),
        (OSError(errno.ENOSPC, "No space left on device", "m"), "the disk is full, m was not"),
    ],
)
def test_a_bug_or_a_full_memory_in_one_stage_leaves_the_others(
    output: Path,
    error: Exception,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*values: object, **more: object) -> None:
        raise error

    monkeypatch.setattr("torch.optim.SGD", fail)
    broken = VariantPlan(name="broken", settings={"shot.beta_im": 0.5}, methods=("shot",))
    plan = PLAN.model_copy(update={"variants": (PLAN.variants[0], broken), "sweeps": ()})
    with pytest.raises(RunError, match=message):
        benchmark(plan, output, processes=0)
    assert ("Traceback" in capsys.readouterr().err) == (message == "RuntimeError: a bug")
    found = told(output)
    assert {row["variant"] for row in found["rows"]} == {"default"}


def test_what_failed_for_one_command_is_tried_again_by_a_new_one_alone(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def fail(*values: object, **more: object) -> None:
        tried.append(values)
        raise RuntimeError("a bug")

    monkeypatch.setattr("torch.optim.SGD", fail)
    broken = VariantPlan(name="broken again", settings={"shot.beta_im": 0.4}, methods=("shot",))
    plan = PLAN.model_copy(update={"variants": (PLAN.variants[0], broken), "sweeps": ()})
    for number in (1, 2):
        with pytest.raises(RunError, match="a bug"):
            benchmark(plan, output, processes=0)
        assert len(tried) == number
        for processes in (0, 1):  # as in commands that began earlier
            failed = dict[str, str]()
            assert run_cells(cells_of(plan, {}), output, processes, failed) == []
            assert [message.rpartition(": ")[2] for message in failed.values()] == ["a bug"]
        assert len(tried) == number


@pytest.mark.parametrize(
    ("methods", "end", "shown"),
    [
        (["shot"], RuntimeError("a bug"), {"source-only"}),
        (["shot"], Interrupted("stopped"), set()),
        (["shot", "shot-tuned"], Interrupted("stopped while it is tuned"), set()),
    ],
)
def test_figures_of_earlier_settings_are_not_shown(
    tmp_path: Path,
    methods: list[str],
    end: BaseException,
    shown: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*values: object, **more: object) -> None:
        raise end

    monkeypatch.setattr("sfkt_cli.benchmark.plan.GRID", {"learning_rate": (0.02,)})
    names = ("source-only", *methods)
    plan = BenchmarkPlan(main="shot", methods=names, seeds=(0,), settings=TINY)
    benchmark(plan, tmp_path, processes=0)
    assert {row["method"] for row in told(tmp_path)["rows"]} == {"source-only", *methods}
    monkeypatch.setattr("torch.optim.SGD", fail)
    with pytest.raises((RunError, Interrupted)):
        benchmark(plan, tmp_path, processes=0, overrides={"shot.beta_im": 0.5})
    rows = told(tmp_path)["rows"]
    assert {row["method"] for row in rows} == shown


def test_curves_need_no_table_of_methods(output: Path, tmp_path: Path) -> None:
    shutil.copytree(output, tmp_path / "copy", symlinks=True)
    curves = PLAN.model_copy(update={"methods": (), "variants": PLAN.variants[:1]})
    several = curves.model_copy(update={"seeds": (0, 1)})
    assert len({cell.folder for cell in cells_of(several, {})}) == 4
    benchmark(curves, tmp_path / "copy", processes=0)
    variants = {row["variant"].partition(",")[0] for row in told(tmp_path / "copy")["rows"]}
    assert variants == {"tgkt.beta_im = 0.5", "tgkt.beta_im = 1"}


def test_records_that_lack_a_newer_setting_are_shown(output: Path, tmp_path: Path) -> None:
    shutil.copytree(output, tmp_path / "copy", symlinks=True)
    for path in (tmp_path / "copy/cells").rglob("evaluate/done.json"):
        record = read_record(path, Done).model_dump(mode="json", exclude_unset=True)
        del record["settings"]["training.patience"]
        write_record(path, record)
    assert ran_again(PLAN, tmp_path / "copy") == []


@pytest.mark.parametrize("change", ["archive", "model"])
def test_numbers_of_other_data_or_another_model_are_refused(change: str, tmp_path: Path) -> None:
    folders(tmp_path / "data", labels=("desk", "lamp"))
    save_weights(tmp_path / "mine.pth", classes=2)
    brought = {"checkpoint": str(tmp_path / "mine.pth"), "width": 4}
    settings = {**TINY, "dataset": "folders", "prepare.root": str(tmp_path / "data"),
                "source": brought}  # fmt: skip
    changes = {**DEFAULT, "methods": ("source-only",), "settings": settings}
    plan = PLAN.model_copy(update=changes)
    for _ in range(2):
        benchmark(plan, tmp_path / "out", processes=0)
        assert told(tmp_path / "out")["rows"]
    if change == "archive":
        for view in ("rgb", "target"):
            save(tmp_path / f"data/tr/desk/{view}/more.png", depth(99))
    else:
        save_weights(tmp_path / "mine.pth", classes=2, seed=1)
    with pytest.raises(RunError, match=r"has changed since(?s:.*)another --output"):
        benchmark(plan, tmp_path / "out", processes=0)
    assert told(tmp_path / "out")["rows"] == []


@pytest.mark.parametrize(
    "change", [{"split.test": 0.5, "split.source": 0.1}, {"transfer.epochs": 2}]
)
def test_a_cell_is_evaluated_again_where_its_data_or_its_oracle_changed(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    save_weights(tmp_path / "mine.pth", classes=6)
    brought = {"source": {"checkpoint": str(tmp_path / "mine.pth"), "width": 4}}
    plan = BenchmarkPlan.model_validate(
        {"methods": ["source-only", "oracle"], "seeds": [0], "settings": {**TINY, **brought}}
    )
    benchmark(plan, tmp_path / "out", processes=0)
    cell = tmp_path / "out/cells/synthetic/default/seed-0"
    before = json.loads((cell / "evaluate/done.json").read_text(encoding="utf-8"))["inputs"]
    benchmark(plan, tmp_path / "out", processes=0, overrides=change)
    after = json.loads((cell / "evaluate/done.json").read_text(encoding="utf-8"))["inputs"]
    differ = {name for name in before if before[name] != after[name]} - {"source/done.json"}
    assert differ == ({"oracle"} if "transfer.epochs" in change else {"transfer.h5", "test.h5"})


def test_missing_data_are_named_before_anything_runs(tmp_path: Path) -> None:
    plan = BenchmarkPlan.model_validate(
        {
            "methods": ["shot"],
            "datasets": [
                {"name": "made", "settings": TINY},
                *({"name": n, "settings": {**TINY, "dataset": d, "prepare.root": str(tmp_path / n)}}
                  for n, d in (("here", "rgb-nir"), ("there", "nyu-depth"))),
            ],
        }
    )  # fmt: skip
    with pytest.raises(
        DataError, match=r"(?s)here does not exist.*there does not exist, for there\n"
    ):
        benchmark(plan, tmp_path / "out", processes=0)
    with pytest.raises(DataError, match="there does not exist"):
        dry_run(plan, tmp_path / "out", {})
    assert not (tmp_path / "out").exists()


def test_a_dry_run_counts_and_writes_nothing(output: Path, tmp_path: Path) -> None:
    tried = dry_run(PLAN, tmp_path / "out", {})
    assert not (tmp_path / "out").exists()
    assert (tried["cells"], tried["stages"], tried["to_run"]) == (4, 11, 11)
    assert {"evaluate", "prepare"} <= set(tried["unknown"]), "nothing was measured yet"
    assert (tried["seconds"], tried["bytes"]) == (0, 0)
    more = PLAN.model_copy(update={"seeds": (0, 1)})
    before = sorted(output.rglob("*"))
    tried = dry_run(more, output, {})
    assert sorted(output.rglob("*")) == before
    assert (tried["stages"], tried["to_run"], tried["unknown"]) == (22, 11, [])
    assert tried["seconds"] > 0 < tried["bytes"]
    assert tried["guessed"] == []


def test_a_dry_run_guesses_the_time_of_a_method_by_that_of_the_others(output: Path) -> None:
    changes = {**DEFAULT, "methods": (*PLAN.methods, "distill")}
    tried = dry_run(PLAN.model_copy(update=changes), output, {})
    done = [json.loads(path.read_text(encoding="utf-8"))
            for path in output.glob("stages/transfer-*/done.json")]  # fmt: skip
    assert (tried["to_run"], tried["guessed"], tried["unknown"]) == (1, ["transfer/distill"], [])
    assert tried["seconds"] == pytest.approx(np.median([stage["seconds"] for stage in done]))


TUNED_PLAN: dict[str, Any] = {
    "main": "shot",
    "methods": ["source-encoded", "shot", {"name": "shot", "tune": True}],
    "seeds": [3, 4],
    "settings": TINY,
}


def test_every_tuned_method_tries_the_same_and_no_label_chooses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tried_by(score: str) -> list[dict[str, Any]]:
        trials = json.loads((tmp_path / "tuning.json").read_text(encoding="utf-8"))["trials"]
        assert len(trials) == np.prod([len(values) for values in GRID.values()])
        assert {trial["score"] for trial in trials} == {score}
        best = max(trial["value"] for trial in trials)
        assert [trial["value"] for trial in trials if trial["chosen"]] == [best]
        return list(trials)

    plan = BenchmarkPlan.model_validate(TUNED_PLAN)
    assert plan.methods == ("source-encoded", "shot", "shot-tuned")
    benchmark(plan, tmp_path, processes=0)
    tried = tried_by("ti_rank")
    (chosen,) = (trial for trial in tried if trial["chosen"])
    for seed in (3, 4):
        run = tmp_path / f"cells/synthetic/default/seed-{seed}"
        used = read_yaml(run / "transfer/shot-tuned/config.yaml")["shot"]
        assert {name: used[name] for name in GRID} == chosen["settings"]
    rows = told(tmp_path)["rows"]
    costs = {row["method"]: row["tuning_seconds"] for row in rows}
    assert costs["shot"] is None
    assert costs["shot-tuned"] == pytest.approx(sum(line["seconds"] for line in tried))
    fewer = plan.model_copy(update={"methods": plan.methods[:2]})
    assert ran_again(fewer, tmp_path) == []
    assert "## Tuning" in (tmp_path / "benchmark.md").read_text(encoding="utf-8")
    benchmark(fewer, tmp_path, processes=0)
    assert "## Tuning" not in (tmp_path / "benchmark.md").read_text(encoding="utf-8")
    monkeypatch.setattr("sfkt_cli.benchmark.plan.TUNE_BY", ("a score of pairs", "tr_mirror"))
    cells = cells_of(plan, {})
    tuned(cells, trial_cells(cells), tmp_path)
    tried_by("tr_mirror")


def test_several_commands_divide_the_stages_and_a_killed_ones_are_taken_up(tmp_path: Path) -> None:
    plan = {"main": "shot", "methods": ["source-only", "shot"], "seeds": [0, 1, 2],
            "settings": TINY, "output": str(tmp_path / "out")}  # fmt: skip
    (tmp_path / "my plan.yaml").write_text(json.dumps(plan), encoding="utf-8")
    command = [sys.executable, "-m", "sfkt_cli", "benchmark", str(tmp_path / "my plan.yaml"),
               "--processes", "0", "--json"]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)

    killed, *others = (start() for _ in range(3))
    claims = tmp_path / "out" / "claims"
    while not claims.is_dir() and killed.poll() is None:
        time.sleep(0.05)
    killed.kill()
    killed.communicate()
    ran = []
    for process in others:
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        events = [json.loads(line) for line in said.splitlines()]
        ran += [(e["name"], e["part"]) for e in events if e["event"] == "cell"]
    assert len(ran) == len(set(ran)) <= 3 * 4
    report = told(tmp_path / "out")
    assert {tuple(row["seeds"]) for row in report["rows"]} == {(0, 1, 2)}
    assert report["command"] == shlex.join(["sfkt", *command[3:]])


def test_processes_take_turns_on_the_gpus_that_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert gpus_of(1) == ["3"]
    assert gpus_of(3) == ["3", "5", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus_of(2) == ["", ""]


@pytest.mark.slow
def test_stages_run_in_processes_of_their_own(tmp_path: Path) -> None:
    plan = PLAN.model_copy(update={**DEFAULT, "methods": ("source-only", "shot", "tgkt")})
    benchmark(plan, tmp_path, processes=2)
    found = told(tmp_path)
    assert {row["method"] for row in found["rows"]} == {"source-only", "shot", "tgkt"}


@pytest.mark.slow
def test_a_process_that_is_killed_takes_only_its_own_stage_with_it(tmp_path: Path) -> None:
    settings = {**TINY, "source": {"epochs": 300, "width": 4, "bottleneck": 8}}
    changes = {**DEFAULT, "methods": ("source-only",), "seeds": (0, 1), "settings": settings}
    plan = PLAN.model_copy(update=changes)

    def kill_the_first_that_trains() -> None:
        while not list(tmp_path.glob("stages/source-*/metrics.jsonl")):
            time.sleep(0.05)
        for process in multiprocessing.active_children():
            process.kill()

    killer = threading.Thread(target=kill_the_first_that_trains)
    killer.start()
    with pytest.raises(RunError, match="was killed, perhaps because memory ran out"):
        benchmark(plan, tmp_path, processes=1)
    killer.join()
    found = told(tmp_path)
    assert {tuple(row["seeds"]) for row in found["rows"]} == {(1,)}
    text = (tmp_path / "benchmark.md").read_text(encoding="utf-8")
    assert "synthetic, default, seed 0: source-only" in text
    benchmark(plan, tmp_path, processes=1)
    assert "## Missing" not in (tmp_path / "benchmark.md").read_text(encoding="utf-8")


def test_tables_are_written_when_it_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*values: object, **more: object) -> None:
        raise Interrupted("stopped")

    plan = PLAN.model_copy(update=DEFAULT)
    monkeypatch.setattr("sfkt_cli.stages.source.source", stop)
    with pytest.raises(Interrupted):
        benchmark(plan, tmp_path, processes=0)
    found = told(tmp_path)
    assert found["rows"] == []
    (line,) = found["missing"]
    assert all(name in line for name in ("default", "seed 0", *PLAN.methods))
    assert line in (tmp_path / "benchmark.md").read_text(encoding="utf-8")


def test_all_that_is_planned_and_not_there_is_named() -> None:
    settings = [{"name": name, "settings": {"dataset": "synthetic"}} for name in "AB"]
    plan = BenchmarkPlan.model_validate(
        {"methods": ["shot", "tgkt", "oracle"], "seeds": [0, 1], "datasets": settings}
    )
    rows = {("A", "shot", 0), ("A", "shot", 1), ("A", "tgkt", 1)}
    found: dict[Key, dict[int, Measured]] = {}
    for dataset, method, seed in rows:
        found.setdefault(Key(dataset, "default", "test", method), {})[seed] = said(0.5, [1, 0])
    assert missing_rows(plan, cells_of(plan, {}), found) == [
        "A, default, seed 0: tgkt",
        "A, default, seeds 0, 1: oracle",
        "B, default, seeds 0, 1: shot, tgkt, oracle",
    ]


def test_every_machine_and_version_is_told(output: Path, tmp_path: Path) -> None:
    shutil.copytree(output, tmp_path / "copy", symlinks=True)
    (path,) = (tmp_path / "copy/stages").glob("transfer-shot-*/done.json")
    record = read_record(path, Done).model_dump(mode="json", exclude_unset=True)
    record["versions"]["torch"] = "1.0"
    del record["machine"]  # as earlier versions wrote it
    write_record(path, record)
    benchmark(PLAN.model_copy(update=DEFAULT), tmp_path / "copy", processes=0)
    here, there = told(tmp_path / "copy")["made_by"]
    assert (here["stages"], there["stages"]) == (5, 1)
    assert here["by"] != there["by"]
    assert "torch 1.0" in there["by"]
    assert "torch 1.0" in (tmp_path / "copy/benchmark.md").read_text(encoding="utf-8")


def test_what_the_plan_decides_is_no_setting() -> None:
    with pytest.raises(ConfigError, match="`seeds:"):
        cells_of(PLAN, {"seed": 3})
    with pytest.raises(ConfigError, match=r"evaluate\.oracle"):
        cells_of(PLAN.model_copy(update={"settings": {"evaluate.oracle": True}}), {})


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ({"variants": [{"name": "all"}, {"name": "none", "settings": {"tgkt": {"beta_f": 0}}}]},
         "tgkt.beta_f"),
        ({"sweeps": [{"setting": "tgkt.beta_f", "values": [1, 2]}]}, "tgkt.beta_f"),
        ({"datasets": [{"name": "more", "settings": {"synthetic.pairs": 90}},
                       {"name": "most", "settings": {"synthetic.pairs": 600}}]}, "synthetic.pairs"),
        ({"datasets": [{"name": "SUN", "settings": {"dataset": "sun-rgbd"},
                        "sensor_pairs": [["kv1", "kv2"]]}]}, "sun_rgbd.target_sensor"),
    ],
)  # fmt: skip
def test_what_is_varied_cannot_be_set_for_all(part: dict[str, Any], name: str) -> None:
    plan = BenchmarkPlan.model_validate({"seeds": [0], "settings": {"bridge.alpha_f": 2}, **part})
    with pytest.raises(ConfigError, match=name):
        cells_of(plan, {name: "xtion" if "sensor" in name else 60})
    assert cells_of(plan, {"bridge.alpha_f": 1.0})[0].config.bridge.alpha_f == 1


def test_what_a_single_data_set_says_may_be_set() -> None:
    mine = {"name": "mine", "settings": {"dataset": "folders", "prepare.root": "a"}}
    plan = BenchmarkPlan.model_validate({"seeds": [0], "datasets": [mine]})
    (cell,) = cells_of(plan, {"dataset": "folders", "prepare.root": "b"})
    assert cell.config.prepare.root == Path("b")


def test_the_main_method_is_among_those_compared() -> None:
    for methods in (("shot", "aad"), ("source-only", "shot-tuned", "oracle")):
        with pytest.raises(ConfigError, match="main 'tgkt' is not among the methods"):
            cells_of(BenchmarkPlan(methods=methods), {})
    for methods in (("shot", "oracle"), ("shot-tuned", "tgkt-tuned")):
        assert cells_of(BenchmarkPlan(methods=methods), {})


@pytest.mark.slow
def test_workers_do_not_outlive_a_killed_benchmark(tmp_path: Path) -> None:
    settings = {**TINY, "source": {"epochs": 10_000, "width": 4, "bottleneck": 8}}
    plan = {"title": "Long", "methods": ["shot"], "seeds": [0], "settings": settings,
            "output": str(tmp_path / "out")}  # fmt: skip
    (tmp_path / "plan.yaml").write_text(json.dumps(plan), encoding="utf-8")
    command = [sys.executable, "-m", "sfkt_cli", "benchmark", str(tmp_path / "plan.yaml")]
    root = str(Path(__file__).parents[2])
    started = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": root})

    def trained() -> list[Path]:
        return list((tmp_path / "out" / "stages").glob("source-*/metrics.jsonl"))

    while not trained() and started.poll() is None:
        time.sleep(0.1)
    started.kill()
    started.wait()
    (metrics,) = trained()
    deadline = time.monotonic() + 30
    while not (metrics.parent / "checkpoint").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(2)
    before = metrics.read_bytes()
    time.sleep(3)
    assert metrics.read_bytes() == before, "the worker goes on"


def said(accuracy: float, right: list[int], note: str | None = None) -> Measured:
    row = Row("m", 0, "test", len(right), accuracy, (0, 1), accuracy, accuracy, 0, 10.0, 100.0)
    names = [str(number) for number in range(len(right))]
    right_by_name = dict(zip(names, right, strict=True))
    return Measured(replace(row, note=note), right_by_name, {name: name for name in names})


def test_differences_are_taken_image_by_image_over_the_seeds() -> None:
    first = {0: said(0.75, [1, 1, 1, 0]), 1: said(1.0, [1, 1, 1, 1])}
    second = {0: said(0.5, [1, 1, 0, 0]), 1: said(0.25, [0, 0, 0, 1]), 2: said(0, [0])}
    found = paired(first, second)
    assert found is not None
    mean, bounds, p_value = found
    assert mean == pytest.approx((1 / 4 + 3 / 4) / 2)
    # The seeds' part alone reaches as far as t(1) = 12.706 errors of 1/4: more than there is.
    assert bounds == (-1, 1)
    assert p_value is not None
    assert 1 - 2 / np.pi * np.arctan(2) <= p_value < 1
    assert paired({0: first[0]}, second) == (1 / 4, None, None)
    assert paired(first, {5: said(0, [0])}) is None


def test_the_main_method_and_its_best_peer_are_one_comparison() -> None:
    sweep = {"setting": "tgkt.beta_f", "values": [1, Config().tgkt.beta_f]}
    right = {"source-only": [0, 0, 1], "shot": [0, 1, 1], "tgkt": [1, 1, 1], "oracle": [1, 1, 1]}
    plan = BenchmarkPlan.model_validate({"methods": [*right], "seeds": [0, 1], "sweeps": [sweep]})
    found: dict[Key, dict[int, Measured]] = {}
    for cell in cells_of(plan, {}):
        for method in cell.rows:
            hits = [1, 1, 0] if "= 1," in cell.variant else right[method]
            key = Key("synthetic", cell.variant, "test", method)
            note = "earlier" if (method, cell.seed) == ("shot", 1) else None
            measured = said(float(np.mean(hits)) - 0.1 * cell.seed, hits, note)
            found.setdefault(key, {})[cell.seed] = measured
    results = results_of(plan, cells_of(plan, {}), found)
    changed, same = (row for row in results if row.variant != "default")
    rows = {row.method: row for row in results if row.variant == "default"}
    assert rows["tgkt"].versus == "shot"
    assert rows["tgkt"].difference == pytest.approx(1 / 3)
    assert rows["shot"].versus == "tgkt"
    assert rows["oracle"].versus is None
    assert rows["shot"].mean == pytest.approx(2 / 3 - 0.05)
    assert rows["shot"].deviation == pytest.approx(0.1 / np.sqrt(2))
    assert (changed.versus, same.versus, same.p_value) == ("default", None, None)

    def alone(key: Key) -> float:
        compared = paired(found[key._replace(method="tgkt", variant="default")], found[key])
        assert compared is not None
        assert compared[2] is not None
        return compared[2]

    # Three comparisons: tgkt with shot, with source-only and with its variant that differs.
    key = Key("synthetic", "default", "test", "tgkt")
    keys = (key._replace(method="shot"), key._replace(method="source-only"))
    expected = holm([alone(other) for other in (*keys, key._replace(variant=changed.variant))])
    compared_rows = (rows["shot"], rows["source-only"], changed)
    assert [row.p_value for row in compared_rows] == pytest.approx(expected)
    assert rows["tgkt"].p_value == rows["shot"].p_value
    (table,) = tables_of([*rows.values()])
    assert table.footnotes == ("(1) seed 1: earlier",)
    assert [line["method"] for line in table.lines] == ["source-only", "shot (1)", "tgkt"]


def compared(
    plan: dict[str, Any], right: dict[tuple[str, str], dict[int, list[int]]]
) -> dict[tuple[str, str], Result]:
    """Results, by variant and method, of what each got ``right`` on the images of each seed."""
    whole = BenchmarkPlan.model_validate({"seeds": [0, 1, 2], **plan})
    found = {
        Key("synthetic", variant, "test", method): {
            seed: said(float(np.mean(hits)), hits) for seed, hits in seeds.items()
        }
        for (variant, method), seeds in right.items()
    }
    return {(row.variant, row.method): row for row in results_of(whole, cells_of(whole, {}), found)}


GOOD, FAIR, POOR = [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]


def over(*hits: list[int]) -> dict[int, list[int]]:
    return dict(enumerate(hits))


def test_tuned_rows_that_kept_the_default_do_not_count_twice() -> None:
    tuned_too = [{"name": name, "tune": True} for name in ("shot", "tgkt")]
    right = {
        "shot": over(FAIR, POOR, FAIR),
        "aad": over(POOR, POOR, FAIR),
        "tgkt": over(*[GOOD] * 3),
    }
    plain = {("default", name): hits for name, hits in right.items()}
    alone = compared({"methods": [*right]}, plain)
    copies = {("default", f"{name}-tuned"): right[name] for name in ("shot", "tgkt")}
    both = compared({"methods": [*right, *tuned_too]}, plain | copies)
    for key, row in alone.items():
        assert both[key].p_value == row.p_value
    assert both["default", "shot-tuned"].p_value == alone["default", "shot"].p_value
    other = {**copies, ("default", "shot-tuned"): over(POOR, POOR, POOR)}
    assert (
        compared({"methods": [*right, *tuned_too]}, plain | other)["default", "aad"].p_value
        != alone["default", "aad"].p_value
    ), "three comparisons"


def test_the_best_peer_has_most_seeds_and_fewer_seeds_are_told() -> None:
    right = {"shot": over(POOR, POOR, FAIR), "aad": over(GOOD), "tgkt": over(FAIR, FAIR, FAIR)}
    rows = compared({"methods": [*right]}, {("default", name): r for name, r in right.items()})
    assert rows["default", "tgkt"].versus == "shot"
    assert rows["default", "tgkt"].note is None
    assert rows["default", "aad"].note is None, "all of its own seeds are compared"
    short = {**right, "tgkt": over(FAIR, FAIR)}
    rows = compared({"methods": [*right]}, {("default", name): r for name, r in short.items()})
    assert str(rows["default", "shot"].note).endswith("0, 1")
    text = latex_tables(narrow(tables_of([*rows.values()]), ["here, seed 2: tgkt"]))
    assert text.count(r"\textbf{") == 2, "in comparisons and costs"
    assert text.count(r"shot (1) & \textbf{") == 2, "not aad with its single seed"
    assert text.count("Missing: here, seed 2: tgkt") == 1


def test_whichever_row_of_the_main_method_is_there_is_compared_with() -> None:
    methods = ["shot", {"name": "aad", "tune": True}, {"name": "tgkt", "tune": True}]
    right = {"shot": over(POOR, FAIR, POOR), "aad-tuned": over(POOR, POOR, POOR),
             "tgkt-tuned": over(GOOD, GOOD, FAIR)}  # fmt: skip
    rows = compared({"methods": methods}, {("default", name): r for name, r in right.items()})
    against = {method: row.versus for (_, method), row in rows.items()}
    assert against == {"shot": "tgkt-tuned", "aad-tuned": "tgkt-tuned", "tgkt-tuned": "shot"}


def test_a_method_that_the_first_variant_lacks_is_compared_within_its_own() -> None:
    variants = [{"name": "a", "methods": ["tgkt"]}, {"name": "b", "methods": ["tgkt", "shot"]}]
    right = {("a", "tgkt"): over(GOOD, GOOD, FAIR), ("b", "tgkt"): over(FAIR, GOOD, FAIR),
             ("b", "shot"): over(POOR, FAIR, POOR)}  # fmt: skip
    rows = compared({"variants": variants}, right)
    assert {key: row.versus for key, row in rows.items()} == {
        ("a", "tgkt"): None, ("b", "tgkt"): "a", ("b", "shot"): "tgkt",
    }  # fmt: skip


def test_a_tiny_p_is_no_zero() -> None:
    right = {"shot": over([0] * 4, [0] * 4, [0] * 4), "tgkt": over(*[GOOD] * 3)}
    rows = compared({"methods": [*right]}, {("default", name): r for name, r in right.items()})
    tiny = [replace(row, p_value=0.0004) for row in rows.values()]
    (table,) = tables_of(tiny)
    assert {line["p"] for line in table.lines} == {"< 0.001"}
    assert "$<$ 0.001" in latex_tables([table])


def test_the_same_image_is_compared_where_a_variant_changes_the_data(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for label in ("desk", "lamp"):
        for number in range(20):
            target = random.integers(300, 6000) + random.integers(0, 1500, (16, 16))
            save(tmp_path / f"data/tr/{label}/rgb/{number}.png", scene(number, 16, 16))
            save(tmp_path / f"data/tr/{label}/target/{number}.png", target.astype(np.uint16))
    save_weights(tmp_path / "mine.pth", classes=2, seed=5)
    settings = {**TINY, "dataset": "folders", "prepare.root": str(tmp_path / "data"),
                "source": {"checkpoint": str(tmp_path / "mine.pth"), "width": 4}}  # fmt: skip
    more = {"name": "more", "settings": {"split.source": 0}}
    plan = {"methods": ["source-only"], "seeds": [0], "settings": settings,
            "variants": [{"name": "default"}, more]}  # fmt: skip
    benchmark(BenchmarkPlan.model_validate(plan), tmp_path / "out", processes=0)
    rows = told(tmp_path / "out")["rows"]
    (row,) = (row for row in rows if (row["variant"], row["split"]) == ("more", "target"))
    assert 0 < row["mean"] < 1
    assert row["difference"] == 0, "it is the same model"


def test_data_without_labels_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders(tmp_path / "data", labels=())
    for number in range(12):
        save(tmp_path / f"data/tr/target/{number}.png", depth(number))
    save_weights(tmp_path / "mine.pth", classes=2)
    settings = {**TINY, "dataset": "folders", "prepare.root": str(tmp_path / "data"),
                "classes.tr": ["desk", "lamp"],
                "source": {"checkpoint": str(tmp_path / "mine.pth"), "width": 4}}  # fmt: skip
    plan = {"methods": ["source-only"], "seeds": [0, 1], "settings": settings}
    benchmark(BenchmarkPlan.model_validate(plan), tmp_path / "out", processes=0)
    text = (tmp_path / "out/benchmark.md").read_text(encoding="utf-8")
    assert text.count("folders: no image has a label, so there is no accuracy") == 1
    assert "folders: no image has a label" in " ".join(capsys.readouterr().err.split())


def test_each_pair_of_sensors_has_its_curves(tmp_path: Path) -> None:
    pairs = [["kv1", "kv2"], ["kv2", "kv1"]]
    data = {"name": "SUN", "settings": {"dataset": "sun-rgbd"}, "sensor_pairs": pairs}
    sweep = {"setting": "tgkt.beta_f", "values": [1, 2]}
    plan = BenchmarkPlan.model_validate({"seeds": [0], "datasets": [data], "sweeps": [sweep]})
    cells = cells_of(plan, {})
    found = {Key(cell.dataset, cell.variant, "test", "tgkt"): {0: said(0.5, [1, 0])}
             for cell in cells}  # fmt: skip
    for key in [key for key in found if "= 2," in key.variant]:
        found[key] = {0: said(0.5, [1, 0], "the student was not kept")}
    results = [replace(row, note="of a comparison") for row in results_of(plan, cells, found)]
    drawn = draw_sweeps(plan, results, found, tmp_path)
    names = [f"sweep-tgkt.beta_f-test-SUN-{a}-to-{b}.png" for a, b in pairs]
    assert [name for name, _ in drawn] == names
    for _, caption in drawn:
        assert "tgkt with tgkt.beta_f = 2" in caption
        assert caption.endswith("the student was not kept")
        assert "comparison" not in caption, "a curve has none"
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_each_variant_and_method_has_its_table_of_sensor_pairs() -> None:
    pairs = [["kv1", "kv2"], ["kv2", "kv1"]]
    data = {"name": "SUN", "settings": {"dataset": "sun-rgbd"}, "sensor_pairs": pairs}
    variants = [{"name": name, "methods": ["shot", "tgkt"]} for name in ("paper", "ours")]
    plan = BenchmarkPlan.model_validate({"seeds": [0], "datasets": [data], "variants": variants})
    cells = cells_of(plan, {})
    found = {
        Key(cell.dataset, cell.variant, "test", method): {0: said(0.1 + 0.1 * number, [1, 0])}
        for number, (cell, method) in enumerate(product(cells, ("shot", "tgkt")))
    }
    tables = sensor_tables(plan, results_of(plan, cells, found))
    shown = {tuple(table.title.split(": ")[1].split(", ")[:2]): table for table in tables}
    assert {*shown} == {*product(("paper", "ours"), ("shot", "tgkt"))}
    for (variant, method), table in shown.items():
        key = Key("SUN kv1 to kv2", variant, "test", method)
        assert table.lines[0]["kv2"] == f"{100 * found[key][0].row.accuracy:.1f}"
    assert len({*re.findall(r"\\label.*", latex_tables(tables))}) == len(tables)
    (one, *_) = sensor_tables(
        plan.model_copy(update={"variants": plan.variants[:1]}), results_of(plan, cells, found)
    )
    assert "paper" not in one.title


def test_sensor_pairs_unfold_into_data_sets() -> None:
    plan = BenchmarkPlan.model_validate(
        {"seeds": [0], "datasets": [
            {"name": "SUN", "settings": {"dataset": "sun-rgbd"}, "sensor_pairs": "all"}
        ]}
    )  # fmt: skip
    cells = cells_of(plan, {})
    assert len(cells) == 16
    assert cells[1].dataset == "SUN kv1 to kv2"
    assert cells[1].config.sun_rgbd.target_sensor == "kv2"


def test_without_a_list_of_data_sets_it_is_that_of_the_settings() -> None:
    plan = BenchmarkPlan.model_validate({"seeds": [0], "settings": {"dataset": "nyu-depth"}})
    assert cells_of(plan, {})[0].folder == Path("cells/nyu-depth/default/seed-0")
    assert cells_of(plan, {"dataset": "rgb-nir"})[0].dataset == "rgb-nir"


def test_the_output_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "plan.yaml").write_text("output: ~/bench\n", encoding="utf-8")
    assert read_plan(tmp_path / "plan.yaml").output == tmp_path / "bench"


def test_all_mistakes_are_named_at_once(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    twice = "variants: [{name: a}, {name: a}]"
    text = f"seed: [1]\nmethods: 3\n{twice}\nsweeps: [{{setting: s, valuse: 1}}]\n"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_plan(file)
    text = str(caught.value)
    assert "did you mean seeds" in text
    assert "did you mean values" in text
    assert "methods = 3" in text
    assert "a occurs twice" in text


def test_wrong_settings_and_methods_are_named_before_anything_runs(tmp_path: Path) -> None:
    plan = BenchmarkPlan.model_validate(
        {"methods": ["tgkt", "shott"], "main": "tgktt",
         "variants": [{"name": "v", "settings": {"bridge.alpha": 1}}]}
    )  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        benchmark(plan, tmp_path / "out", processes=0)
    assert "'shott' is unknown" in str(caught.value)
    assert "main 'tgktt' is unknown: choose from tgkt" in str(caught.value)
    assert "unknown setting bridge.alpha" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_demo_and_the_usual_methods_unfold() -> None:
    assert cells_of(DEMO, {"runtime": {"gpus": 0}})[0].config.runtime.gpus == 0
    students = cells_of(BenchmarkPlan(), {})[0].students
    assert {method for method, _ in students.values()} == set(METHODS)


@pytest.mark.parametrize("name", ["benchmark-demo", "benchmark-real", "ablation", "paper-tables"])
def test_the_files_that_come_along_unfold(name: str) -> None:
    file = Path(__file__).parents[2] / "sample_configs" / f"{name}.yaml"
    first = file.read_text(encoding="utf-8").partition("\n")[0]
    assert first.startswith(f"# sfkt benchmark sample_configs/{name}.yaml")
    plan = read_plan(file)
    cells = cells_of(plan, {})
    assert {cell.seed for cell in cells} == {0, 1, 2}
    assert len({cell.folder for cell in cells}) == len(cells)


def test_the_papers_tables_have_the_settings_of_the_papers_method() -> None:
    folder = Path(__file__).parents[2] / "sample_configs"
    plan, alone = (read_yaml(folder / f"{name}.yaml") for name in ("paper-tables", "paper"))
    by_data = {data["name"]: data["settings"].get("encoding") for data in plan["datasets"]}
    assert plan["variants"][0]["settings"] | {"encoding": "window"} == alone
    assert by_data == {"SUN RGB-D": "window", "DIML RGB-D": "window", "RGB-NIR Scene": None}
