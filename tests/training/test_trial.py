"""runtime.batch_size=auto: a power of two that fits, found once and remembered."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sfkt_cli.errors import ConfigError
from sfkt_cli.settings.config import build
from sfkt_cli.training import trial
from sfkt_cli.training.loop import Objective
from sfkt_cli.training.runtime import Runtime
from sfkt_cli.training.trial import settle_batch_size

RUNTIME = Runtime(torch.device("cpu"), torch.float32)


class Kept(Objective):
    """Keeps 4,000 bytes of activations a row for the backward pass, and counts its calls.

    Only the beginning of an epoch makes its term, as it makes pseudo-labels.
    """

    begun: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(10)
        self.weight = nn.Parameter(torch.ones(1000))
        self.register_buffer("begun", torch.zeros(()))
        self.calls = 0

    def begin_epoch(self, epoch: int) -> None:
        self.begun.fill_(1)

    def forward(self, rows: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        self.calls += 1
        self.norm(torch.rand(4, 10))
        return {"sum": (rows.repeat(1, 1000) * self.weight).sum()} if self.begun else {}


def settle(folder: Path, objective: Kept, count: int = 10_000) -> int:
    return settle_batch_size(
        "auto",
        count,
        folder,
        RUNTIME,
        objective,
        lambda size: lambda epoch, step: torch.ones(size, 1),
    )


@pytest.mark.parametrize(("free", "expected"), [(1 << 40, 8192), (4_200_000, 256), (1, 2)])
def test_it_is_the_largest_power_of_two_that_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, expected: int
) -> None:
    monkeypatch.setattr(trial, "free_memory", lambda: free)
    objective = Kept()
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    assert settle(tmp_path, objective) == expected
    assert all(torch.equal(before[name], now) for name, now in objective.state_dict().items())
    assert objective.weight.grad is None
    monkeypatch.setattr(trial, "free_memory", lambda: 1 << 20)
    again = Kept()
    assert settle(tmp_path, again) == expected
    assert again.calls == 0


@pytest.mark.parametrize("value", [1, "most", 100_000])
def test_other_values_are_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"runtime\.batch_size = "):
        build({"runtime": {"batch_size": value}})
