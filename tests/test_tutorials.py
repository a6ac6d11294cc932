"""The tutorials are true: their commands run, in small, and the ONNX file runs without sfkt."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models
from typer.testing import CliRunner

from sfkt_cli import load_student
from sfkt_cli.cli import app
from sfkt_cli.evaluation import exported
from sfkt_cli.settings.config import Config
from sfkt_cli.training.recipes import start_student
from tests.methods.test_methods import make_batch, make_outputs, make_source

DOCS = Path(__file__).parent.parent / "docs"
SMALLER = {"image_size=224": "image_size=32", "480x640": "48x64"}
SETTINGS = {
    "prepare": "image_size=32 synthetic.pairs=200 prepare.workers=1",
    "source": "source.epochs=1 source.width=4 training.min_steps=2 runtime.gpus=0",
    "bridge": "bridge.epochs=1 bridge.width=4 training.min_steps=2 runtime.gpus=0",
    "transfer": "transfer.epochs=1 training.min_steps=2 runtime.gpus=0",
    "evaluate": "evaluate.oracle=false evaluate.pictures=false",
}
"""What makes the commands of a page quick."""
SETTINGS["benchmark"] = " ".join(
    text for name, text in SETTINGS.items() if name != "prepare"
).replace("evaluate.oracle=false", "image_size=32 synthetic.pairs=200")  # fmt: skip


def blocks(page: str, language: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def run_commands(text: str) -> None:
    """Every command of a text but pip, with smaller numbers."""
    for command in text.strip().splitlines():
        for large, small in SMALLER.items():
            command = command.replace(large, small)
        program, *words = shlex.split(command, comments=True)
        if program == "pip":
            continue
        assert program == "sfkt"
        for setting in SETTINGS.get(words[0], "").split():
            words += ["--set", setting]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, f"{command}: {result.output}\n{result.exception}"


def record(folder: Path) -> None:
    """The folders of the tutorial: shapes of which depth and colour tell the same."""
    random = np.random.default_rng(0)

    def write(path: Path, *, rgb: bool) -> None:
        mask = np.zeros((48, 64), bool)
        down, right = random.integers(4, 20, 2)
        mask[down : down + 20, right : right + 24] = True
        depth = np.where(mask, 900, 2000) + random.integers(0, 30, mask.shape)
        colour = np.stack([np.where(mask, 200, 60) + random.integers(0, 9, mask.shape)] * 3, 2)
        for target in [path] if not rgb else [path, Path(str(path).replace("target", "rgb"))]:
            target.parent.mkdir(parents=True, exist_ok=True)
            is_rgb = rgb and "rgb" in str(target.relative_to(folder))
            Image.fromarray(colour.astype(np.uint8) if is_rgb else depth.astype(np.uint16)).save(
                target
            )

    for number in range(24):
        write(folder / f"recordings/ti/target/place{number % 6}/{number}.png", rgb=True)
        write(folder / f"recordings/tr/target/{number}.png", rgb=False)
    for name in ("bowl", "cup", "mug"):
        for number in range(6):
            write(folder / f"recordings/tr/{name}/{name}{number}.png", rgb=False)
    for number in range(1, 4):
        write(folder / f"new_images/{number:04d}.png", rgb=False)


@pytest.mark.filterwarnings("ignore")
def test_the_tutorial_for_engineers_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(exported, "LONGEST_S", 0)
    record(tmp_path)
    torch.manual_seed(0)
    torch.save(models.resnet18(num_classes=3).state_dict(), tmp_path / "rgb_model.pth")
    monkeypatch.chdir(tmp_path)
    run_commands("".join(blocks("tutorial-engineer.md", "console")))
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 4
    inputs = json.loads((tmp_path / "runs/larger/transfer/tgkt/done.json").read_text())["inputs"]
    assert "warm start" in inputs
    (example,) = blocks("tutorial-engineer.md", "python")
    assert len([line for line in example.splitlines() if line]) == 5
    alone = "import sys\nsys.modules['sfkt_cli'] = sys.modules['torch'] = None\n" + example
    done = subprocess.run(
        [sys.executable, "-c", alone], capture_output=True, text=True, check=False, env={}
    )
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("bowl", "cup", "mug"))


@pytest.mark.filterwarnings("ignore")
def test_the_notebook_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setattr(exported, "LONGEST_S", 0)
    names: dict[str, object] = {}
    notebook = json.loads((DOCS / "notebook.ipynb").read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        assert not cell.get("outputs"), "the notebook is kept without outputs"
        if text.startswith("!"):
            run_commands(text.replace("!", ""))
        elif cell["cell_type"] == "code":
            exec(text.replace("480, 640", "48, 64"), names)
    last = capsys.readouterr().out.strip().splitlines()[-1].split()[0]
    assert last in load_student("runs/notebook").classes


@pytest.mark.filterwarnings("ignore")
def test_the_tutorial_for_researchers_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (plan,) = blocks("tutorial-researcher.md", "yaml")
    (tmp_path / "compare.yaml").write_text(plan, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    run_commands("".join(blocks("tutorial-researcher.md", "console")))
    assert "tgkt" in (tmp_path / "runs/compare/benchmark.md").read_text(encoding="utf-8")
    assert "shot" in (tmp_path / "table.md").read_text(encoding="utf-8")


def test_the_method_of_the_tutorial_learns() -> None:
    names: dict[str, Any] = {"__name__": "tutorial"}
    (example,) = blocks("tutorial-researcher.md", "python")
    exec(example, names)
    source = make_source()
    method = names["Entropy"](start_student(source), make_outputs(source), Config())
    terms = method(make_batch())
    assert set(terms) == set(method.weights)
    torch.autograd.backward(terms["entropy"])
    assert any(p.grad is not None for p in method.student.backbone.parameters())


def test_the_python_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks("python-api.md", "python"):
        exec(block, names)
    assert "sphere" in capsys.readouterr().out


@pytest.mark.parametrize("guarded", [True, False])
def test_the_python_page_is_a_script_whose_images_several_processes_decode(
    guarded: bool, tmp_path: Path
) -> None:
    guard = 'if __name__ == "__main__":'
    example = blocks("python-api.md", "python")[0]
    assert guard in example
    forced = "from sfkt_cli.data import ingest\ningest.FEW_IMAGES, ingest.cores = 1, lambda: 2\n"
    script = forced + (example if guarded else example.replace(guard, "if True:"))
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(DOCS.parent)},
    )  # fmt: skip
    assert (done.returncode == 0) == guarded, done.stderr
    assert (tmp_path / "runs/api/transfer/tgkt/done.json").exists() == guarded
    assert (f"below `{guard}`" in done.stderr) != guarded
