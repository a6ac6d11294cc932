"""Labelled RGB-D pairs made on the spot: one solid on a floor before a wall, by ray casting.

Only the solid's shape tells its class. Colours, textures, light, camera, position and apparent size
are drawn from the same distributions for every class; depth has the noise of a structured-light
camera and its holes (0 = no reading). There are no files, so the archive is a number (the seed):
labels go round the classes, TI pairs last; each image is a scene (group) of its own.
"""

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sfkt_cli.data.records import Archive, Record
from sfkt_cli.data.solids import SHAPES, Floats, Ints, Solid, cast, dot, first_hit
from sfkt_cli.settings.config import Config

TR_CLASSES = ("sphere", "box", "cylinder", "cone", "torus", "octahedron")
TI_CLASSES = tuple(name for name in SHAPES if name not in TR_CLASSES)
CLASSES = TR_CLASSES + TI_CLASSES

_CHUNK_RAYS = 16 * 48 * 48  # few enough for the cache
_FLOOR, _WALL, _SOLID = range(3)
_SCENE_DRAWS = 96


@dataclass(frozen=True)
class SyntheticLoader:
    """Renders images one by one; the two views of a pair come from the same rendering."""

    seed: int

    def rgb(self, record: Record, size: int) -> NDArray[np.uint8]:
        """See :class:`~sfkt_cli.data.records.Loader`."""
        return _rendered(self.seed, record.id, size)[0]

    def target(self, record: Record, size: int) -> NDArray[Any]:
        """See :class:`~sfkt_cli.data.records.Loader`."""
        return _rendered(self.seed, record.id, size)[1]


@functools.lru_cache(maxsize=1)
def _rendered(seed: int, name: str, size: int) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    label, _, index = name.rpartition("-")
    rgb, depth_mm = render(np.array([CLASSES.index(label)]), seed=seed, first=int(index), size=size)
    return rgb[0], depth_mm[0]


def read(config: Config, root: Path) -> Archive:
    """List the images; ``root`` is not used."""
    del root
    pairs = config.synthetic.pairs
    tr_pairs = round(pairs * (1 - config.synthetic.ti_share))
    records = []
    for index in range(pairs):
        own = TR_CLASSES if index < tr_pairs else TI_CLASSES
        label = own[index % len(own)]
        path = f"synthetic/{config.seed}/{index:06d}"
        records.append(Record(f"{label}-{index:06d}", "", label, f"{path}/rgb", f"{path}/depth"))
    about = f"{config.seed} {pairs} {tr_pairs} {TR_CLASSES} {TI_CLASSES}"
    return Archive(
        records=tuple(records),
        loader=SyntheticLoader(config.seed),
        digest=hashlib.sha256(about.encode()).hexdigest(),
        usual_tr=TR_CLASSES,
        usual_ti=TI_CLASSES,
    )


def _turn(axis: int, angle: Floats | float) -> Floats:
    """Rotation matrices `(3, 3, ...)` about a coordinate axis; angles in radians."""
    angle = np.asarray(angle, np.float64)
    matrix = np.zeros((3, 3, *angle.shape))
    i, j = (axis + 1) % 3, (axis + 2) % 3
    matrix[axis, axis] = 1
    matrix[i, i] = matrix[j, j] = np.cos(angle)
    matrix[j, i] = np.sin(angle)
    matrix[i, j] = -matrix[j, i]
    return matrix


def _mul(a: Floats, b: Floats) -> Floats:
    """Products of matrices `(3, 3, B)`, without BLAS, whose rounding depends on B."""
    product: Floats = (a[:, :, None] * b[None]).sum(axis=1)
    return product


_UPRIGHT, _LYING, _LEANING = _turn(0, 0.0), _turn(0, np.pi / 2), _turn(0, np.pi / 4)
_FACE_DOWN = _turn(0, np.arctan(np.sqrt(2.0))) @ _turn(2, np.pi / 4)  # (1, 1, 1) becomes upright
_POSES = {
    **dict.fromkeys(("cylinder", "capsule", "prism", "frustum", "mushroom"), (_UPRIGHT, _LYING)),
    **dict.fromkeys(("torus", "dome", "tube"), (_UPRIGHT, _LYING, _LEANING)),
    "cone": (_UPRIGHT, _UPRIGHT, _LYING),
    "octahedron": (_UPRIGHT, _FACE_DOWN),
    "tetrahedron": (_FACE_DOWN,),
}


class _Draws:
    """Hands out columns of a table `(B, U)` of uniforms in a fixed order."""

    def __init__(self, table: Floats) -> None:
        self._table, self._used = table, 0

    def __call__(self, low: float, high: float, *shape: int) -> Floats:
        """`(*shape, B)` numbers between `low` and `high`."""
        count = int(np.prod(shape))
        columns = self._table[:, self._used : self._used + count].T
        self._used += count
        return low + (high - low) * columns.reshape(*shape, len(self._table))

    def column(self, low: float, high: float, *shape: int) -> Floats:
        """The same as float32, one column `(*shape, B, 1)`."""
        return self(low, high, *shape).astype(np.float32)[..., None]


class _Scene(NamedTuple):
    """B scenes; lengths in metres, z up, the solid above the origin, the wall across +y."""

    solid: Solid
    rotation: Floats  # (3, 3, B), from the solid's frame to the world's
    centre: Floats  # (3, B)
    scale: Floats  # (B,), metres a unit of the solid
    radius: Floats  # (B,), of a ball around the solid, in its units
    camera: Floats  # (3, B)
    axes: Floats  # (3, 3, B), columns: right, down and forward
    focal: Floats  # (B,), in picture sizes
    shift: Floats  # (2, B), where the optical axis meets the picture, in picture sizes
    wall_turn: Floats  # (B,), radians
    wall_m: Floats  # (B,), from the origin
    light: Floats  # (3, B), unit, towards the light


def render(
    labels: NDArray[np.integer[Any]], *, seed: int, first: int = 0, size: int = 48
) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    """Render the samples `first .. first + n - 1`; `labels` `(n,)` are indices into `CLASSES`.

    A sample depends on `seed`, its index, its label and `size` alone, so a set may be rendered in
    any pieces, in any process.

    Returns:
        Colours `(n, size, size, 3)` and depths along the optical axis `(n, size, size)` in
        millimetres, 0 = no reading.

    Raises:
        ValueError: If a label names no class.
    """
    labels = np.asarray(labels)
    if labels.size and (labels.min() < 0 or labels.max() >= len(CLASSES)):
        raise ValueError(f"labels must lie in 0..{len(CLASSES) - 1}")
    rgb = np.empty((len(labels), size, size, 3), np.uint8)
    depth_mm = np.empty((len(labels), size, size), np.uint16)
    chunk = max(1, _CHUNK_RAYS // (size * size))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        for start in range(0, len(members), chunk):
            rows = members[start : start + chunk]
            rgb[rows], depth_mm[rows] = _render_chunk(CLASSES[label], first + rows, seed, size)
    return rgb, depth_mm


def _render_chunk(
    name: str, indices: Ints, seed: int, size: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    """Render B samples of one class; inside, pictures are flat: `(B, P)` with P = size * size."""
    count, pixels = len(indices), size * size
    table = np.empty((count, _SCENE_DRAWS))
    normals = np.empty((4, count, pixels), np.float32)
    uniforms = np.empty((2, count, pixels), np.float32)
    for row, index in enumerate(indices):
        # Philox takes its key as it is: no seeding pass, and no sample shares a stream.
        stream = np.random.Generator(np.random.Philox(key=[seed, int(index)]))
        table[row] = stream.random(_SCENE_DRAWS)
        normals[:, row] = stream.standard_normal((4, pixels), np.float32)
        uniforms[:, row] = stream.random((2, pixels), np.float32)
    draws = _Draws(table)
    scene = _scene(name, draws)

    world_to_solid = (scene.rotation.swapaxes(0, 1) / scene.scale).astype(np.float32)
    centre, radius = scene.centre.astype(np.float32), scene.radius.astype(np.float32)
    rays = _rays(scene, size)
    camera = scene.camera.astype(np.float32)[:, :, None]
    depth_m, surface, normal = _background(scene, rays)

    # The solid, for the rays that pass near it.
    solid = cast(scene.solid, np.float32)
    local_origin = _apply(world_to_solid, camera - centre[:, :, None])
    local_rays, every = _apply(world_to_solid, rays), np.ones(surface.shape, bool)
    hit, distance, hit_normal = _cast(solid, radius, local_origin, local_rays, every)
    nearer = distance < depth_m.flat[hit]
    hit = hit[nearer]
    sample, pixel = np.divmod(hit, pixels)
    depth_m[sample, pixel] = distance[nearer]
    surface[sample, pixel] = _SOLID
    rotation = scene.rotation.astype(np.float32)[:, :, sample]
    for axis in range(3):
        normal[axis, sample, pixel] = dot(rotation[axis], hit_normal[:, nearer])
    point = camera + depth_m * rays

    # Its shadow on floor and wall.
    light = scene.light.astype(np.float32)[:, :, None]
    local_point = _apply(world_to_solid, point - centre[:, :, None])
    to_light = np.broadcast_to(_apply(world_to_solid, light), rays.shape)
    shaded, shadow_distance, _ = _cast(solid, radius, local_point, to_light, surface != _SOLID)
    lit = np.ones(count * pixels, np.float32)
    lit[shaded[np.isfinite(shadow_distance)]] = 0

    position = np.where(
        surface == _SOLID, local_point, point / scene.scale.astype(np.float32)[:, None]
    )
    albedo = _albedo(draws, scene, surface, position)
    rgb = _expose(draws, albedo, normal, light, lit.reshape(count, pixels), normals[:3], size)
    slant = np.abs(dot(normal, rays)) / np.sqrt(dot(rays, rays))
    depth_mm = _measure(draws, depth_m, slant, normals[3], uniforms, size)
    return rgb, depth_mm


def _scene(name: str, draws: _Draws) -> _Scene:
    """Draw solids, cameras, walls and lights; every camera frames its solid in the same way."""
    solid = SHAPES[name](draws(0, 1, 4))
    poses = np.stack(_POSES.get(name, (_UPRIGHT,)), axis=-1)
    pose = poses[:, :, (draws(0, poses.shape[2] - 1e-9)).astype(int)]
    tilt_about = draws(0, 2 * np.pi)
    tilt = _mul(
        _turn(2, tilt_about), _mul(_turn(0, draws(0, 1) ** 2 * 0.35), _turn(2, -tilt_about))
    )
    rotation = _mul(_turn(2, draws(0, 2 * np.pi)), _mul(tilt, pose))

    radius = np.sqrt((solid.points**2).sum(axis=1).max(axis=0)) * 1.01
    distance_m = draws(0.8, 2.0)
    scale = distance_m * draws(0.14, 0.24) / radius
    points = (rotation[None] * solid.points[:, None]).sum(axis=2) * scale
    centre = np.zeros_like(points[0])
    centre[2] = -points[:, 2].min(axis=0)
    points = points + centre

    elevation, roll = draws(0.15, 0.75), draws(-0.12, 0.12)
    none = np.zeros_like(elevation)
    forward = np.stack([none, np.cos(elevation), -np.sin(elevation)])
    down = np.stack([none, -np.sin(elevation), -np.cos(elevation)])
    right = np.stack([np.ones_like(none), none, none])
    across = np.cos(roll) * right + np.sin(roll) * down
    along = np.cos(roll) * down - np.sin(roll) * right
    axes = np.stack([across, along, forward], axis=1)
    camera = centre - distance_m * forward
    seen = (axes[None] * (points - camera)[:, :, None]).sum(axis=1)
    flat = seen[:, :2] / seen[:, 2:]
    low, high = flat.min(axis=0), flat.max(axis=0)
    extent = np.sqrt(((high - low) ** 2).mean(axis=0))
    focal = np.minimum(draws(0.52, 0.68) / extent, 0.8 / (high - low).max(axis=0))
    shift = 0.5 + draws(-0.1, 0.1, 2) - focal * (low + high) / 2

    azimuth, height = draws(-2.0, 2.0), draws(0.5, 1.2)
    light = np.stack(
        [np.sin(azimuth) * np.cos(height), -np.cos(azimuth) * np.cos(height), np.sin(height)]
    )
    wall_m = scale * radius * 1.2 + draws(0.05, 1.0)
    return _Scene(
        *(solid, rotation, centre, scale, radius, camera, axes, focal, shift),
        *(draws(-0.45, 0.45), wall_m, light),
    )


def _apply(matrix: Floats, vector: Floats) -> Floats:
    """`(3, 3, B)` times `(3, B, P)`."""
    return np.stack([dot(row[:, :, None], vector) for row in matrix])


def _rays(scene: _Scene, size: int) -> Floats:
    """Directions `(3, B, P)`, one metre along the optical axis: a ray's parameter is its depth."""
    grid = (np.arange(size) + 0.5) / size
    across = (grid - scene.shift[0][:, None]) / scene.focal[:, None]
    along = (grid - scene.shift[1][:, None]) / scene.focal[:, None]
    axes = scene.axes[..., None, None].astype(np.float32)
    across, along = across[:, None, :].astype(np.float32), along[:, :, None].astype(np.float32)
    rays = axes[:, 0] * across + axes[:, 1] * along + axes[:, 2]
    return np.ascontiguousarray(rays.reshape(3, len(scene.scale), size * size))


def _background(scene: _Scene, rays: Floats) -> tuple[Floats, NDArray[np.int8], Floats]:
    """Depth in metres, surface and normal `(3, B, P)` of the floor (z = 0) and of the wall."""
    outward = np.stack([np.sin(scene.wall_turn), np.cos(scene.wall_turn), 0 * scene.wall_turn])
    gap = (scene.wall_m - dot(outward, scene.camera)).astype(np.float32)[:, None]
    outward = outward.astype(np.float32)[:, :, None]
    floor = -scene.camera[2].astype(np.float32)[:, None] / np.minimum(rays[2], -1e-4)
    wall = gap / np.maximum(dot(outward, rays), 1e-2)
    at_wall = wall < floor
    up = np.array([0, 0, 1], np.float32)[:, None, None]
    return np.minimum(wall, floor), at_wall.astype(np.int8), np.where(at_wall, -outward, up)


def _cast(
    solid: Solid, radius: Floats, origin: Floats, direction: Floats, among: NDArray[np.bool_]
) -> tuple[Ints, Floats, Floats]:
    """Cast those rays `(3, B, P)` that `among` marks and that pass near their solid.

    Returns:
        Their flat indices `(M,)`, distances `(M,)` (infinite on a miss) and normals `(3, M)`.
    """
    ahead = np.minimum(dot(origin, direction), 0)
    gap = dot(origin, origin) - ahead * ahead / dot(direction, direction)
    near = np.flatnonzero(among & (gap <= (radius * radius)[:, None]))
    owner = near // direction.shape[2]
    shape = direction.shape
    origin = np.broadcast_to(origin, shape).reshape(3, -1)[:, near]
    direction = direction.reshape(3, -1)[:, near]
    return near, *first_hit(solid, owner, origin, direction)


def _albedo(draws: _Draws, scene: _Scene, surface: NDArray[np.int8], position: Floats) -> Floats:
    """Colours `(3, B, P)` in 0..1 of plain, checked, striped or mottled surfaces."""
    count = surface.shape[0]
    # Hues apart from one another, so that the solid mostly stands out.
    hue = draws(0, 1) + np.concatenate([draws(0.2, 0.8, 2), np.zeros((1, count))])
    colours = _colour(hue, draws(0.1, 0.75, 3), draws(0.35, 1.0, 3))
    others = _colour(hue + draws(-0.1, 0.1, 3), draws(0.1, 0.75, 3), draws(0.25, 1.0, 3))
    kind = (draws(0, 4 - 1e-9, 3)).astype(int)
    kind_weights = np.stack([kind == 1, kind == 2, kind == 3]) * draws(0.2, 0.7, 3)
    turns = draws(0, np.pi, 3)
    turns[_WALL] = -scene.wall_turn
    tips = draws(0, np.pi, 3)
    tips[_FLOOR] = 0
    tips[_WALL] = np.where(tips[_WALL] < np.pi / 2, 0, np.pi / 2)
    frequency = 1 / draws(0.6, 1.8, 3)
    phases = draws(0, 1, 3, 3)
    phases[2, :2] = 0.25
    frames = np.stack([_mul(_turn(1, tips[i]), _turn(2, turns[i])) for i in range(3)], axis=2)
    fields = np.concatenate(
        [(frames * frequency).reshape(9, 3, count), phases, kind_weights, colours, others - colours]
    )
    # One column a (surface, sample), picked for every pixel.
    columns = surface.astype(np.intp) * count + np.arange(count)[:, None]
    picked = fields.astype(np.float32).reshape(len(fields), -1).take(columns, axis=1, mode="clip")
    waves = [_wave(dot(picked[3 * i : 3 * i + 3], position) + picked[9 + i]) for i in range(3)]
    edges = [np.clip(3 * wave, -1, 1) for wave in waves]
    mottle = 0.6 * waves[0] * waves[1] + 0.4 * _wave(waves[2] + 0.4 * waves[0])
    mix = picked[12] * edges[0] * edges[1] * edges[2] + picked[13] * edges[0] + picked[14] * mottle
    albedo: Floats = picked[15:18] + (0.5 + 0.5 * mix) * picked[18:21]
    return albedo


def _wave(turns: Floats) -> Floats:
    """Nearly `sin(2 pi turns)`, from parabolas: the same bits on every processor."""
    u = 2 * (turns - np.floor(turns)) - 1
    wave: Floats = 4 * u * (np.abs(u) - 1)
    return wave


def _colour(hue: Floats, saturation: Floats, value: Floats) -> Floats:
    """HSV, each of any shape, to RGB with a leading axis of 3; hues in turns."""
    ramps = [np.clip(np.abs((hue + k) % 1 * 6 - 3) - 1, 0, 1) for k in (0, 2 / 3, 1 / 3)]
    return np.stack([value * (1 - saturation + saturation * ramp) for ramp in ramps])


def _expose(
    draws: _Draws, albedo: Floats, normal: Floats, light: Floats, lit: Floats, noise: Floats,
    size: int,
) -> NDArray[np.uint8]:  # fmt: skip
    """Light the surfaces and take the pictures `(B, size, size, 3)`, exposed automatically."""
    column = draws.column
    ambient = column(0.3, 0.5) * (0.8 + 0.2 * normal[2])
    brightness = ambient + column(0.6, 1.0) * lit * np.maximum(dot(normal, light), 0)
    picture = albedo * column(0.85, 1.15, 3) * brightness
    picture *= column(0.36, 0.56) / picture.mean(axis=(0, 2))[None, :, None]
    picture = picture.reshape(3, -1, size, size)
    blur = draws(0.05, 0.15).astype(np.float32)[:, None, None] / 2
    picture[..., 1:-1, :] += blur * (
        picture[..., 2:, :] + picture[..., :-2, :] - 2 * picture[..., 1:-1, :]
    )
    picture[..., 1:-1] += blur * (picture[..., 2:] + picture[..., :-2] - 2 * picture[..., 1:-1])
    picture += (column(0.005, 0.022) * noise).reshape(picture.shape)
    levels: NDArray[np.uint8] = (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)
    return levels.transpose(1, 2, 3, 0)


def _measure(
    draws: _Draws, depth_m: Floats, slant: Floats, noise: Floats, chance: Floats, size: int
) -> NDArray[np.uint16]:
    """What a structured-light camera reports: `(B, size, size)` in millimetres, 0 = no reading.

    It measures 1 / depth with an even noise and in even steps, so errors in depth grow with its
    square. Readings go missing at jumps in depth, at grazing incidence, singly and in round spots.
    """
    column = draws.column
    step = np.float32(0.0028)  # 1 / m
    inverse = 1 / depth_m + column(0.001, 0.0025) * noise
    measured = 1000 / (np.maximum(np.round(inverse / step), 40) * step)

    lost = chance[0] < column(0.003, 0.02)
    lost |= chance[1] * column(0.1, 0.3) > slant
    picture = depth_m.reshape(-1, size, size)
    jump = np.zeros(picture.shape, bool)
    for ahead, behind in ((np.s_[:, 1:], np.s_[:, :-1]), (np.s_[:, :, 1:], np.s_[:, :, :-1])):
        broken = np.abs(picture[ahead] - picture[behind]) > 0.06 * np.minimum(
            picture[ahead], picture[behind]
        )
        jump[ahead] |= broken
        jump[behind] |= broken
    lost |= jump.reshape(lost.shape) & (chance[1] < column(0.2, 0.7))
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size
    for _ in range(3):
        x, y, spot = draws(0, 1), draws(0, 1), draws(-0.06, 0.06)
        squared = ((grid - x[:, None]) ** 2)[:, None, :] + ((grid - y[:, None]) ** 2)[:, :, None]
        lost |= (squared < (np.maximum(spot, 0) ** 2)[:, None, None]).reshape(lost.shape)
    depth_mm = np.where(lost, 0, measured + 0.5).astype(np.uint16)
    return depth_mm.reshape(-1, size, size)
