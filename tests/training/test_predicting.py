"""How many images a model looks at together, and batch norms that take on their statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sfkt_cli.data.images import rgb_to_float
from sfkt_cli.settings.config import RuntimeConfig
from sfkt_cli.training.predicting import (
    View,
    adapt_batch_norms,
    pictures_of,
    predict_rows,
    rows_at_once,
)
from sfkt_cli.training.runtime import Runtime, make_runtime


@pytest.fixture
def runtime() -> Runtime:
    return make_runtime(RuntimeConfig(gpus=0, precision="fp32"))


def stored(count: int, side: int) -> NDArray[np.uint8]:
    """Images that take no memory."""
    return np.broadcast_to(np.uint8(0), (count, side, side, 3))


@pytest.mark.parametrize(
    ("count", "side", "processes", "expected"),
    [(1000, 48, 1, 256), (1000, 128, 1, 256), (1000, 224, 1, 83), (1000, 512, 1, 16),
     (90, 128, 1, 90), (200, 128, 2, 100), (200, 512, 2, 16), (5, 48, 3, 2), (0, 48, 2, 1)],
)  # fmt: skip
def test_large_images_are_looked_at_a_few_at_a_time(
    count: int, side: int, processes: int, expected: int
) -> None:
    assert rows_at_once(stored(count, side), processes) == expected


def test_no_more_than_these_are_held_in_memory(runtime: Runtime) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            together.append(len(images))
            return images, self.norm(images)

    together: list[int] = []
    images, model = stored(40, 512), Model()

    class Look(View):
        def __call__(self, stored: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
            features, logits = self.model(torch.rand(len(stored), 2))
            return features, logits

    view = Look(runtime, model.eval())
    predict_rows(images, view, flips=True)
    adapt_batch_norms(images, view)
    assert together == [16, 16, 16, 16, 8, 8, 14, 13, 13]
    pictures = pictures_of(images, View(runtime, model))
    assert [len(part) for part in pictures] == [16, 16, 8]


class Twice(nn.Module):
    """Gives what a network gives as features and as logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return (self.network(images),) * 2


def adapt(images: NDArray[np.uint8], model: nn.Module, runtime: Runtime) -> None:
    twice = Twice(model).train(model.training)
    adapt_batch_norms(images, View(runtime, twice))


def network() -> tuple[nn.Sequential, nn.Conv2d, nn.BatchNorm2d]:
    torch.manual_seed(0)
    first, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.01)
    return nn.Sequential(first, norm, nn.ReLU()), first, norm


def test_batch_norms_take_the_statistics_of_all_images(runtime: Runtime) -> None:
    images = np.random.default_rng(0).integers(0, 256, (128, 6, 6, 3), dtype=np.uint8)
    model, first, norm = network()
    weights = [parameter.clone() for parameter in model.parameters()]
    adapt(images, model, runtime)
    with torch.no_grad():
        seen = first(rgb_to_float(torch.from_numpy(images))).transpose(0, 1).flatten(1)
    torch.testing.assert_close(norm.running_mean, seen.mean(dim=1))
    torch.testing.assert_close(norm.running_var, seen.var(dim=1), rtol=0.05, atol=0)
    assert norm.momentum == 0.01
    assert model.training
    for parameter, before in zip(model.parameters(), weights, strict=True):
        assert torch.equal(parameter, before)


@pytest.mark.parametrize("side", [8, 512, 1500])
def test_batch_norms_keep_what_differs_between_images(runtime: Runtime, side: int) -> None:
    levels = np.random.default_rng(0).normal(size=64).astype(np.float32)
    images = np.broadcast_to(levels[:, None, None], (64, side, side))
    norm = nn.BatchNorm2d(1)

    class Corner(View):
        def __call__(self, stored: NDArray[np.float32]) -> tuple[Tensor, Tensor]:
            return (self.model(torch.from_numpy(stored[:, :1, :1].copy())[:, None]),) * 2

    adapt_batch_norms(images, Corner(runtime, norm))
    assert norm.running_var is not None
    assert float(norm.running_var) > 0.9 * levels.var()


def test_a_single_image_or_no_batch_norm_changes_nothing(runtime: Runtime) -> None:
    images = np.zeros((65, 6, 6, 3), np.uint8)
    model, _, norm = network()
    model.eval()
    adapt(images[:1], model, runtime)
    assert norm.running_mean is not None
    assert norm.running_mean.eq(0).all()
    plain = nn.Conv2d(3, 4, 3).train()
    adapt(images, plain, runtime)
    assert plain.training


def test_no_batch_is_a_single_image(runtime: Runtime) -> None:
    norm = nn.BatchNorm1d(108)  # refuses a single image
    model = nn.Sequential(nn.Flatten(), norm)
    adapt(np.zeros((65, 6, 6, 3), np.uint8), model, runtime)
    assert norm.num_batches_tracked is not None
    assert int(norm.num_batches_tracked) == 2
