"""Epochs for TensorBoard: what was trained, once each, also over an interruption."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from sfkt_cli.errors import ConfigError, need
from sfkt_cli.training.loop import TENSORBOARD, tensorboard_curves


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with (
        pytest.raises(ConfigError, match=r"pip install '\.\[tensorboard\]'"),
        tensorboard_curves(tmp_path, 0, wanted=True),
    ):
        pass
    with tensorboard_curves(tmp_path, 0, wanted=False) as draw:
        draw(1, {"rec": 1.0}, {})
    assert not list(tmp_path.iterdir())


def test_a_folder_of_that_name_is_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "no_such_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"this needs no_such_package: run pip install"):
        need("this", "extra", "no_such_package")


def test_epochs_that_are_repeated_count_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of protobuf and numpy, below tensorboard
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    for first, epochs in ((0, (1, 2, 3)), (1, (2, 3))):
        with tensorboard_curves(tmp_path, first, wanted=True) as draw:
            for epoch in epochs:
                draw(epoch, {"rec": 1.0 / epoch}, {"ti_agreement": 0.1 * epoch + first})
    read: Any = EventAccumulator(str(tmp_path / TENSORBOARD))
    read.Reload()
    assert set(read.Tags()["scalars"]) == {"terms/rec", "scores/ti_agreement"}
    found = {each.step: each.value for each in read.Scalars("scores/ti_agreement")}
    assert found == pytest.approx({1: 0.1, 2: 1.2, 3: 1.3})
