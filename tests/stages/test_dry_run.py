"""A dry run says what a stage would do, and leaves every byte as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from sfkt_cli.settings.runs import Run
from tests.data.make_archives import folders
from tests.stages.test_json import TINY, called

STORE, SOURCE, BRIDGE = (
    "prepare/transfer.h5",
    "source/model.safetensors",
    "bridge/model.safetensors",
)
READS = {
    "source": {"prepare/source.h5"},
    "bridge": {STORE, SOURCE},
    "transfer --method shot": {STORE, SOURCE},
    "transfer --method nrc": {STORE, SOURCE},
    "transfer --method tgkt": {STORE, SOURCE, BRIDGE},
    "evaluate": {STORE, SOURCE, BRIDGE, "prepare/test.h5", "transfer/tgkt/model.safetensors"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, untrained_run: Run) -> Path:
    folder = tmp_path_factory.mktemp("dry")
    shutil.copytree(untrained_run.folder, folder / "runs/synthetic")
    settings = {**TINY, "evaluate": {"oracle": True}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    return folder


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in sorted(folder.rglob("*"))
    }


def plans(command: str, capsys: pytest.CaptureFixture[str], *more: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    words = [*command.split(), "--config", "tiny.yaml", "--dry-run", "--json", *more]
    assert called(*words) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {each["event"] for each in events} <= {"plan", "result", "warning"}
    return [each for each in events if each["event"] == "plan"]


@pytest.mark.parametrize("command", READS)
def test_nothing_is_written(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    before = state(folder)
    forced = [] if command == "evaluate" else ["--force"]
    found = plans(command, capsys, "--run", "runs/synthetic", *forced)
    assert state(folder) == before
    (plan,) = found[-1:]
    assert plan["seconds"] > 0
    assert plan["reads"] == {
        str(path): path.stat().st_size
        for path in (Path("runs/synthetic", name) for name in READS[command])
    }
    if command != "evaluate":
        trial = plan["trial"]
        assert trial["steps"] >= 2
        assert trial["epochs"] == {"bridge": 2}.get(command, 1)
        assert 0 < trial["trained"] <= trial["parameters"]
        assert trial["step_s"] > 0
        assert plan["writes"]["model.safetensors"] > 1000
    else:
        assert "oracle" in plan["does"]


def test_a_source_model_that_is_brought_is_read_and_no_labelled_image(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    model = "runs/synthetic/source/model.safetensors"
    mixture = "source.mixture=[runs/synthetic, runs/synthetic/source]"
    (plan,) = plans("source --force", capsys, "--run", "runs/synthetic", "--set", mixture)
    assert {*plan["reads"]} == {f"runs/synthetic/{STORE}", model}


def test_stages_whose_input_is_missing_come_later(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    shutil.copy(folder / "tiny.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delattr("os.sched_getaffinity", raising=False)  # macOS has none
    first, *later = plans("run", capsys)
    assert set(first["writes"]) == {"source.h5", "transfer.h5", "test.h5"}
    assert [plan["after"] for plan in later] == ["prepare", "source", "bridge", "transfer"]
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def test_what_is_slow_on_a_cpu_is_tried_with_few_images_and_scaled_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sfkt_cli.training.trial.PATIENCE_S", 0.0)
    (plan,) = plans("bridge --force", capsys, "--run", "runs/synthetic")
    assert plan["trial"]["scaled"]
    assert any("scaled up" in note for note in plan["notes"])


def test_what_the_stage_would_refuse_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    words = ("prepare", "synthetic", "--config", "tiny.yaml", "--set", "seed=5", "--dry-run")
    assert called(*words) == 1
    assert "was 0, now 5" in capsys.readouterr().err


def test_a_prepared_archive_may_be_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folders(tmp_path / "mine").rename("archive")
    words = ("prepare", "folders", "--root", "archive", "--set", "image_size=30")
    assert called(*words) == 0
    Path("archive").rename("mine")
    for more in ((), ("--dry-run",)):
        capsys.readouterr()
        assert called(*words, *more) == 0
        assert "finished already" in capsys.readouterr().err
    Path("archive").mkdir()  # such as where a disk is mounted
    Path("archive/.download.lock").touch()
    assert called(*words) == 0
    assert called("prepare", "folders", "--root", "archives") == 1
    assert "archives does not exist" in capsys.readouterr().err
    for root in ("mine", str(Path("mine").absolute())):
        assert called("prepare", "folders", "--root", root) == 0
        assert "finished already" in capsys.readouterr().err
    (Path("mine") / "tr/mug/rgb/0.jpg").touch()
    assert called("prepare", "folders", "--root", "mine") == 1
    assert "prepare.root: was 'archive', now 'mine'" in capsys.readouterr().err


def test_a_dry_run_of_prepare_tells_what_prepare_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folders(tmp_path / "mine")
    (tmp_path / "mine/tr/mug/rgb/7.heic").touch()
    words = ("prepare", "folders", "--root", "mine", "--set", "folders.registered=false", "--json")
    told = []
    for more in (("--dry-run",), ()):
        assert called(*words, *more) == 0
        events = map(json.loads, capsys.readouterr().out.splitlines())
        told.append([event["message"] for event in events if event["event"] == "warning"])
    assert any("heic" in message for message in told[0])
    assert told[0] == told[1][: len(told[0])]


def test_a_download_is_told_and_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("urllib.request.urlopen", None)
    assert called("prepare", "rgb-nir", "--download", "--dry-run", "--json") == 0
    said = capsys.readouterr()
    events = [json.loads(line) for line in said.out.splitlines()]
    first, second = (each for each in events if each["event"] == "plan")
    assert first["fetches"] == {
        "https://ivrlwww.epfl.ch/supplementary_material/cvpr11/nirscene1.zip": 952_431_486
    }
    assert second == {"event": "plan", "stage": "prepare", "after": "the download"}
    assert "908.3 MB" in said.err
    assert not list(tmp_path.iterdir())
    assert called("prepare", "diml-rgbd", "--download", "--dry-run") == 1
    assert "diml-rgbd cannot be fetched: only nyu-depth" in capsys.readouterr().err
