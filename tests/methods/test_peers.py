"""AaD and NRC against loops over images, and the order of neighbours by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfkt_cli import losses
from sfkt_cli.methods.nrc import affinities
from sfkt_cli.methods.objective import Bank


def slow_attraction(said: Tensor, neighbours: Tensor, affinity: Tensor) -> Tensor:
    total = torch.zeros(())
    for image in range(len(said)):
        for place in range(neighbours.shape[1]):
            agreement = sum(
                a * b for a, b in zip(said[image], neighbours[image, place], strict=True)
            )
            total = total - affinity[image, place] * agreement
    return total / len(said)


def slow_dispersion(said: Tensor) -> Tensor:
    total = torch.zeros(())
    for image in range(len(said)):
        for other in range(len(said)):
            if other != image:
                total = total + sum(a * b for a, b in zip(said[image], said[other], strict=True))
    return total / len(said)


def gradient(loss: Tensor, logits: Tensor) -> NDArray[np.float32]:
    (found,) = torch.autograd.grad(loss, logits)
    values: NDArray[np.float32] = found.numpy()
    return values


def test_attraction_equals_a_slow_loop() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 3, requires_grad=True)
    neighbours, affinity = torch.randn(4, 2, 3).softmax(2), torch.rand(4, 2)
    fast = losses.attraction(logits, neighbours, affinity)
    slow = slow_attraction(logits.softmax(1), neighbours, affinity)
    assert float(fast.detach()) == pytest.approx(float(slow.detach()), rel=1e-5)
    np.testing.assert_allclose(gradient(fast, logits), gradient(slow, logits), atol=1e-6)


def test_dispersion_equals_a_slow_loop() -> None:
    torch.manual_seed(1)
    logits = torch.randn(5, 3, requires_grad=True)
    fast, slow = losses.dispersion(logits), slow_dispersion(logits.softmax(1))
    assert float(fast.detach()) == pytest.approx(float(slow.detach()), rel=1e-5)
    np.testing.assert_allclose(gradient(fast, logits), gradient(slow, logits), atol=1e-6)


def test_extremes_of_attraction_and_dispersion() -> None:
    same = torch.tensor([[50.0, 0.0]]).expand(4, 2)
    apart = 50 * torch.eye(4)
    certain = same.softmax(1).unsqueeze(1).expand(-1, 3, -1)
    assert float(losses.attraction(same, certain)) == pytest.approx(-3)
    assert float(losses.attraction(same.flip(1), certain)) == pytest.approx(0)
    assert float(losses.dispersion(same)) == pytest.approx(3)
    assert float(losses.dispersion(apart)) == pytest.approx(0)


def bank() -> Bank:
    """Five directions in the plane, by angle in degrees."""
    angles = torch.deg2rad(torch.tensor([0.0, 10.0, 25.0, 90.0, 180.0]))
    return Bank(3 * torch.stack([angles.cos(), angles.sin()], 1), torch.zeros(5, 2))


def test_neighbours_are_the_nearest_others_in_cosine() -> None:
    rows = torch.tensor([0, 2, 4])
    assert bank().neighbours(rows, 2).tolist() == [[1, 2], [1, 0], [3, 2]]
    assert bank().neighbours(rows.view(3, 1), 1).tolist() == [[[1]], [[1]], [[3]]]


def test_a_bank_has_no_more_neighbours_than_others() -> None:
    assert bank().neighbours(torch.tensor([0]), 9).shape == (1, 4)


def test_the_bank_remembers_unit_features_and_probabilities() -> None:
    known = bank()
    known.remember(torch.tensor([3]), torch.tensor([[0.0, -7.0]]), torch.tensor([[0.0, 50.0]]))
    assert known.features[3].tolist() == [0, -1]
    assert known.probabilities[3].tolist() == pytest.approx([0, 1])
    assert known.probabilities[2].tolist() == pytest.approx([0.5, 0.5])


def test_of_an_image_that_a_batch_holds_twice_the_bank_keeps_the_last() -> None:
    rows = torch.randint(5, (6000,), generator=torch.Generator().manual_seed(0))
    places = torch.arange(6000.0)
    features = torch.stack([places, torch.ones(6000)], 1)
    known, threads = bank(), torch.get_num_threads()
    torch.set_num_threads(4)  # on one thread the last one stays anyway
    try:
        known.remember(rows, features, torch.stack([places.log(), torch.zeros(6000)], 1))
    finally:
        torch.set_num_threads(threads)
    for row in range(5):
        last = float(places[rows == row].max())
        assert known.features[row, 0] / known.features[row, 1] == pytest.approx(last, rel=1e-4)
        assert float(known.probabilities[row, 0]) == pytest.approx(last / (last + 1), rel=1e-6)


def test_reciprocal_neighbours_count_fully_and_the_image_itself_not_twice() -> None:
    known, rows = bank(), torch.tensor([0, 3])
    near = known.neighbours(rows, 2)
    assert near.tolist() == [[1, 2], [2, 1]]
    wider = known.neighbours(near, 2)
    assert wider.tolist() == [[[0, 2], [1, 0]], [[1, 0], [0, 2]]]
    near_affinity, wider_affinity = affinities(rows, wider, 0.1)
    assert near_affinity.tolist() == [[1, 1], [pytest.approx(0.1), pytest.approx(0.1)]]
    expected = [[0, 0.1, 0.1, 0], [0.1, 0.1, 0.1, 0.1]]
    assert wider_affinity.tolist() == [pytest.approx(row) for row in expected]
