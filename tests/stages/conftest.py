"""A run whose models were never trained: enough for export, predict and doctor, in a second."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch

from sfkt_cli.data.images import choose_encoding
from sfkt_cli.data.sensor import prepared_sensor
from sfkt_cli.data.store import open_store
from sfkt_cli.files import write_record, write_settings
from sfkt_cli.models.classifier import Classifier
from sfkt_cli.models.saving import save_model
from sfkt_cli.models.translators import make_translator
from sfkt_cli.settings.config import Config, build, to_yaml
from sfkt_cli.settings.runs import Run
from sfkt_cli.settings.stage import Stage
from sfkt_cli.stages.prepare import prepare

SETTINGS = {
    "image_size": 16,
    "synthetic": {"pairs": 130},
    "prepare": {"workers": 1},
    "runtime": {"gpus": 0},
}


@pytest.fixture(scope="session")
def untrained_config() -> Config:
    return build(SETTINGS)


@pytest.fixture(scope="session")
def untrained_run(tmp_path_factory: pytest.TempPathFactory, untrained_config: Config) -> Run:
    run = Run(tmp_path_factory.mktemp("untrained") / "synthetic")
    prepare(untrained_config, run)
    add_models(run, untrained_config)
    return run


def add_models(run: Run, config: Config) -> None:
    store = open_store(run.transfer_store)
    encoding = choose_encoding("auto", store.modality, store["target/target"])
    architecture: dict[str, Any] = {
        "backbone": "small", "classes": len(store.classes), "width": 4, "bottleneck": 8,
        "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2),
    }  # fmt: skip
    sizes = {"name": "unet", "channels": encoding.encoded_channels, "width": 4}
    torch.manual_seed(0)
    for stage, kind in (
        ("source", "classifier"), ("bridge", "translator"), ("transfer/tgkt", "classifier"),
    ):  # fmt: skip
        run.path(stage).mkdir(parents=True, exist_ok=True)
        translator = kind == "translator"
        module = (
            make_translator("unet", channels=encoding.encoded_channels, width=4)
            if translator
            else _spread(Classifier(**architecture))
        )
        more = {"sensor": asdict(prepared_sensor(run))} if stage == "transfer/tgkt" else {}
        save_model(
            Stage(stage, run.path(stage), config, {}), module, kind=kind,
            architecture=sizes if translator else architecture,
            classes=[] if translator else store.classes,
            encoding=None if stage == "source" else encoding, **more,
        )  # fmt: skip
        write_settings(run.path(stage, "config.yaml"), to_yaml(config))
        write_record(run.path(stage, "done.json"), {"stage": stage, "settings": {}, "inputs": {}})


def _spread(model: Classifier) -> Classifier:
    """Let the logits differ from image to image by more than rounding."""
    with torch.no_grad():
        for name, value in model.head.named_parameters():
            if name.endswith("original0"):
                value.mul_(20)
    return model
