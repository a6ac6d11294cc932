"""Damaged and hostile files: one of the program's own errors, in time, and nothing is executed."""

from __future__ import annotations

import io
import os
import pickle
import random
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from safetensors.torch import save_file

from sfkt_cli.console import mute
from sfkt_cli.data.decode import decode_rgb, decode_target
from sfkt_cli.data.store import open_store
from sfkt_cli.data.store_writer import text_column, writing
from sfkt_cli.errors import ConfigError, DataError, SfktError
from sfkt_cli.files import sha256_file, write_record
from sfkt_cli.models.classifier import Classifier
from sfkt_cli.models.importing import read_weights
from sfkt_cli.models.saving import load_model, read_card, save_model
from sfkt_cli.settings.config import Config, build, read_yaml, to_yaml
from sfkt_cli.settings.runs import Run
from sfkt_cli.settings.stage import Stage
from sfkt_cli.training.checkpoint import STATE, load_states, save_state
from tests.faults.mutating import mutate

CPU = torch.device("cpu")
LONGEST_S = 10.0
EXECUTING = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen",
             "pickle.find_class", "ctypes.dlopen", "socket.connect")  # fmt: skip
"""Audit events that no reading of a damaged file may cause."""
_watched: list[str] | None = None
_folder = ""
"""Where files may be opened while one is watched."""


def _note(event: str, arguments: tuple[object, ...]) -> None:
    if _watched is None:
        return
    allowed = str(arguments[0]).startswith(_folder) or str(arguments[0]).endswith(".pyc")
    outside = event == "open" and not allowed
    if event in EXECUTING or outside:
        _watched.append(f"{event} {arguments}")


sys.addaudithook(_note)


class Planted:
    """Pickled, this creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, (str(self.path),)


def torture(path: Path, read: Callable[[], object], trials: int, own: type[SfktError]) -> int:
    """Read mutated versions of a file; how many were refused, each by an error of the program."""
    global _watched, _folder
    _folder = str(path.parent)
    read()  # what is loaded once is loaded now
    content, refused, longest = path.read_bytes(), 0, 0.0
    for number in range(trials):
        path.write_bytes(mutate(content, random.Random(number)))
        began = time.monotonic()
        executed: list[str] = []
        _watched = executed
        try:
            read()
        except own:
            refused += 1
        finally:
            _watched = None
        longest = max(longest, time.monotonic() - began)
        assert longest < LONGEST_S
        assert not executed
    path.write_bytes(content)
    print(f"{path.name}: {refused} of {trials} refused, none crashed; {longest:.2f} s at most")
    return refused


def trials(scale: int) -> list[object]:
    return [pytest.param(scale), pytest.param(100 * scale, marks=pytest.mark.slow)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    sizes = {"backbone": "small", "classes": 3, "width": 4, "bottleneck": 8,
             "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}  # fmt: skip
    save_model(
        Stage("test", tmp_path, Config(), {}), Classifier(**sizes), kind="classifier",  # type: ignore[arg-type]
        architecture=sizes, classes=["a", "b", "c"], encoding=None,
    )  # fmt: skip
    return tmp_path


@pytest.mark.parametrize("count", trials(25))
def test_mutated_settings(tmp_path: Path, count: int) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(to_yaml(Config()))
    torture(path, lambda: build(read_yaml(path)), count, ConfigError)


@pytest.mark.parametrize("count", trials(15))
def test_mutated_model_files(model: Path, count: int) -> None:
    for name in ("model.safetensors", "model.json"):
        torture(model / name, lambda: load_model(model, CPU), count, DataError)


@pytest.mark.parametrize("count", trials(15))
def test_mutated_weights_whose_digest_was_adapted(model: Path, count: int) -> None:
    weights = model / "model.safetensors"

    def read() -> None:
        card = read_card(model / "model.json").as_json()
        write_record(model / "model.json", {**card, "sha256": sha256_file(weights)})
        load_model(model, CPU)

    torture(weights, read, count, DataError)


@pytest.mark.parametrize("count", trials(15))
def test_mutated_stage_records(tmp_path: Path, count: int) -> None:
    run = Run(tmp_path)
    path = run.path("source", "done.json")
    path.parent.mkdir()
    write_record(path, {"stage": "source", "settings": {"seed": 0}, "inputs": {}})
    torture(path, lambda: run.record("source"), count, DataError)


@pytest.mark.parametrize("count", trials(15))
def test_mutated_weights_that_are_brought_along(tmp_path: Path, count: int) -> None:
    state = {"w": torch.arange(60.0), "b": torch.zeros(3)}
    torch.save({"state_dict": state}, tmp_path / "new.pth")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "brought.safetensors")
    for name in ("new.pth", "old.pth", "brought.safetensors"):
        torture(tmp_path / name, lambda: read_weights(tmp_path / name), count, DataError)  # noqa: B023


@pytest.mark.parametrize("count", trials(15))
def test_mutated_stores(tmp_path: Path, count: int) -> None:
    path = tmp_path / "transfer.h5"
    columns: dict[str, Any] = {
        "ti/rgb": np.arange(20 * 48, dtype=np.uint16).astype(np.uint8).reshape(20, 4, 4, 3),
        "ti/target": np.arange(20 * 16, dtype=np.uint16).reshape(20, 4, 4),
        "ti/id": text_column([f"pair-{row}" for row in range(20)]),
    }
    attributes = {"dataset": "made", "modality": "depth", "unit": "mm", "classes": ["a", "b"]}
    with writing(path, attributes, columns):
        pass
    assert torture(path, lambda: open_store(path).verify(), count, DataError) > 0.9 * count


@pytest.mark.parametrize("count", trials(10))
@pytest.mark.parametrize(
    "name",
    ["rgb.png", "rgb.jpg", "rgb.webp", "rgb.bmp", "rgb.ppm", "rgb.tiff",
     "depth.png", "depth.tiff", "packed.tiff", "depth.npy", "grey.pgm"],
)  # fmt: skip
def test_mutated_images(tmp_path: Path, name: str, count: int) -> None:
    path, chance = tmp_path / name, np.random.default_rng(0)
    target: Any = chance.integers(0, 5000, (24, 32), dtype=np.uint16)
    if path.suffix == ".npy":
        np.save(path, target)
    elif path.suffix == ".tiff" and path.stem != "rgb":
        packed = "zlib" if path.stem == "packed" else None
        tifffile.imwrite(path, target, compression=packed)
    elif path.stem == "rgb":
        Image.fromarray(chance.integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(path)
    else:
        Image.fromarray(target if path.stem == "depth" else target.astype(np.uint8)).save(path)
    decode: Callable[[bytes, str], object] = decode_rgb if path.stem == "rgb" else decode_target
    torture(path, lambda: decode(path.read_bytes(), name), count, DataError)


@pytest.mark.parametrize("count", trials(20))
def test_a_mutated_state_is_never_taken_for_whole(tmp_path: Path, count: int) -> None:
    mute()
    right = {"objective": {"w": torch.arange(300.0)}, "made_for": "this"}
    save_state(tmp_path, right)
    path, taken = tmp_path / STATE, 0
    content = path.read_bytes()
    for number in range(count):
        path.write_bytes(mutate(content, random.Random(number)))
        for state in load_states(tmp_path, CPU, "this"):
            taken += 1
            assert torch.equal(state["objective"]["w"], right["objective"]["w"])  # type: ignore[index]
    print(f"{count - taken} of {count} damaged states refused, the others were whole")


def test_a_planted_pickle_is_not_executed(tmp_path: Path) -> None:
    mute()
    trap = tmp_path / "executed"
    state = tmp_path / STATE
    torch.save({"objective": Planted(trap)}, state)
    assert not list(load_states(tmp_path, CPU, ""))
    brought = tmp_path / "brought.pth"
    torch.save({"state_dict": Planted(trap)}, brought)
    with pytest.raises(SfktError):
        read_weights(brought)
    for content in (
        pickle.dumps(Planted(trap), protocol=2),
        _inside_zip(pickle.dumps(Planted(trap), protocol=2)),
    ):
        for path in (state, brought):
            path.write_bytes(content)
        assert not list(load_states(tmp_path, CPU, ""))
        with pytest.raises(SfktError):
            read_weights(brought)
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"seed: !!python/object/apply:os.mkdir ['{trap}']\n")
    with pytest.raises(ConfigError):
        read_yaml(settings)
    assert not trap.exists()


def _inside_zip(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return file.getvalue()
