"""Several processes: the same gradients, losses and files as one, and no hang when one dies."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
from torch import nn

from sfkt_cli.errors import ConfigError, RunError
from sfkt_cli.files import sha256_file
from sfkt_cli.launch import explain_failure, find_world, lost_message
from sfkt_cli.settings.config import build, to_yaml
from sfkt_cli.settings.runs import Run
from sfkt_cli.stages.bridge import bridge
from sfkt_cli.stages.prepare import prepare
from sfkt_cli.stages.source import source
from sfkt_cli.training.runtime import Runtime, check_batch_norms
from tests.training.worlds import COUNTS, in_worlds, run_all

TOLERANCE = 1e-5
"""Between 1 and 2 processes: the order of float32 sums differs, nothing else."""
TINY: dict[str, Any] = {
    "image_size": 16,
    "synthetic": {"pairs": 100},
    "prepare": {"workers": 1},
    "training": {"min_steps": 3},
    "source": {"epochs": 1, "width": 4, "bottleneck": 8},
    "bridge": {"epochs": 3, "width": 4},
    "runtime": {"gpus": 0, "processes": 2, "batch_size": 8, "checkpoint_seconds": 0.0},
}
FILES = [
    "config.yaml", "done.json", "epochs.npy", "images", "log.txt", "metrics.jsonl", "model.json",
    "model.safetensors",
]  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Any]:
    folder = tmp_path_factory.mktemp("worlds")
    in_worlds(folder, 3, run_all)
    places = [(world, rank) for world in (1, 2, 3) for rank in range(world)]
    return {
        place: torch.load(folder / f"found{place[0]}-{place[1]}.pt", weights_only=True)
        for place in places
    }


def test_gradients_of_two_processes_are_those_of_the_whole_batch(found: Any) -> None:
    one = found[1, 0]["gradients"]
    assert any(name.startswith("discriminator") for name in one)
    assert {"dispersion", "norm", "im"} < set(one)
    gaps: dict[str, float] = {}
    for rank in (0, 1):
        two = found[2, rank]["gradients"]
        assert set(one) == set(two)
        gaps |= {name: float((one[name] - two[name]).abs().max()) for name in one}
        for name in one:
            torch.testing.assert_close(two[name], one[name], rtol=TOLERANCE, atol=TOLERANCE)
    print(f"largest difference of a gradient: {max(gaps.values()):.1e}")


def test_two_processes_remember_what_one_does(found: Any) -> None:
    one = found[1, 0]["remembered"]
    assert float(one["features"].std(dim=0).min()) > 0
    for rank in (0, 1):
        two = found[2, rank]["remembered"]
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_two_processes_have_the_losses_of_one(found: Any) -> None:
    one, two = found[1, 0]["history"], found[2, 0]["history"]
    assert [row["epoch"] for row in two] == [1, 2]
    for before, after in zip(one, two, strict=True):
        for name in ("rec", "d", "im", "f"):
            assert after[name] == pytest.approx(before[name], rel=TOLERANCE, abs=TOLERANCE)
    assert two[0]["rec"] != two[1]["rec"]


@pytest.mark.parametrize("count", COUNTS)
def test_every_row_is_predicted_exactly_once(found: Any, count: int) -> None:
    for place in found:
        features, logits, looked_at = found[place]["predictions"][count]
        assert features.flatten().tolist() == list(range(count)), place
        assert logits.shape == (count, 2)
        if count <= 256:  # none is waited for longer than its share takes
            assert looked_at <= -(-count // place[0])


def test_a_batch_fits_into_the_memory_of_every_process(found: Any) -> None:
    sizes = {place: found[place]["fitting_batch"] for place in found}
    assert sizes == {place: 32 if place[0] == 1 else 8 for place in found}


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with a source model, and its settings beside it."""
    run = Run(tmp_path_factory.mktemp("processes") / "run")
    config = build(TINY)
    prepare(config, run)
    source(config, run)
    (run.folder.parent / "tiny.yaml").write_text(to_yaml(config))
    return run


def start_bridge(run: Run, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "sfkt_cli", "bridge", "--run", str(run.folder)]
    command += ["--config", str(run.folder.parent / "tiny.yaml"), *more]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def workers_of(parent: int) -> list[int]:
    """Process ids of the ranks that a command started, in their order."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            above = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if above == parent and "spawn_main" in (folder / "cmdline").read_text():
                found.append(int(folder.name))
        except (OSError, IndexError):
            continue
    return sorted(found)


def kill_one(run: Run, rank: int, delay: float) -> tuple[float, str]:
    """Kill a rank some time after a state was saved; seconds until the rest ended, and stderr."""
    process = start_bridge(run)
    state = run.path("bridge", "checkpoint", "state.pt")
    before = state.stat().st_mtime_ns if state.exists() else 0
    while process.poll() is None:
        if state.exists() and state.stat().st_mtime_ns != before:
            break
        time.sleep(0.02)
    time.sleep(delay)
    ranks = workers_of(process.pid)
    if len(ranks) == 2:
        os.kill(ranks[rank], signal.SIGKILL)
    began = time.monotonic()
    _, errors = process.communicate(timeout=90)
    seconds = time.monotonic() - began
    assert not [rank for rank in ranks if Path(f"/proc/{rank}").exists()]
    return seconds, errors


def finish(run: Run) -> None:
    process = start_bridge(run)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def check_finished(run: Run) -> None:
    assert sorted(path.name for path in run.path("bridge").iterdir()) == FILES
    assert not list(run.folder.rglob("*.partial"))


def test_a_killed_process_ends_the_other_and_the_rerun_completes(started: Run) -> None:
    seconds, errors = kill_one(started, rank=1, delay=0.0)
    messages = [line for line in errors.splitlines() if line.startswith("sfkt: ")]
    print(f"the other process ended after {seconds:.1f} s")
    assert seconds < 60
    assert len(messages) == 1, errors
    assert "was killed (SIGKILL" in messages[0]
    assert "Traceback" not in errors
    finish(started)
    check_finished(started)


def test_a_failed_process_leaves_no_temporary_file(
    started: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(started.folder, run.folder)
    shutil.copy(started.folder.parent / "tiny.yaml", tmp_path)
    with h5py.File(run.transfer_store) as store:
        at = store["ti/target"].id.get_offset()
    content = bytearray(run.transfer_store.read_bytes())
    content[at] ^= 1
    run.transfer_store.write_bytes(content)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    process = start_bridge(run, "--force")
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "do not match their checksum" in errors
    assert errors.count("sfkt: ") == 1, errors
    assert not list(temporary.iterdir())


def test_where_nothing_was_saved_nobody_is_told_to_leave_force_out(
    started: Run, tmp_path: Path
) -> None:
    run = Run(tmp_path / "run", force=True)
    shutil.copytree(started.folder, run.folder)
    shutil.copy(started.folder.parent / "tiny.yaml", tmp_path)
    bridge(build(TINY), run)
    endless = ("--set", "training.min_steps=100000", "--set", "runtime.checkpoint_seconds=1000")
    process = start_bridge(run, "--force", *endless, "--set", "runtime.batch_size=2")
    while not run.path(".bridge.before").exists() and process.poll() is None:
        time.sleep(0.02)
    os.kill(workers_of(process.pid)[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=90)
    assert "was killed (SIGKILL" in errors
    assert "same command" not in errors
    assert "2 CPU processes share batches of 4" in errors  # two rows each, at least
    assert run.finished("bridge")


@pytest.mark.slow
def test_twenty_killed_processes(started: Run) -> None:
    chance, waits, weights = random.Random(0), [], set()
    for number in range(20):
        for name in ("done.json", "begun.json"):
            started.path("bridge", name).unlink(missing_ok=True)
        seconds, errors = kill_one(started, number % 2, chance.random() * 0.5)
        waits.append(seconds)
        assert errors.count("sfkt: ") <= 1
        finish(started)
        check_finished(started)
        weights.add(sha256_file(started.path("bridge", "model.safetensors")))
    print(f"20 of 20 completed; the other process ended after {max(waits):.1f} s at most")
    assert max(waits) < 60
    assert len(weights) == 1, "a resumed training ends with other bits"


def under_torchrun(run: Run, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "--", "sfkt_cli", "bridge", "--force", *more]
    command += ["--run", str(run.folder), "--config", str(run.folder.parent / "tiny.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
def test_torchrun_is_joined(started: Run) -> None:
    process = under_torchrun(started)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert errors.count("bridge  3/3  ") == 1, "only process 0 speaks"
    check_finished(started)


@pytest.mark.slow
def test_one_process_tells_that_all_were_stopped(started: Run) -> None:
    process = under_torchrun(started, "--set", "bridge.epochs=500")
    state = started.path("bridge", "checkpoint", "state.pt")
    while not state.exists() and process.poll() is None:
        time.sleep(0.05)
    process.terminate()
    _, errors = process.communicate()
    told = "sfkt: bridge stopped; the same command (without --force) continues from here"
    assert errors.count(told) == 1, errors
    assert errors.count("sfkt: ") == 1, errors


def test_torchrun_and_slurm_are_found() -> None:
    torchrun = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a",
                "MASTER_PORT": "29500"}  # fmt: skip
    assert find_world({**torchrun, "HOME": "/"}) == torchrun
    assert find_world({**torchrun, "WORLD_SIZE": "1"}) == {}
    step = {"SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "4",
            "SLURM_STEP_NODELIST": "gpu[03-05],cpu1", "SLURM_JOB_ID": "70001"}  # fmt: skip
    world = {"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "gpu03",
             "MASTER_PORT": "30001"}  # fmt: skip
    assert find_world(step) == world
    assert find_world({**step, "MASTER_PORT": "5"}) == {**world, "MASTER_PORT": "5"}
    assert find_world({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) == {}, "a batch script"
    assert find_world({}) == {}


@pytest.mark.parametrize(("asked", "count", "expected"), [(64, 1000, 63), (64, 10, 9), (8, 2, 6)])
def test_shares_are_equal(asked: int, count: int, expected: int) -> None:
    runtime = Runtime(torch.device("cpu"), torch.float32, 0, 3)
    assert runtime.batch_size(asked, count) == expected


def test_batch_norms_that_do_more_than_normalise_are_not_replaced() -> None:
    class WithActivation(nn.BatchNorm2d):
        """As timm has it."""

    plain = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm1d(2), nn.SyncBatchNorm(2))
    check_batch_norms(plain)
    with pytest.raises(ConfigError, match=r"sync_batchnorm = true: 0\.1 is a WithActivation"):
        check_batch_norms(nn.Sequential(nn.Sequential(nn.ReLU(), WithActivation(2))))


def test_the_cause_is_told_not_the_consequence() -> None:
    class Failure:
        timestamp = 1.0

        def __init__(self, exitcode: int, message: str) -> None:
            self.exitcode = exitcode
            self.message = {"message": message, "extraInfo": {"py_callstack": "at home"}}

        def signal_name(self) -> str:
            return signal.Signals(-self.exitcode).name

    class Failed(Exception):
        def __init__(self, *failures: Failure) -> None:
            self.failures = dict(enumerate(failures))

    lost = Failure(1, "RuntimeError: gloo: Connection closed by peer")
    told = Failure(1, "RunError: process 0 lost the others (Connection closed by peer): see theirs")
    cases = [
        ([lost, Failure(1, "RunError: bridge: the loss is nan")], "bridge: the loss is nan"),
        ([told, Failure(1, "KeyError: 'x'")], "process 1 of 2 failed: KeyError: 'x'"),
        ([lost, Failure(-9, "")], "process 1 of 2 was killed (SIGKILL"),
        ([lost, Failure(1, "OutOfMemoryError: CUDA")], "lower runtime.batch_size"),
        ([lost, Failure(1, "RuntimeError: DefaultCPUAllocator: not enough")], "memory is full"),
        ([lost, Failure(1, "OSError: [Errno 28] No space left on device: 'm'")], "disk is full"),
        ([Failure(-15, ""), Failure(1, "KeyError: 'x'")], "process 1 of 2 failed: KeyError: 'x'"),
    ]
    for failures, expected in cases:
        error = explain_failure(Failed(*failures), 2)  # type: ignore[arg-type]
        assert isinstance(error, RunError)
        assert expected in str(error)


def test_a_process_that_waited_in_vain_names_the_setting() -> None:
    slow = RuntimeError("[gloo/unbound_buffer.cc:129] Timed out waiting 60000ms for recv")
    gone = RuntimeError("[gloo/pair.cc:561] Connection closed by peer")
    assert "set runtime.timeout_seconds above 60; the same" in lost_message(1, slow, 60.0)
    assert "runtime.timeout_seconds" not in lost_message(1, gone, 60.0)


@pytest.mark.gpu
def test_two_gpus_write_the_files_of_one(started: Run) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    process = start_bridge(
        started, "--gpus", "2", "--force", "--set", "runtime.sync_batchnorm=true"
    )
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    check_finished(started)
