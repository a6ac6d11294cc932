"""How long an exported model takes on this machine's CPU: PyTorch, onnxruntime, OpenVINO."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sfkt_cli.evaluation.report import amount, markdown_table
from sfkt_cli.models.graph_files import Predict, open_graph, open_onnx

ROUNDS = 50
LEAST_ROUNDS = 10
LONGEST_S = 3.0
"""No more rounds than LEAST_ROUNDS after that."""


@dataclass(frozen=True)
class Latency:
    """Of one model in one runtime.

    Attributes:
        runtime: PyTorch, onnxruntime or OpenVINO.
        file: What it runs.
        batch: Images at a time.
        median_ms: Half of the batches take longer.
        p95_ms: One batch of twenty takes longer.
    """

    runtime: str
    file: str
    batch: int
    median_ms: float
    p95_ms: float


def time_all(
    name: str, graph: nn.Module, files: Mapping[str, bytes], batches: Sequence[Tensor]
) -> list[Latency]:
    """Time a graph in PyTorch and its ONNX files in every runtime that is installed.

    Args:
        name: Of the graph.
        graph: In inference mode.
        files: Content of its ONNX files, by name.
        batches: Real images.
    """
    runners: dict[tuple[str, str], Predict] = {("PyTorch", name): open_graph(graph)}
    for file, content in files.items():
        runners["onnxruntime", file] = open_onnx(content)
        if find_spec("openvino") is not None:
            runners["OpenVINO", file] = open_openvino(content)
    return [
        Latency(*runner, len(images), *_measure(predict, images))
        for runner, predict in runners.items()
        for images in batches
    ]


def open_openvino(content: bytes) -> Predict:
    """An ONNX file in OpenVINO, on the CPU, in the precision that the file has."""
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    core = openvino.Core()
    compiled: Any = core.compile_model(core.read_model(content), "CPU", settings)
    return lambda images: torch.from_numpy(compiled(images.numpy())["probabilities"])


def machine() -> str:
    """Processor and threads that times belong to."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.is_file() else ""
    named = re.search(r"model name\s*: (.+)", text)
    name = named[1] if named else platform.processor()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' * (threads > 1)}."


def table(latencies: Iterable[Latency]) -> str:
    """All of them, as Markdown."""
    header = ("runtime", "file", "batch", "median ms", "p95 ms", "images/s")
    cells = [
        (
            each.runtime, each.file, str(each.batch), amount(each.median_ms), amount(each.p95_ms),
            amount(1000 * each.batch / each.median_ms),
        )
        for each in latencies
    ]  # fmt: skip
    return markdown_table(header, cells, left=2)


def _measure(predict: Predict, images: Tensor) -> tuple[float, float]:
    """Median and 95th percentile in milliseconds, after three rounds that do not count."""
    took: list[float] = []
    with torch.inference_mode():
        for _ in range(3):
            predict(images)
        began = time.perf_counter()
        while len(took) < LEAST_ROUNDS or (
            len(took) < ROUNDS and time.perf_counter() - began < LONGEST_S
        ):
            start = time.perf_counter()
            predict(images)
            took.append(1000 * (time.perf_counter() - start))
    median, late = np.percentile(took, (50, 95))
    return float(median), float(late)
