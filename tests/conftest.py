"""One thread for each test; console and signals as they are, whatever a test before it did."""

import os
import signal
from collections.abc import Iterator

os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

from sfkt_cli.console import console, outlets

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where they run in the background


@pytest.fixture(autouse=True)
def _speaking_console() -> None:
    console.quiet = outlets.json = outlets.muted = False


@pytest.fixture(autouse=True)
def _usual_signals() -> Iterator[None]:
    stop_signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in stop_signals]
    yield
    for number, handler in zip(stop_signals, before, strict=True):
        signal.signal(number, handler)
