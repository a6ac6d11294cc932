"""No TI pairs at all: prepare warns, the bridge is refused, and transfer falls back to SHOT."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sfkt_cli.dry_run import dry_run_all
from sfkt_cli.errors import DataError
from sfkt_cli.pipeline import run_all, run_prepare, train
from sfkt_cli.settings.options import Options
from sfkt_cli.settings.runs import Run
from tests.data.make_archives import folders
from tests.stages.evaluation_runs import save_weights

SMALL = (
    "dataset=folders", "image_size=16", "classes.tr=[desk, lamp]", "training.min_steps=2",
    "source.epochs=1", "source.width=4", "transfer.epochs=1", "runtime.batch_size=8",
    "evaluate.pictures=false", "evaluate.oracle=false", "runtime.gpus=0", "prepare.workers=1",
)  # fmt: skip


def test_a_run_falls_back_to_shot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folders(tmp_path / "data", labels=("desk", "lamp"))
    shutil.rmtree(tmp_path / "data" / "ti")
    options = Options(
        run=tmp_path / "run", assignments=[*SMALL, f"prepare.root={tmp_path / 'data'}"]
    )
    run_prepare(options)
    train("source", options)
    plans = dry_run_all(options)["plans"]
    assert [plan["stage"] for plan in plans] == ["prepare", "source", "transfer/shot", "evaluate"]
    run = Run(Path(run_all(options)["run"]))
    said = capsys.readouterr().err
    assert "no TI pairs" in said
    assert "shot is used instead" in said
    assert run.finished("transfer/shot")
    assert not run.finished("bridge")
    with pytest.raises(DataError, match="holds no TI pairs"):
        train("bridge", Options(run=run.folder))
    for method in ("socket", "tgkt"):
        with pytest.raises(DataError, match=f"{method} needs them"):
            train("transfer", Options(run=run.folder, flags={"transfer.method": method}))


def test_a_model_brought_along_needs_no_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folders(tmp_path / "data", labels=("desk", "lamp"))
    shutil.rmtree(tmp_path / "data" / "ti")
    save_weights(tmp_path / "mine.pth", classes=2)
    brought = (
        "source.checkpoint=mine.pth", "source.backbone=small", "source.width=4",
        "source.mean=[0.5, 0.5, 0.5]", "source.std=[0.2, 0.2, 0.2]",
    )  # fmt: skip
    root = f"prepare.root={tmp_path / 'data'}"
    run = Run(tmp_path / "run")
    run_all(Options(run=run.folder, assignments=[*SMALL, *brought, root]))
    assert "TI RGB images" not in capsys.readouterr().err
    assert run.finished("transfer/shot")
