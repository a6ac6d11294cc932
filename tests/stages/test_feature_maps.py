"""Which feature maps of a source model the bridge matches, and what it says if there are none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sfkt_cli.errors import ConfigError
from sfkt_cli.models.classifier import Classifier, Mixture, freeze
from sfkt_cli.settings.config import build
from sfkt_cli.stages.bridge import feature_maps_of, loss_weights
from sfkt_cli.training.runtime import Runtime

CPU = Runtime(torch.device("cpu"), torch.float32)
RGB = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
SIZES: dict[str, Any] = {
    "backbone": "small", "classes": 3, "width": 4, "bottleneck": 8,
    "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2),
}  # fmt: skip
ON = {"rec": 1.0, "f": 0.3, "p": 0.3}


def without_maps() -> Classifier:
    model = Classifier(**SIZES)
    model.backbone = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 16))
    return freeze(model)


def test_a_classifier_and_each_member_of_a_mixture_have_levels() -> None:
    alone = feature_maps_of(freeze(Classifier(**SIZES)), ON, RGB, CPU)
    both = feature_maps_of(freeze(Mixture([SIZES, {**SIZES, "width": 6}])), ON, RGB, CPU)
    assert alone is not None
    assert both is not None
    assert alone.names == ["stages.1", "stages"]
    assert both.names == alone.names * 2
    assert len(both.variances) == 4


def test_no_levels_are_sought_where_the_term_is_off() -> None:
    assert feature_maps_of(freeze(Classifier(**SIZES)), ON | {"p": 0.0}, RGB, CPU) is None


def test_a_model_without_maps_trains_by_the_other_terms_or_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert feature_maps_of(without_maps(), ON, RGB, CPU) is None
    assert "L_p is switched off" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"has no feature maps.*; set bridge\.alpha_f"):
        feature_maps_of(without_maps(), {"rec": 0.0, "f": 0.0, "p": 0.3}, RGB, CPU)


def test_pairs_that_are_not_registered_need_the_feature_term() -> None:
    weights = loss_weights(build({}), registered=False)
    assert (weights["rec"], weights["p"]) == (0.0, 0.0)
    with pytest.raises(ConfigError, match=r"not registered.*set bridge\.alpha_f"):
        loss_weights(build({"bridge": {"alpha_f": 0}}), registered=False)
