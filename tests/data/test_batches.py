"""Batches: each row once a pass, one geometry for both views, any number of processes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sfkt_cli.training.batches import (
    Stream,
    geometry,
    shift_and_mirror,
    shift_and_mirror_on_gpu,
)
from sfkt_cli.training.runtime import Runtime

Images = NDArray[Any]


def on_cpu(rank: int = 0, world: int = 1) -> Runtime:
    return Runtime(torch.device("cpu"), torch.float32, rank, world)


def pictures(count: int, height: int = 6, width: int = 5) -> dict[str, Images]:
    """RGB and depth in which every pixel tells its sample and its place."""
    numbers = np.arange(count * height * width, dtype=np.uint16).reshape(count, height, width)
    rgb = np.stack([numbers // 256, numbers % 256, numbers % 7], axis=-1).astype(np.uint8)
    return {"rgb": rgb, "target": numbers}


def stream(count: int, **options: Any) -> Stream:
    usual: dict[str, Any] = {
        "name": "ti",
        "seed": 3,
        "batch_size": 4,
        "shift": 0.4,
        "flip": True,
        "runtime": on_cpu(),
    }
    return Stream(pictures(count), **usual | options)


@given(count=st.integers(1, 30), batch_size=st.integers(1, 11), epoch=st.integers(0, 3))
def test_each_row_comes_once_a_pass(count: int, batch_size: int, epoch: int) -> None:
    stream_ = stream(count, batch_size=batch_size)
    passes = 3
    steps = -(-passes * count // batch_size)
    seen = np.concatenate([stream_.draw(epoch, step)[0] for step in range(steps)])
    for number in range(passes):
        part = seen[number * count : (number + 1) * count]
        assert sorted(part.tolist()) == list(range(count))


def test_passes_epochs_seeds_and_streams_differ() -> None:
    def order(epoch: int, step: int, **options: Any) -> list[int]:
        found: list[int] = stream(50, batch_size=50, **options).draw(epoch, step)[0].tolist()
        return found

    orders = [
        order(0, 0),
        order(0, 1),
        order(1, 0),
        order(0, 0, seed=4),
        order(0, 0, name="tr"),
    ]
    assert len({tuple(each) for each in orders}) == len(orders)
    assert order(0, 0) == orders[0]


def test_a_batch_does_not_depend_on_what_was_drawn_before() -> None:
    walked, jumped = stream(13), stream(13)
    for step in range(9):
        images, rows = walked.batch(2, step)
    alone, alone_rows = jumped.batch(2, 8)
    assert rows.tolist() == alone_rows.tolist()
    for name in images:
        np.testing.assert_array_equal(images[name], alone[name])


@given(
    count=st.integers(1, 25),
    world=st.integers(1, 5),
    step=st.integers(0, 6),
    per_process=st.integers(1, 4),
)
def test_the_shares_of_all_processes_are_the_batch_of_one(
    count: int, world: int, step: int, per_process: int
) -> None:
    batch_size = world * per_process
    whole, rows = stream(count, batch_size=batch_size).batch(1, step)
    taken = np.zeros(batch_size, bool)
    for rank in range(world):
        part = stream(count, batch_size=batch_size, runtime=on_cpu(rank, world))
        images, own = part.batch(1, step)
        places = np.arange(batch_size)[rank::world]
        assert own.tolist() == rows[places].tolist()
        for name in images:
            np.testing.assert_array_equal(images[name], whole[name][places])
        taken[places] = True
    assert taken.all()


def test_both_views_of_a_pair_get_one_geometry() -> None:
    stream_ = stream(40, batch_size=40)
    for step in range(3):
        images, _ = stream_.batch(0, step)
        target, rgb = images["target"].numpy().astype(int), images["rgb"].numpy()
        np.testing.assert_array_equal(rgb[..., 0], target // 256)
        np.testing.assert_array_equal(rgb[..., 1], target % 256)
        np.testing.assert_array_equal(rgb[..., 2], target % 7)


def test_a_second_view_has_a_geometry_of_its_own_and_leaves_the_first_alone() -> None:
    one, _ = stream(40, batch_size=40).batch(1, 2)
    two, _ = stream(40, batch_size=40, views=2).batch(1, 2)
    assert set(two) == {"rgb", "target", "rgb_2", "target_2"}
    for name, images in one.items():
        assert torch.equal(images, two[name])
        assert not torch.equal(images, two[f"{name}_2"])
    second = two["target_2"].numpy().astype(int)
    np.testing.assert_array_equal(two["rgb_2"].numpy()[..., 1], second % 256)


def test_without_augmentation_the_stored_images_come_out() -> None:
    arrays = pictures(9)
    images, rows = stream(9, batch_size=9, shift=0.0, flip=False).batch(0, 0)
    for name, array in arrays.items():
        np.testing.assert_array_equal(images[name].numpy(), array[rows])
        assert images[name].numpy().dtype == array.dtype


def test_only_the_chosen_rows_are_drawn() -> None:
    chosen = np.array([2, 5, 11])
    stream_ = stream(20, rows=chosen, shift=0.0, flip=False, batch_size=3)
    assert stream_.count == 3
    images, rows = stream_.batch(0, 0)
    assert sorted(rows.tolist()) == chosen.tolist()
    np.testing.assert_array_equal(images["target"], pictures(20)["target"][rows])


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("shift", [0.0, 0.08, 0.5])
@pytest.mark.parametrize(
    ("channels", "kind"), [((), "u2"), ((3,), "u1"), ((2,), "u2"), ((), "f4"), ((1,), "f8")]
)
def test_gathering_equals_a_loop_over_pixels(
    flip: bool, shift: float, channels: tuple[int, ...], kind: str
) -> None:
    random = np.random.default_rng(1)
    height, width, count = 9, 12, 30
    noise = random.random((count, 3), np.float32)
    noise[:3] = np.array([[0], [0.5], [0.99999]])
    noise[-1] = 0.99999
    images = random.integers(200, size=(count, height, width, *channels)).astype(kind)
    offsets, mirrored = geometry(noise, (height, width), shift=shift, flip=flip)
    found = shift_and_mirror(images, offsets, mirrored)
    assert found.dtype == images.dtype
    for b in range(count):
        shift_down = round((2 * float(noise[b, 0]) - 1) * shift * height)
        shift_right = round((2 * float(noise[b, 1]) - 1) * shift * width)
        for y in range(height):
            for x in range(width):
                column = width - 1 - x if flip and noise[b, 2] < 0.5 else x
                row = min(max(y + shift_down, 0), height - 1)
                column = min(max(column + shift_right, 0), width - 1)
                assert (found[b, y, x] == images[b, row, column]).all()
    # And so a GPU makes them, of the batch as it is stored.
    moved = [torch.from_numpy(each) for each in (images, offsets, mirrored)]
    np.testing.assert_array_equal(shift_and_mirror_on_gpu(*moved).numpy(), found)


@pytest.mark.gpu
def test_a_gpu_makes_the_batches_of_the_cpu() -> None:
    on_gpu = Runtime(torch.device("cuda", 0), torch.float32)
    found, rows = stream(40, batch_size=16, runtime=on_gpu).batch(1, 2)
    expected, expected_rows = stream(40, batch_size=16).batch(1, 2)
    assert rows.tolist() == expected_rows.tolist()
    for name, images in expected.items():
        assert found[name].device.type == "cuda"
        np.testing.assert_array_equal(found[name].cpu().numpy(), images.numpy())


def test_shifts_and_mirrors_are_spread_evenly() -> None:
    random = np.random.default_rng(0)
    noise = random.random((4000, 3), np.float32)
    offsets, mirrored = geometry(noise, (100, 100), shift=0.1, flip=True)
    assert offsets.min() == -10
    assert offsets.max() == 10
    assert abs(offsets.mean()) < 0.5
    assert mirrored.mean() == pytest.approx(0.5, abs=0.04)
