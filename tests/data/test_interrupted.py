"""Prepare that is killed, interrupted, or finds the disk full: the next run makes it whole."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sfkt_cli.data.store import open_store
from sfkt_cli.errors import STOPPED, RunError
from sfkt_cli.settings.config import build
from sfkt_cli.settings.runs import Run
from sfkt_cli.stages.prepare import prepare
from tests.data.make_archives import rgb_nir

SETTINGS = {"dataset": "synthetic", "image_size": 32, "synthetic": {"pairs": 500}}
COMMAND = [
    sys.executable, "-m", "sfkt_cli", "prepare", "synthetic", "--run", "run", "--json",
    "--set", "image_size=32", "--set", "synthetic.pairs=8000",
]  # fmt: skip


def children(process: int) -> list[int]:
    """Processes below one, by what the kernel lists."""
    found = [int(p) for p in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    return found + [grandchild for child in found for grandchild in children(child)]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "kind",
    [
        signal.SIGKILL,
        signal.SIGHUP,
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in (signal.SIGTERM, signal.SIGINT)),
    ],
)
def test_stopped_prepare_leaves_no_file_and_no_process(
    kind: signal.Signals, tmp_path: Path
) -> None:
    if signal.getsignal(kind) is signal.SIG_IGN:
        pytest.skip(f"{kind.name} is ignored here, as under nohup")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    shared = set(Path("/dev/shm").iterdir())
    here = {
        **os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TMPDIR": str(temporary),
    }  # fmt: skip
    with subprocess.Popen(
        COMMAND, cwd=tmp_path, env=here, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("run/prepare/.transfer.h5*")) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.8)
        workers = children(process.pid)
        process.send_signal(kind)
        output, errors = process.communicate(timeout=60)
    if kind is signal.SIGKILL:
        assert process.returncode == -kind
    else:
        assert process.returncode == STOPPED
        assert errors.splitlines()[-1].startswith(f"sfkt: stopped by {kind.name}: ")
        assert "Traceback" not in errors
        assert json.loads(output.splitlines()[-1])["event"] == "error"
        assert not list(temporary.iterdir())
        assert not {path for path in set(Path("/dev/shm").iterdir()) - shared if path.exists()}
    run = Run(tmp_path / "run")
    assert not run.finished("prepare")
    assert not list(run.path("prepare").glob("*.h5"))
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{p}").exists() for p in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{p}").exists() for p in workers), "a worker outlived its parent"
    small = {**SETTINGS, "prepare": {"workers": 2}}
    prepare(build(small), run)
    for store in (run.transfer_store, run.source_store, run.test_store):
        open_store(store).verify()
    assert not list(run.folder.rglob("*.partial"))


def test_full_disk_is_a_message_and_leaves_no_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = build({"dataset": "rgb-nir", "prepare": {"root": str(rgb_nir(tmp_path / "nir"))}})
    run = Run(tmp_path / "run")

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(RunError, match=r"run/prepare cannot be written: No space left"):
            prepare(config, run)
    assert not list(run.folder.rglob("*.h5"))
    assert not list(run.folder.rglob("*.partial"))
    prepare(config, run)
    open_store(run.transfer_store).verify()
