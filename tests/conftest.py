"""One thread for each test, and a console that speaks whatever a test before it had it do."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

from sfkt_cli.console import console, outlets

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _speaking_console() -> None:
    console.quiet = outlets.json = outlets.muted = False
