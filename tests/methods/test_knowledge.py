import numpy as np
import pytest
import torch

from sfkt_cli.methods.teacher_outputs import reliability

TEACHER = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.8, 0.2]])
STUDENT = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.1, 0.9]])
BRIDGE = torch.tensor([[0.0, 1.0], [0.5, 0.5], [0.1, 0.9]])
VALID = torch.tensor([1.0, 0.5, 0.0])


def oracle(names: list[str], *, views: bool) -> list[float]:
    weights = []
    for row in range(3):
        weight = 1.0
        if "confidence" in names:
            entropy = -sum(p * np.log(p) for p in TEACHER[row].tolist() if p > 0)
            weight *= 1 - entropy / np.log(2)
        if "agreement" in names and views:
            pairs = zip(BRIDGE[row].tolist(), STUDENT[row].tolist(), strict=True)
            weight *= sum(np.sqrt(p * q) for p, q in pairs)
        if "valid" in names:
            weight *= VALID[row].item()
        weights.append(weight)
    mean = max(sum(weights) / 3, 1e-8)
    return [weight / mean for weight in weights]


@pytest.mark.parametrize("views", [True, False])
@pytest.mark.parametrize(
    "names", [[], ["confidence"], ["agreement"], ["valid"], ["confidence", "agreement", "valid"]]
)
def test_reliability_against_a_slow_oracle(names: list[str], views: bool) -> None:
    pair = (BRIDGE, STUDENT) if views else None
    weights = reliability(names, TEACHER, pair, VALID)
    np.testing.assert_allclose(weights.numpy(), oracle(names, views=views), rtol=1e-5, atol=1e-6)
