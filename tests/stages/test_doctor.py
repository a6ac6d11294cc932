"""The doctor finds damage, and says what the machine lacks."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from sfkt_cli import machine
from sfkt_cli.errors import RunError
from sfkt_cli.settings.config import Config
from sfkt_cli.settings.runs import Run
from sfkt_cli.stages.doctor import doctor, examine


def test_it_looks_at_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    findings = {finding.name: finding for finding in examine()}
    assert {"Python", "torch", "CPU", "memory", "free disk"} <= set(findings)
    assert "sfkt run" in findings["prepared runs"].advice
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)  # as in a container
    for name, text in (("max", "2000000000"), ("current", "900000000"), ("stat", "file 0")):
        (tmp_path / f"memory.{name}").write_text(text)
    (memory,) = (finding for finding in examine() if finding.name == "memory")
    assert memory.value == "1.0 GB free"
    assert memory.advice


@pytest.mark.parametrize("name", ["prepare/test.h5", "bridge/model.safetensors"])
def test_one_flipped_bit_is_found(
    untrained_run: Run, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(untrained_run.folder, copy)
    doctor(copy)
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(RunError, match=r"1 of \d+ files"):
        doctor(copy)
    assert f"{copy / name}" in capsys.readouterr().err


def test_a_file_that_its_stage_did_not_write_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path)
    with run.open("bridge", Config(), {}) as stage:
        assert stage is not None
        (stage.folder / "epochs.npy").write_bytes(b"written")
        stage.finish()
    doctor(tmp_path)
    run.path("bridge", "epochs.npy").write_bytes(b"changed")
    with pytest.raises(RunError, match="1 of 1 files"):
        doctor(tmp_path)
    assert "bridge/epochs.npy is not what its stage wrote" in capsys.readouterr().err


def test_after_a_file_that_the_disk_refuses_it_reads_the_others(
    untrained_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(untrained_run.folder, copy)
    refused = copy / "bridge/model.safetensors"
    refused.unlink()
    refused.symlink_to(refused.name)  # a circle: an error of the system, for root as well
    with pytest.raises(RunError, match=r"1 of \d+ files"):
        doctor(copy)
    shown = capsys.readouterr().err
    assert f"{refused}: {os.strerror(errno.ELOOP)}" in shown
    assert f"ok  {copy / 'transfer/tgkt/model.safetensors'}" in shown


def test_a_folder_that_is_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is it a run"):
        doctor(tmp_path)
