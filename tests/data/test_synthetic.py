from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sfkt_cli.data.readers.synthetic import CLASSES, TI_CLASSES, TR_CLASSES, render
from sfkt_cli.data.solids import SHAPES, first_hit

Numbers = NDArray[np.floating[Any]]


def _inside(name: str, u: Numbers, p: Numbers) -> Any:
    """Whether points `(3, T)` lie in a solid, from its textbook inequality."""
    x, y, z = p
    around = np.hypot(x, y)
    if name == "sphere":
        return around**2 + z**2 < 1
    if name == "box":
        a, b, c = 0.62 + 0.38 * u[:3]
        return (abs(x) < a) & (abs(y) < b) & (abs(z) < c)
    if name == "cylinder":
        return (around < 1) & (abs(z) < 1.2 + 0.6 * u[0])
    if name == "cone":
        h = 0.9 + 0.4 * u[0]
        return (abs(z) < h) & (around < (h - z) / (2 * h))
    if name == "torus":
        return (around - 1) ** 2 + z**2 < (0.26 + 0.18 * u[0]) ** 2
    if name == "octahedron":
        return abs(x) + abs(y) + abs(z) / (1.1 + 0.3 * u[0]) < 1
    assert name == "tube"
    return (abs(z) < 0.35 + 0.7 * u[0]) & (around < 1) & (around > 0.55 + 0.25 * u[1])


@pytest.mark.parametrize("name", [*TR_CLASSES, "tube"])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_rays_meet_solids_where_small_steps_along_them_do(
    name: str, kind: type[np.floating[Any]]
) -> None:
    random = np.random.default_rng(7)
    rays, step = 80, 0.002
    u = random.random(4)
    origin = random.normal(size=(3, rays))
    origin *= 4 / np.linalg.norm(origin, axis=0)
    direction = random.uniform(-0.8, 0.8, (3, rays)) - origin
    # Symmetric views, where a quartic or a quadric degenerates.
    origin[:, :4] = np.array([[4, 0, 0], [0, 4, 0], [0.03, 0.02, 4], [0, -4, 0.1]]).T
    direction[:, :4] = np.array([[-1, 0, 0], [0, -1, 0], [0, 0, -1], [0, 1, 0]]).T
    direction *= 1.5 / np.linalg.norm(direction, axis=0)

    t, normal = first_hit(SHAPES[name](u), origin.astype(kind), direction.astype(kind))

    steps = np.arange(0, 5, step)
    hits = 0
    for ray in range(rays):
        along = origin[:, ray, None] + steps * direction[:, ray, None]
        inside = _inside(name, u, along)
        if not inside.any():
            # At most a graze shorter than a step.
            if np.isfinite(t[ray]):
                later = origin[:, ray] + (t[ray] + step) * direction[:, ray]
                assert not _inside(name, u, later[:, None]).any()
            continue
        hits += 1
        assert t[ray] == pytest.approx(steps[inside.argmax()], abs=1.5 * step)
        assert np.linalg.norm(normal[:, ray]) == pytest.approx(1, abs=1e-3)
        assert normal[:, ray] @ direction[:, ray] < 1e-3
        out = origin[:, ray] + t[ray] * direction[:, ray] + 0.01 * normal[:, ray]
        assert not _inside(name, u, out[:, None]).any()
    assert hits > 25


def test_no_ray_slips_through_a_torus() -> None:
    """From straight above, the ring hides exactly a ring."""
    u = np.full(4, 0.5)
    grid = np.linspace(-1.6, 1.6, 81)
    x, y = (axis.ravel() for axis in np.meshgrid(grid, grid))
    origin = np.stack([x, y, np.full_like(x, 5)])
    direction = np.tile(np.array([[0.0], [0.0], [-1.0]]), x.size)
    t, _ = first_hit(SHAPES["torus"](u), origin, direction)
    gap = np.abs(np.hypot(x, y) - 1) - 0.35
    assert (np.isfinite(t) == (gap < 0))[np.abs(gap) > 1e-6].all()


def _pairs(
    names: Sequence[str], seed: int, first: int = 0, size: int = 48
) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    pairs = [render(name, first + i, seed=seed, size=size) for i, name in enumerate(names)]
    rgb, depth_mm = zip(*pairs, strict=True)
    return np.stack(rgb), np.stack(depth_mm)


def test_classes_are_distinct_and_all_have_a_shape() -> None:
    assert CLASSES == TR_CLASSES + TI_CLASSES
    assert len(set(CLASSES)) == len(CLASSES) == len(SHAPES)
    assert len(TI_CLASSES) >= 8


@pytest.mark.parametrize("size", [32, 48])
def test_shapes_types_and_depth_range(size: int) -> None:
    rgb, depth_mm = _pairs(2 * CLASSES, seed=1, size=size)
    assert rgb.shape == (36, size, size, 3)
    assert rgb.dtype == np.uint8
    assert depth_mm.shape == (36, size, size)
    assert depth_mm.dtype == np.uint16
    read = depth_mm[depth_mm > 0]
    assert read.min() > 300
    assert read.max() < 9000
    holes = (depth_mm == 0).mean(axis=(1, 2))
    assert (holes > 0).mean() > 0.9
    assert holes.max() < 0.4
    assert 0.01 < holes.mean() < 0.15


def test_a_sample_depends_on_class_index_seed_and_size_alone() -> None:
    rgb, depth_mm = _pairs(CLASSES[:5], seed=5, first=10)
    again = [render(CLASSES[i], 10 + i, seed=5) for i in (4, 2, 0, 3, 1)]  # in another order
    for number, (own_rgb, own_depth_mm) in zip((4, 2, 0, 3, 1), again, strict=True):
        assert own_rgb.tobytes() == rgb[number].tobytes()
        assert own_depth_mm.tobytes() == depth_mm[number].tobytes()
    for other in (render("box", 10, seed=5), render("sphere", 11, seed=5)):
        assert not np.array_equal(other[0], rgb[0])
    assert not np.array_equal(render("sphere", 10, seed=6)[0], rgb[0])


def test_colour_tells_no_class() -> None:
    """Colours do not depend on the label: the same scenes differ by the solid's outline alone."""
    means = np.array([_pairs(40 * [n], seed=3)[0].mean(axis=(1, 2)) for n in TR_CLASSES])
    assert np.abs(means - means.mean(axis=0)).mean() < 0.3 * means.std(axis=1).mean()
    assert np.ptp(means.mean(axis=1), axis=0).max() < 5


def test_depth_noise_grows_with_distance() -> None:
    _, depth_mm = _pairs(80 * ["sphere"], seed=4)
    # The third difference along a row removes smooth surfaces and leaves the noise.
    rows = depth_mm.astype(float)
    bend = rows[..., 3:] - 3 * rows[..., 2:-1] + 3 * rows[..., 1:-2] - rows[..., :-3]
    near_mm = rows[..., 1:-2]
    whole = np.min([rows[..., i : i + bend.shape[-1]] for i in range(4)], axis=0) > 0

    def noise(low: int, high: int) -> float:
        return float(np.median(np.abs(bend[whole & (near_mm > low) & (near_mm < high)])))

    assert noise(2400, 3200) > 2.5 * noise(800, 1200) > 0


def test_solids_stand_out_in_depth() -> None:
    """Every picture's middle holds something nearer than the background around it."""
    _, depth_mm = _pairs(4 * CLASSES, seed=8)
    jumps = np.abs(np.diff(depth_mm.astype(float), axis=2)) > 60
    both = (depth_mm[:, :, 1:] > 0) & (depth_mm[:, :, :-1] > 0)
    assert ((jumps & both).sum(axis=(1, 2)) > 3).mean() > 0.85
