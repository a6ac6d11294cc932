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


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.01), nn.ReLU())


def test_batch_norms_take_the_statistics_of_all_images(runtime: Runtime) -> None:
    images = np.random.default_rng(0).integers(0, 256, (130, 6, 6, 3), dtype=np.uint8)
    model = network().train()
    weights = [parameter.clone() for parameter in model.parameters()]
    adapt_batch_norms(images, rgb_loader(runtime), model, runtime)
    seen = model[0](rgb_loader(runtime)(images)).transpose(0, 1).flatten(1)
    torch.testing.assert_close(model[1].running_mean, seen.mean(dim=1))
    torch.testing.assert_close(model[1].running_var, seen.var(dim=1), rtol=0.05, atol=0)
    assert model[1].momentum == 0.01
    assert model.training
    for parameter, before in zip(model.parameters(), weights, strict=True):
        assert torch.equal(parameter, before)


def test_a_single_image_or_no_batch_norm_changes_nothing(runtime: Runtime) -> None:
    images = np.zeros((65, 6, 6, 3), np.uint8)
    model = network().eval()
    adapt_batch_norms(images[:1], rgb_loader(runtime), model, runtime)
    assert model[1].running_mean.eq(0).all()
    plain = nn.Conv2d(3, 4, 3).train()
    adapt_batch_norms(images, rgb_loader(runtime), plain, runtime)
    assert plain.training


def test_no_batch_is_a_single_image(runtime: Runtime) -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(108))  # refuses one image
    adapt_batch_norms(np.zeros((65, 6, 6, 3), np.uint8), rgb_loader(runtime), model, runtime)
    assert int(model[1].num_batches_tracked) == 2
