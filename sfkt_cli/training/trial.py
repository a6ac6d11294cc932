"""Steps that are only tried: for the size of a batch, and for what a dry run says of a training.

The size is as set, or the largest power of two that fits into memory. It is kept in the stage's
folder: an interrupted training continues with the same batches.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, PositiveInt
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sfkt_cli.console import say
from sfkt_cli.distributed import by_itself
from sfkt_cli.errors import RunError
from sfkt_cli.files import read_record, write_record
from sfkt_cli.machine import free_memory, full_memory
from sfkt_cli.training.checkpoint import snapshot
from sfkt_cli.training.runtime import DryRunFigures, Runtime, seed_all

if TYPE_CHECKING:
    from sfkt_cli.training.loop import Objective, Training

Batches = Callable[[int, int], Any]
"""(epoch, step) to a batch."""
BATCH_SIZE_FILE = "batch_size.json"
SMALLEST = 2
SHARE = 0.5
"""Of the free memory of a CPU that a step may take; the rest is for page cache and others."""
TRANSIENT = 2.0
"""Peak of a step over what its forward pass keeps: gradients of activations come and go."""
FEW_ROWS = 4  # rows of the batch with which a dry run warms up
PATIENCE_S = 4.0  # a step with all rows is timed where it takes no longer than this on a CPU


def settle_batch_size(
    wanted: int | Literal["auto"],  # ``runtime.batch_size``
    count: int,  # samples that there are
    folder: Path,  # folder of the stage, where the size is remembered
    runtime: Runtime,  # device and processes
    objective: Objective,  # what is trained; left as it was
    batches_of: Callable[[int], Batches],  # rows over all processes to such batches
) -> int:
    """Rows of a batch over all processes; every process must ask.

    Raises:
        RunError: Not even two rows fit into the memory of the GPU.
    """
    if wanted != "auto":
        return runtime.batch_size(wanted, count)
    path = folder / BATCH_SIZE_FILE
    recorded = read_record(path, BatchSize).batch_size if runtime.main and path.is_file() else None
    size_of_stage = runtime.gather(recorded)[0]
    if size_of_stage is None:
        state = snapshot(objective)
        training = objective.training
        objective.begin_epoch(0)
        find = _try_on_gpu if runtime.device.type == "cuda" else _reckon
        share = max(count // runtime.shares, SMALLEST)

        def batch_of(rows: int) -> Any:
            return batches_of(rows * runtime.shares)(0, 0)

        size = find(objective.train(), batch_of, 1 << (share.bit_length() - 1), runtime)
        objective.load_state_dict(state)
        objective.train(training)
        size_of_stage = min(runtime.gather(size)) * runtime.shares
        if runtime.main:
            write_record(path, {"batch_size": size_of_stage})
            say(f"runtime.batch_size=auto: batches of {size_of_stage}")
    return runtime.batch_size(size_of_stage, count)


class BatchSize(BaseModel):
    """The content of batch_size.json."""

    batch_size: PositiveInt


def _step(objective: nn.Module, batch: Any, runtime: Runtime) -> None:
    # Memory may be full here and not elsewhere: an exchange would wait for one that never comes.
    with by_itself(), _own_statistics(objective), runtime.autocast(objective):
        terms: dict[str, Tensor] = objective(batch)
    torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
    objective.zero_grad(set_to_none=True)


@contextlib.contextmanager
def _own_statistics(objective: nn.Module) -> Iterator[None]:
    """Within the block, batch norms over all processes take this one's statistics alone."""
    norms = [layer for layer in objective.modules() if isinstance(layer, nn.SyncBatchNorm)]
    for norm in norms:
        norm.forward = partial(_BatchNorm.forward, norm)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def _try_on_gpu(
    objective: nn.Module, batch_of: Callable[[int], Any], most: int, runtime: Runtime
) -> int:
    """Halve until forward and backward pass fit beside the optimiser's state."""
    weights = sum(p.numel() * p.element_size() for p in objective.parameters() if p.requires_grad)
    size = most
    while size >= SMALLEST:
        full, beside = False, None
        try:
            beside = torch.empty(3 * weights, dtype=torch.uint8, device=runtime.device)
            _step(objective, batch_of(size), runtime)
        except RuntimeError as error:
            if full_memory(type(error).__name__, str(error)) is None:
                raise
            full = True
        del beside  # before the cache is emptied, also where the step failed
        objective.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        if not runtime.any(full)[0]:
            return size
        size //= 2
    raise RunError(
        f"runtime.batch_size=auto: not even {SMALLEST} images fit into the memory of the GPU: "
        "prepare smaller ones (image_size), or choose a smaller source.backbone"
    )


def _reckon(
    objective: nn.Module, batch_of: Callable[[int], Any], most: int, runtime: Runtime
) -> int:
    """Divide the free memory by what one more row keeps for the backward pass.

    On a CPU the system kills a process that takes too much memory, so this is not tried.
    """
    few, more = (
        kept_bytes(lambda size=size: _step(objective, batch_of(min(size, most)), runtime))  # type: ignore[misc]
        for size in (4, 8)
    )
    row = max((more - few) / 4, 1.0) * TRANSIENT
    room = SHARE * free_memory() / runtime.world
    size = most
    while size > SMALLEST and size * row > room:
        size //= 2
    return size


def kept_bytes(work: Callable[[], object]) -> int:
    """Bytes that the forward passes of some work keep for backward passes; runs the work once."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(storages.values())


class Tried(Exception):
    """A dry run has reached the training and measured it."""

    def __init__(self, figures: DryRunFigures, inputs: Iterable[str]) -> None:
        self.figures = figures
        self.inputs = inputs  # names of what the stage is made from, as in done.json


def try_out(training: Training, figures: DryRunFigures) -> None:
    """Time what an epoch does beside its steps, and one step after a smaller one to warm up.

    If a step with all rows would take long on a CPU, the timed step has few rows, too.
    """
    runtime, objective = training.runtime, training.objective
    skipped_s, began = figures.skipped_s, time.monotonic()
    objective.begin_epoch(0)
    objective.eval()
    with torch.inference_mode():
        training.scores(0)
    runtime.wait()
    figures.epoch_s = time.monotonic() - began + figures.skipped_s - skipped_s
    figures.skipped_s = skipped_s

    batch = training.batches(0, 0)
    rows = len(next(iter(batch.values())))
    few = min(rows, FEW_ROWS)
    objective.train()
    seed_all(training.stage.config.seed, training.title, 0)

    def step(count: int) -> float:
        began = time.monotonic()
        training.descend(objective, {name: values[:count] for name, values in batch.items()})
        runtime.wait()
        return time.monotonic() - began

    took: list[float] = []
    kept = kept_bytes(lambda: took.append(step(few)))
    figures.scaled = runtime.device.type == "cpu" and took[0] * rows / few > PATIENCE_S
    tried = few if figures.scaled else rows
    figures.step_s = step(tried) * rows / tried
    figures.peak_memory_mb = runtime.peak_memory_mb()
    figures.peak_memory_mb += (rows / tried - 1) * kept * TRANSIENT / 2**20

    figures.epochs, figures.steps = training.epochs, training.steps
    figures.images = training.images_per_step
    parameters = list(objective.parameters())
    figures.parameters = sum(p.numel() for p in parameters)
    figures.trained = sum(p.numel() for p in parameters if p.requires_grad)
    momenta = [value for state in training.optimizer.state.values() for value in state.values()]
    figures.model_bytes = _bytes(training.keep.state_dict().values())
    figures.state_bytes = 2 * (  # two states are kept
        _bytes(objective.state_dict().values()) + _bytes(momenta) + figures.model_bytes
    )


def _bytes(values: Iterable[Any]) -> int:
    return sum(value.nbytes for value in values if isinstance(value, Tensor))
