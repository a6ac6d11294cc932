"""What tests ask of several processes: functions that each process calls, started by spawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import spawn

from sfkt_cli import losses
from sfkt_cli.data.images import Encoding
from sfkt_cli.distributed import from_all_processes, mean_over_processes
from sfkt_cli.methods.objective import Bank
from sfkt_cli.methods.tgmb import Tgmb
from sfkt_cli.models.classifier import Classifier, freeze
from sfkt_cli.settings.config import build
from sfkt_cli.settings.stage import Stage
from sfkt_cli.training.batches import Stream
from sfkt_cli.training.loop import Batch, Training
from sfkt_cli.training.predicting import View, predict_rows
from sfkt_cli.training.recipes import cosine
from sfkt_cli.training.runtime import Runtime, seed_all
from sfkt_cli.training.trial import _try_on_gpu

SIZE, BATCH, FEATURES, COUNTS = 16, 8, 8, (1, 7, 200, 700)
WEIGHTS = {"rec": 1.0, "d": 0.7, "im": 0.5, "f": 2.0}
ALLOC_FAILED = "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"
Tensors = dict[str, Tensor]


def in_worlds(folder: Path, most: int, function: Callable[[Runtime, Path], None]) -> None:
    """Call a function in worlds of 1 .. most processes, one after the other, in one start."""
    spawn(_enter, (folder, most, function), nprocs=most)  # type: ignore[no-untyped-call]


def _enter(rank: int, folder: Path, most: int, function: Callable[[Runtime, Path], None]) -> None:
    torch.set_num_threads(1)
    for world in range(1, most + 1):
        if rank < world:
            with _world(rank, world, folder) as runtime:
                function(runtime, folder)


@contextmanager
def _world(rank: int, world: int, folder: Path) -> Iterator[Runtime]:
    if world > 1:
        distributed.init_process_group(
            "gloo", init_method=f"file://{folder / f'meet{world}'}", rank=rank, world_size=world,
            timeout=timedelta(seconds=60),
        )  # fmt: skip
    yield Runtime(torch.device("cpu"), torch.float32, rank, world)
    if world > 1:
        distributed.destroy_process_group()


def make_objective() -> Tgmb:
    """TGMB with all terms and a translator without BatchNorm; the source model is frozen."""
    torch.manual_seed(0)
    source = Classifier(
        backbone="small", classes=3, width=4, bottleneck=FEATURES,
        mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2),
    )  # fmt: skip
    translator = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1), nn.Sigmoid()
    )
    encoding = Encoding("linear", 0.0, 255.0, channels=1, missing=False)
    return Tgmb(
        translator, freeze(source), encoding, weights=WEIGHTS, rec_loss="mse", d_on="feature"
    )


def make_batches(runtime: Runtime) -> Callable[[int, int], Batch]:
    """Batches of random pairs, of which each process gets its share."""
    generator = np.random.default_rng(0)
    rgb = generator.integers(0, 256, (40, SIZE, SIZE, 3), dtype=np.uint8)
    target = generator.integers(0, 256, (40, SIZE, SIZE), dtype=np.uint8)

    def stream(name: str) -> Stream:
        return Stream(
            {"rgb": rgb, "target": target}, name=name, seed=3, batch_size=BATCH, shift=0.1,
            flip=True, runtime=runtime,
        )  # fmt: skip

    ti, tr = stream("ti"), stream("tr")

    def batches(epoch: int, step: int) -> Batch:
        pairs, rows = ti.batch(epoch, step)
        return {
            "ti_rgb": pairs["rgb"],
            "ti_target": pairs["target"],
            "tr_target": tr.batch(epoch, step)[0]["target"],
            "rows": torch.from_numpy(rows),
        }

    return batches


def gradients(runtime: Runtime) -> Tensors:
    """Gradients of L_TGMB over one batch that the processes share."""
    objective = make_objective()
    parallel = runtime.parallel(objective)  # averages for as long as it lives
    terms = parallel(make_batches(runtime)(0, 0))
    torch.stack([WEIGHTS[name] * term for name, term in terms.items()]).sum().backward()  # type: ignore[no-untyped-call]
    return {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}


class Terms(nn.Module):
    """Terms that are no means over the samples of a batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(5, FEATURES)

    def forward(self, images: Tensor, partners: Tensor) -> dict[str, Tensor]:
        features = self.layer(images)
        logits, prior = features[:, :3], torch.tensor([0.5, 0.3, 0.2])
        return {
            "dispersion": losses.dispersion(logits),
            "norm": losses.feature_matching_norm(features, partners),
            "im": losses.information_maximisation(logits, prior),
        }


def gradients_of_terms(runtime: Runtime) -> Tensors:
    """The gradient of each of these terms over one batch that the processes share."""
    terms = Terms()
    parallel = runtime.parallel(terms)
    generator = torch.Generator().manual_seed(1)
    images, partners = (torch.randn(BATCH, size, generator=generator) for size in (5, FEATURES))
    share, found = slice(runtime.rank, None, runtime.world), {}
    for name in ("dispersion", "norm", "im"):
        terms.zero_grad()
        parallel(images[share], partners[share])[name].backward()
        assert terms.layer.weight.grad is not None
        found[name] = terms.layer.weight.grad.clone()
    return found


def remembered(runtime: Runtime) -> Tensors:
    """What a bank holds after a batch in which images occur more than once."""
    generator = torch.Generator().manual_seed(2)
    bank = Bank(torch.ones(10, 4), torch.zeros(10, 3))
    rows, share = torch.tensor([1, 3, 3, 7, 0, 1, 9, 7]), slice(runtime.rank, None, runtime.world)
    features, logits = (torch.randn(len(rows), size, generator=generator) for size in (4, 3))
    bank.remember(rows[share], features[share], logits[share])
    return bank.state_dict()


def training(runtime: Runtime, folder: Path) -> list[dict[str, float]]:
    """Rows of metrics of a short training."""
    objective, place = make_objective(), folder / f"fit{runtime.world}"
    place.mkdir(exist_ok=True)
    config = build({"seed": 3, "runtime": {"checkpoint_seconds": 0.0}})
    fitted = Training(
        "test", Stage("test", place, config, {}), objective, make_batches(runtime),
        torch.optim.SGD(objective.parameters(), lr=0.05, momentum=0.9), runtime,
        epochs=2, steps=5, schedule=cosine, keep=objective.translator,
    ).fit()  # fmt: skip
    return fitted.history


def predictions(runtime: Runtime) -> dict[int, tuple[Tensor, Tensor, int]]:
    """What every row gets, for several numbers of rows, and how many were looked at here.

    A row is its own number.
    """
    looked_at = 0

    def model(rows: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal looked_at
        looked_at += len(rows)
        return rows[:, None].float(), torch.stack([rows, rows + 1], dim=1).float()

    found = {}
    for count in COUNTS:
        looked_at = 0
        outputs = predict_rows(np.arange(count), Plain(runtime, model))  # type: ignore[arg-type]
        found[count] = (*outputs, looked_at)
    return found


class Plain(View):
    """A view of numbers that are model input as they are."""

    def __call__(self, stored: NDArray[Any]) -> tuple[Tensor, Tensor]:
        features, logits = self.model(torch.from_numpy(stored))
        return features, logits


class Narrow(nn.Module):
    """An objective for which process 1 has less memory than the others.

    Each exchange of one process alone would wait for ever.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.norm = nn.SyncBatchNorm(1)
        self._most = 8 if rank == 1 else 32

    def forward(self, rows: Tensor) -> dict[str, Tensor]:
        if len(rows) > self._most:
            raise torch.OutOfMemoryError if len(rows) > 16 else RuntimeError(ALLOC_FAILED)
        rows = self.norm(rows[:, None])
        return {"mean": mean_over_processes((self.weight * from_all_processes(rows)).mean())}


def fitting_batch(runtime: Runtime) -> int:
    """The size of a batch that fits into the memory of every process, found by trying."""
    return _try_on_gpu(Narrow(runtime.rank), lambda size: torch.ones(size), 64, runtime)


def run_all(runtime: Runtime, folder: Path) -> None:
    """Gradients and epochs in 1 and 2 processes; predictions and a fitting batch in 1, 2 and 3."""
    found: dict[str, Any] = {"predictions": predictions(runtime)}
    found["fitting_batch"] = fitting_batch(runtime)
    if runtime.world < 3:
        found |= {
            "gradients": {**gradients(runtime), **gradients_of_terms(runtime)},
            "remembered": remembered(runtime),
            "history": training(runtime, folder),
        }
    seed_all(0)
    torch.save(found, folder / f"found{runtime.world}-{runtime.rank}.pt")
