"""Typical mistakes: each ends in one message that says what, the value seen, and what to do.

A row is what the user did, the command, and what the message must hold. Exit code 1: an error that
can be mended; 2: wrong usage. Never a traceback.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sfkt_cli import cli
from sfkt_cli.errors import DataError, first_line
from sfkt_cli.files import locking
from sfkt_cli.models.backbones import SmallResNet
from sfkt_cli.models.saving import load_model, save_model
from sfkt_cli.settings.config import Config, build
from sfkt_cli.settings.runs import Run
from sfkt_cli.settings.stage import Stage
from sfkt_cli.stages.prepare import prepare
from sfkt_cli.student import read_image
from tests.stages.conftest import SETTINGS, add_models

PREPARE = "prepare folders --root mine --set image_size=16 --set prepare.workers=1"
BRING = "source --run run --force --set source.width=4 --set"


@dataclass(frozen=True)
class Mistake:
    """One row of the table."""

    what: str  # the user did
    command: str  # words after ``sfkt``
    says: tuple[str, ...]  # what the message holds
    make: Callable[[Path], object] = lambda folder: None  # changes the command's folder
    code: int = 1


def picture(path: Path, *, rgb: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(path.name)).integers(500, 4000, (16, 16))
    array = np.stack([noise % 255] * 3, 2).astype(np.uint8) if rgb else noise.astype(np.uint16)
    Image.fromarray(array).save(path)


def own_images(folder: Path) -> None:
    """A folder as docs/datasets.md draws it."""
    for number in range(4):
        picture(folder / f"mine/ti/rgb/room/{number}.png", rgb=True)
        picture(folder / f"mine/ti/target/room/{number}.png", rgb=False)
        for name in ("cup", "mug"):
            picture(folder / f"mine/tr/{name}/{number}.png", rgb=False)


def swap(folder: Path) -> None:
    own_images(folder)
    (folder / "mine/ti/rgb").rename(folder / "mine/ti/depth")
    (folder / "mine/ti/target").rename(folder / "mine/ti/rgb")
    (folder / "mine/ti/depth").rename(folder / "mine/ti/target")


def rgb_as_target(folder: Path) -> None:
    own_images(folder)
    for path in sorted((folder / "mine/tr").rglob("*.png")):
        picture(path, rgb=True)


def lose_partner(folder: Path) -> None:
    own_images(folder)
    (folder / "mine/ti/target/room/2.png").unlink()


def cut_image(folder: Path) -> None:
    own_images(folder)
    path = folder / "mine/tr/mug/3.png"
    path.write_bytes(path.read_bytes()[:40])


def jpeg_depth(folder: Path) -> None:
    own_images(folder)
    Image.new("L", (16, 16), 90).save(folder / "mine/tr/mug/9.jpg")


def manifest(text: str) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        own_images(folder)
        (folder / "mine/manifest.csv").write_text(text)

    return make


def only_targets(folder: Path) -> None:
    own_images(folder)
    shutil.rmtree(folder / "mine/ti")
    config = {
        **SETTINGS,
        "dataset": "folders",
        "prepare": {"root": str(folder / "mine"), "workers": 1},
    }
    shutil.rmtree(folder / "run")
    run, settings = Run(folder / "run"), build(config)
    prepare(settings, run)
    add_models(run, settings)


def weights(folder: Path, classes: int = 6, width: int = 4) -> None:
    state = {f"{n}": v for n, v in SmallResNet(width).state_dict().items()}
    state |= {"fc.weight": torch.randn(classes, 4 * width), "fc.bias": torch.zeros(classes)}
    save_file(state, folder / "w.safetensors")


def forget(*stages: str) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        for stage in stages:
            (folder / f"run/{stage}/done.json").unlink()

    return make


def shift_labels(folder: Path) -> None:
    path = folder / "run/prepare/test.h5"
    with h5py.File(path, "r") as file:
        labels = file["labels/label"]
        offset, values = labels.id.get_offset(), np.array(labels)
    with path.open("rb+") as raw:
        raw.seek(offset)
        raw.write((values + 1).astype(values.dtype).tobytes())


def truncate(folder: Path) -> None:
    path = folder / "run/prepare/transfer.h5"
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size // 2)


def text_file(name: str, text: str = "nothing useful") -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


MISTAKES = [
    Mistake("wrong path", "prepare folders --root nowhere", ("nowhere", "--root")),
    Mistake("empty folder", PREPARE, ("mine", "--root"), lambda f: (f / "mine").mkdir()),
    Mistake("swapped modalities", PREPARE, ("0.png", "3 channels", "swapped"), swap),
    Mistake("RGB given as target", PREPARE, ("0.png", "is it an RGB image"), rgb_as_target),
    Mistake("no partner", PREPARE, ("2.png", "no partner", "restore"), lose_partner),
    Mistake("damaged image", PREPARE, ("3.png", "damaged"), cut_image),
    Mistake("JPEG as depth", PREPARE, ("9.jpg", "8 bit", "folders.unit"), jpeg_depth),
    Mistake(
        "misspelled class",
        f"{PREPARE} --set classes.tr=[mugg]",
        ("mugg", "did you mean"),
        own_images,
    ),
    Mistake(
        "manifest without columns",
        PREPARE,
        ("manifest.csv", "rgb, target, label"),
        manifest("a,b\n1,2\n"),
    ),
    Mistake(
        "manifest with a wrong path",
        PREPARE,
        ("gone.png", "line 2"),
        manifest("rgb,target,label,role,group\n,gone.png,mug,target,a\n"),
    ),
    Mistake("unknown data set", "prepare nyu", ("nyu-depth",)),
    Mistake("number for a data set", "prepare --set dataset=3", ("dataset = 3", "nyu-depth")),
    Mistake("unknown data set for a template", "config init nyu", ("'nyu'", "nyu-depth")),
    Mistake(
        "unknown choice",
        "bridge --run run --set encoding=norms",
        ("'norms'", "did you mean normals", "hha"),
    ),
    Mistake(
        "several mistakes in a configuration",
        "config check my.yml",
        (
            "3 settings are wrong",
            "my.yml: unknown setting bridge.epoch",
            "bridge.epochs?",
            "tgkt?",
            "'many'",
        ),
        text_file("my.yml", "bridge: {epoch: 3, alpha_f: many}\ntransfer: {method: tgtk}"),
    ),
    Mistake("no data set", "prepare", ("which data set",), code=2),
    Mistake("unknown command", "trian", ("trian", "Did you mean"), code=2),
    Mistake("unknown option", "bridge --epoch 3", ("--epoch",), code=2),
    Mistake("setting as an option", "bridge --epochs 3", ("--set bridge.epochs=VALUE",), code=2),
    Mistake(
        "setting of no stage as an option",
        "evaluate --batch-size=3",
        ("Did you mean --set runtime.batch_size=VALUE?",),
        code=2,
    ),
    Mistake(
        "setting without its section",
        "bridge --run run --set epochs=3",
        ("did you mean bridge.epochs?",),
    ),
    Mistake(
        "method's setting without its section",
        "transfer --run run --method socket --set beta_im=3",
        ("did you mean socket.beta_im?",),
    ),
    Mistake(
        "no list", "prepare folders --set classes.tr=bowl", ("list", "--set 'classes.tr=[bowl]'")
    ),
    Mistake("section for a setting", "bridge --run run --set bridge=3", ("such as bridge.",)),
    Mistake(
        "wrong values in a file and beside it",
        "bridge --run run --config my.yml --set seed=-1",
        ("my.yml: setting bridge.epochs = 0", "  setting seed = -1"),
        text_file("my.yml", "bridge: {epochs: 0}"),
    ),
    Mistake(
        "wrong value in a file",
        "run --config my.yml",
        ("my.yml: unknown setting bridge.epoch",),
        text_file("my.yml", "bridge: {epoch: 3}"),
    ),
    Mistake(
        "a run for a benchmark",
        "benchmark my.yml",
        ("my.yml", "settings of one run", "`sfkt run my.yml`"),
        text_file("my.yml", "bridge.epochs: 3\nseed: 1"),
    ),
    Mistake(
        "a stage for a run", "bridge --run run/transfer/tgkt", ("sfkt prepare", "mean --run run?")
    ),
    Mistake("misspelled run", "bridge --run rn", ("rn/prepare", "did you mean --run run?")),
    Mistake(
        "unknown setting",
        "bridge --run run --set bridge.epoch=3",
        ("bridge.epoch", "did you mean bridge.epochs"),
    ),
    Mistake(
        "wrong value", "bridge --run run --set bridge.epochs=many", ("bridge.epochs", "'many'")
    ),
    Mistake("value out of range", "bridge --run run --set split.source=2", ("split.source", "2")),
    Mistake("--set without =", "bridge --run run --set bridge.epochs", ("section.field=value",)),
    Mistake(
        "no configuration file", "bridge --run run --config my.yml", ("my.yml", "does not exist")
    ),
    Mistake(
        "broken configuration",
        "bridge --run run --config my.yml",
        ("my.yml",),
        text_file("my.yml", "a: [1,"),
    ),
    Mistake("no run yet", "bridge", ("sfkt prepare",)),
    Mistake(
        "transfer before bridge", "transfer --run run --force", ("sfkt bridge",), forget("bridge")
    ),
    Mistake("bridge before prepare", "bridge --run other", ("sfkt prepare",)),
    Mistake(
        "export before transfer", "export --run run", ("sfkt transfer",), forget("transfer/tgkt")
    ),
    Mistake("unknown method", "transfer --run run --method tgtk", ("tgtk", "tgkt")),
    Mistake("method of control characters", "transfer --run run --method tg\0kt", ("tg", "tgkt")),
    Mistake("too many GPUs", "bridge --run run --gpus 64", ("64", "--gpus 0")),
    Mistake(
        "other settings",
        "bridge --run run --set bridge.epochs=77",
        ("bridge.epochs", "77", "--force"),
    ),
    Mistake("no TI pairs", "bridge --run run --force", ("TI pairs", "--method shot"), only_targets),
    Mistake(
        "truncated store", "bridge --run run --force", ("transfer.h5", "sfkt prepare"), truncate
    ),
    Mistake("inspect of a run", "inspect run", ("run is a folder", "transfer.h5")),
    Mistake(
        "inspect of a misspelled run",
        "inspect --run rn",
        ("rn/prepare", "sfkt prepare", "did you mean --run run?"),
    ),
    Mistake(
        "a text for a student",
        "predict x.png --model s.txt",
        ("s.txt is a file", "give a run"),
        text_file("s.txt"),
    ),
    Mistake("labels off by one", "evaluate --run run", ("test.h5", "label"), shift_labels),
    Mistake("no checkpoint", f"{BRING} source.checkpoint=gone.pth", ("gone.pth", "does not exist")),
    Mistake(
        "a pipe for a checkpoint",
        f"{BRING} source.checkpoint=pipe.pth",
        ("pipe.pth", "not a regular file"),
        lambda f: os.mkfifo(f / "pipe.pth"),
    ),
    Mistake(
        "unreadable weights",
        f"{BRING} source.checkpoint=w.pth",
        ("w.pth", "torch.save"),
        text_file("w.pth"),
    ),
    Mistake(
        "wrong file type",
        f"{BRING} source.checkpoint=w.h5",
        ("w.h5", ".safetensors"),
        text_file("w.h5"),
    ),
    Mistake(
        "another architecture",
        f"{BRING} source.checkpoint=w.safetensors",
        ("w.safetensors", "source.backbone", "16 inputs", "fc with 32"),
        lambda f: weights(f, width=8),
    ),
    Mistake(
        "wrong number of classes",
        f"{BRING} source.checkpoint=w.safetensors",
        ("5 classes", "6", "classes.tr"),
        lambda f: weights(f, 5),
    ),
    Mistake(
        "other class names",
        f"{BRING} source.checkpoint=w.safetensors --set source.classes=[a,b,c,d,e,f]",
        ("only in the model: a", "source.classes"),
        weights,
    ),
    Mistake(
        "a model that can run code",
        f"{BRING} source.checkpoint=w.pkl",
        ("w.pkl", "torch.onnx.export(model"),
        lambda f: torch.save(SmallResNet(4), f / "w.pkl"),
    ),
    Mistake(
        "class order differs",
        "bridge --run run --force",
        ("octahedron, torus", "sfkt source --force"),
        lambda f: reorder(f),
    ),
    Mistake("image that is not there", "predict --run run gone.png", ("gone.png",)),
    Mistake(
        "pattern without images", "predict --run run gone*.png", ("gone*.png", "matches no image")
    ),
    Mistake(
        "RGB image for the depth model",
        "predict --run run rgb.png",
        ("rgb.png",),
        lambda f: picture(f / "rgb.png", rgb=True),
    ),
    Mistake(
        "predictions as a spreadsheet",
        "predict --run run x.png --output p.xlsx",
        ("p.xlsx", ".csv"),
    ),
    Mistake(
        "a file where a folder should be",
        "export --run run --output w.txt",
        ("w.txt is a file", "name a folder"),
        text_file("w.txt"),
    ),
    Mistake(
        "a run that is not there", "predict x.png --model nope", ("nope does not exist", "runs/")
    ),
    Mistake("unknown format", "export --run run --format tflite", ("tflite", "onnx")),
    Mistake("unknown report", "evaluate --run run --report table.docx", ("table.docx", ".md")),
    Mistake(
        "no write permission",
        "prepare synthetic --run file/run",
        ("file", "choose a place"),
        text_file("file"),
    ),
]


def reorder(folder: Path) -> None:
    source = folder / "run/source"
    saved = load_model(source)
    save_model(
        Stage("test", source, Config(), {}), saved.module, kind="classifier",
        architecture=saved.card.architecture, classes=saved.card.classes[::-1], encoding=None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run, config = Run(tmp_path_factory.mktemp("mistakes") / "run"), build(SETTINGS)
    prepare(config, run)
    add_models(run, config)
    return run.folder


@pytest.fixture
def folder(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(prepared, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ended(command: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["sfkt", *command.split()])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.what)
def test_a_mistake_is_one_message_that_says_what_to_do(
    mistake: Mistake,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mistake.make(folder)
    capsys.readouterr()
    code = ended(mistake.command, monkeypatch)
    message = capsys.readouterr().err
    assert code == mistake.code
    assert "Traceback" not in message
    assert [word for word in mistake.says if word not in message] == [], message


def test_a_second_process_on_the_run_waits_for_nobody(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with locking(folder / "run/.bridge.lock", ""):
        assert ended("bridge --run run --force", monkeypatch) == 1
    assert "another sfkt process works on run/bridge" in capsys.readouterr().err


def test_a_full_disk_names_the_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    command = "prepare synthetic --run new --set synthetic.pairs=60"
    assert ended(command, monkeypatch) == 1
    message = capsys.readouterr().err
    assert "new/prepare cannot be written" in message
    assert "make room" in message


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "image.png"
    os.mkfifo(pipe)
    with pytest.raises(DataError, match="is a folder, a device or a pipe"):
        read_image(pipe)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file", "/a/b.png"), "No such file"),
        (OSError("the disk is full"), "the disk is full"),
        (ValueError("\nshapes differ\nat layer 3"), "shapes differ"),
        (EOFError(), "EOFError"),
    ],
)
def test_the_reason_in_a_message_is_one_line_without_number_and_path(
    error: Exception, told: str
) -> None:
    assert first_line(error) == told
