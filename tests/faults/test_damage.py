"""Damaged run folders: refused with a message, or without effect on any result.

``SFKT_TRIALS=FOLDER pytest -m slow -n 0 -s tests/faults/test_damage.py`` prints the figures; with
FOLDER it goes on where it was stopped.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sfkt_cli.errors import DataError, SfktError
from sfkt_cli.evaluation.report import read_results
from sfkt_cli.files import read_settings
from sfkt_cli.methods.label_free import load_epochs
from sfkt_cli.models.importing import read_weights
from sfkt_cli.models.saving import CARD, load_model
from sfkt_cli.settings.runs import Run
from tests.faults.test_campaigns import in_its_own_process, kept_folder

FEW, MANY = 28, 5000
"""Random damages of the ordinary and of the slow test."""


def damage(folder: Path, trials: int) -> dict[str, Any]:
    """Damage inputs of commands in a process of its own; what ended how."""
    found: dict[str, Any] = in_its_own_process("damages.py", folder, str(trials))
    print(f"{found['trials']} random damages: {found['refused']} refused, {found['unharmed']} "
          f"without effect on any result; by command: {found['commands']}")  # fmt: skip
    assert not found["wrong"], json.dumps(found["wrong"], indent=1)
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that went through all stages, and a few damages of copies of it."""
    folder = tmp_path_factory.mktemp("damaged")
    damage(folder, FEW)
    return Run(folder / "before-doctor")


@pytest.mark.slow
def test_many_random_damages_are_refused_or_change_nothing(tmp_path: Path) -> None:
    damage(kept_folder(tmp_path, "damages"), MANY)


def readers(run: Run) -> Iterator[tuple[Path, Callable[[], object]]]:
    """Every small file of a run, and what reads it: the value that commands go on with."""
    for path in sorted(run.folder.rglob("*")):
        stage = str(path.parent.relative_to(run.folder))
        if path.name == CARD:
            yield path, lambda path=path: load_model(path.parent).card  # type: ignore[misc]
        elif path.name == "done.json":
            yield path, lambda stage=stage: run.record(stage)  # type: ignore[misc]
        elif path.name == "config.yaml":
            yield path, lambda path=path: read_settings(path)  # type: ignore[misc]
        elif path.name == "results.json":
            yield path, lambda: read_results(run)
        elif path.name == "metrics.jsonl":
            yield path, lambda stage=stage: run.metrics(stage)  # type: ignore[misc]
        elif path.name == "epochs.npy":
            yield path, lambda s=stage: load_epochs(run.output(s, "epochs.npy").parent).tolist()  # type: ignore[misc]


def flip_bits(path: Path, read: Callable[[], object], step: int) -> tuple[int, int]:
    """Flip every ``step``-th bit of a file by itself; how many, and how many were refused."""
    content, right = path.read_bytes(), read()
    places = range(0, 8 * len(content), step)
    refused = 0
    for place in places:
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        told = ""
        try:
            assert read() == right
        except SfktError as error:
            told = str(error)
            refused += 1
        assert not told or path.name in told
    path.write_bytes(content)
    return len(places), refused


@pytest.mark.parametrize(
    "step", [pytest.param(1499), pytest.param(1, marks=pytest.mark.slow)], ids=["few", "all"]
)
def test_a_flipped_bit_of_a_small_file_is_refused_or_changes_nothing(
    finished: Run, tmp_path: Path, step: int
) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(finished.folder, run.folder)
    files = flips = refused = 0
    for path, read in readers(run):
        counts = flip_bits(path, read, step)
        files, flips, refused = files + 1, flips + counts[0], refused + counts[1]
    assert files > 15
    print(f"{flips} flipped bits of {files} files: {refused} refused, {flips - refused} no effect")


@pytest.mark.parametrize("kind", ["sparse", "meta", "complex"])
def test_tensors_that_are_no_plain_weights(tmp_path: Path, kind: str) -> None:
    made = {
        "sparse": lambda: torch.eye(3).to_sparse(),
        "meta": lambda: torch.empty(3, device="meta"),
        "complex": lambda: torch.ones(3, dtype=torch.complex64),
    }
    torch.save({"w": made[kind]()}, tmp_path / "brought.pth")
    with pytest.raises(DataError, match=r"brought\.pth"):
        read_weights(tmp_path / "brought.pth")


def test_a_deeply_nested_record_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.path("source").mkdir()
    for text in ("[" * 100_000, '{"a":' * 100_000, '{"seconds": NaN}', "9" * 5000):
        run.path("source", "done.json").write_text(text)
        with pytest.raises(DataError, match=r"source/done\.json"):
            run.record("source")
