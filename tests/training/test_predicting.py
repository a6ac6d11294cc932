"""Batch norms that take on the statistics of other images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from sfkt_cli.settings.config import RuntimeConfig
from sfkt_cli.training.predicting import adapt_batch_norms, rgb_loader
from sfkt_cli.training.runtime import Runtime, make_runtime


@pytest.fixture
def runtime() -> Runtime:
    return make_runtime(RuntimeConfig(gpus=0, precision="fp32"))


def network() -> tuple[nn.Sequential, nn.Conv2d, nn.BatchNorm2d]:
    torch.manual_seed(0)
    first, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.01)
    return nn.Sequential(first, norm, nn.ReLU()), first, norm


def test_batch_norms_take_the_statistics_of_all_images(runtime: Runtime) -> None:
    images = np.random.default_rng(0).integers(0, 256, (128, 6, 6, 3), dtype=np.uint8)
    model, first, norm = network()
    weights = [parameter.clone() for parameter in model.parameters()]
    adapt_batch_norms(images, rgb_loader(runtime), model, runtime)
    with torch.no_grad():
        seen = first(rgb_loader(runtime)(images)).transpose(0, 1).flatten(1)
    torch.testing.assert_close(norm.running_mean, seen.mean(dim=1))
    torch.testing.assert_close(norm.running_var, seen.var(dim=1), rtol=0.05, atol=0)
    assert norm.momentum == 0.01
    assert model.training
    for parameter, before in zip(model.parameters(), weights, strict=True):
        assert torch.equal(parameter, before)


def test_a_single_image_or_no_batch_norm_changes_nothing(runtime: Runtime) -> None:
    images = np.zeros((65, 6, 6, 3), np.uint8)
    model, _, norm = network()
    model.eval()
    adapt_batch_norms(images[:1], rgb_loader(runtime), model, runtime)
    assert norm.running_mean is not None
    assert norm.running_mean.eq(0).all()
    plain = nn.Conv2d(3, 4, 3).train()
    adapt_batch_norms(images, rgb_loader(runtime), plain, runtime)
    assert plain.training


def test_no_batch_is_a_single_image(runtime: Runtime) -> None:
    norm = nn.BatchNorm1d(108)  # refuses a single image
    model = nn.Sequential(nn.Flatten(), norm)
    adapt_batch_norms(np.zeros((65, 6, 6, 3), np.uint8), rgb_loader(runtime), model, runtime)
    assert norm.num_batches_tracked is not None
    assert int(norm.num_batches_tracked) == 2
