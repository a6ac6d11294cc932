"""Labelled RGB-D pairs made on the spot: one solid on a floor before a wall, by ray casting.

Only the solid's shape tells its class. Colours, textures, light, camera, position and apparent size
are drawn from the same distributions for every class; depth has the noise of a structured-light
camera and its holes (0 = no reading). There are no files, so the archive is a number (the seed):
labels go round the classes, TI pairs last; each image is a scene (group) of its own.
"""

import functools
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sfkt_cli.data.records import Archive, Record
from sfkt_cli.data.sensor import Sensor, sensor_of_config
from sfkt_cli.data.solids import SHAPES, Floats, Solid, dot, first_hit
from sfkt_cli.settings.config import Config

TR_CLASSES = ("sphere", "box", "cylinder", "cone", "torus", "octahedron")
TI_CLASSES = tuple(name for name in SHAPES if name not in TR_CLASSES)
CLASSES = TR_CLASSES + TI_CLASSES

_FLOOR, _WALL, _SOLID = range(3)
_SCENE_DRAWS = 96


@dataclass(frozen=True)
class SyntheticLoader:
    """Renders images one by one; the two views of a pair come from the same rendering."""

    seed: int
    sensor: Sensor

    def rgb(self, record: Record) -> NDArray[np.uint8]:
        """See :class:`~sfkt_cli.data.records.Loader`."""
        return self._pair(record)[0]

    def target(self, record: Record) -> NDArray[Any]:
        """See :class:`~sfkt_cli.data.records.Loader`."""
        return self._pair(record)[1]

    def _pair(self, record: Record) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
        label, _, index = record.id.rpartition("-")
        return render(label, int(index), seed=self.seed, size=self.sensor.image_size)


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
        loader=SyntheticLoader(
            config.seed, sensor_of_config(config, modality="depth", dtype="uint16", channels=1)
        ),
        digest=hashlib.sha256(about.encode()).hexdigest(),
        usual_tr=TR_CLASSES,
        usual_ti=TI_CLASSES,
    )


def _turn(axis: int, angle: float) -> Floats:
    """A rotation matrix `(3, 3)` about a coordinate axis; the angle in radians."""
    matrix = np.eye(3)
    i, j = (axis + 1) % 3, (axis + 2) % 3
    matrix[i, i] = matrix[j, j] = np.cos(angle)
    matrix[j, i] = np.sin(angle)
    matrix[i, j] = -matrix[j, i]
    return matrix


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
    """Hands out uniforms `(U,)` in a fixed order."""

    def __init__(self, uniforms: Floats) -> None:
        self._uniforms, self._used = uniforms, 0

    def __call__(self, low: float, high: float, *shape: int) -> Any:
        """Numbers of a shape between `low` and `high`; a single one without a shape."""
        first, self._used = self._used, self._used + math.prod(shape)
        return low + (high - low) * self._uniforms[first : self._used].reshape(shape)

    def single(self, low: float, high: float, *shape: int) -> Any:
        """The same as float32."""
        return self(low, high, *shape).astype(np.float32)


class _Scene(NamedTuple):
    """Lengths in metres, z up, the solid above the origin, the wall across +y."""

    solid: Solid
    rotation: Floats  # (3, 3), from the solid's frame to the world's
    centre: Floats  # (3,)
    scale: np.float64  # metres a unit of the solid
    radius: np.float64  # of a ball around the solid, in its units
    camera: Floats  # (3,)
    rays: Floats  # (3, P), one metre along the optical axis: a ray's parameter is its depth
    wall_turn: np.float64  # radians
    wall_m: np.float64  # from the origin
    light: Floats  # (3,), unit, towards the light


@functools.lru_cache(maxsize=1)  # the two views of a pair are asked for one after the other
def render(
    name: str, index: int, *, seed: int, size: int = 48
) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    """Render a solid: a sample depends on the class `name`, `index`, `seed` and `size` alone.

    Returns:
        Colours `(size, size, 3)` and depths along the optical axis `(size, size)` in millimetres,
        0 = no reading.
    """
    pixels = size * size  # pictures are flat inside: `(P,)`, rays `(3, P)`
    # Philox takes its key as it is: no seeding pass, and no sample shares a stream.
    stream = np.random.Generator(np.random.Philox(key=[seed, index]))
    draws = _Draws(stream.random(_SCENE_DRAWS))
    normals = stream.standard_normal((4, pixels), np.float32)
    uniforms = stream.random((2, pixels), np.float32)
    scene = _scene(name, draws, size)
    rays = scene.rays

    world_to_solid = (scene.rotation.T / scene.scale).astype(np.float32)
    centre = scene.centre.astype(np.float32)[:, None]
    camera = scene.camera.astype(np.float32)[:, None]
    depth_m, surface, normal = _background(scene)

    # The solid, for the rays that pass near it.
    local_origin = _apply(world_to_solid, camera - centre)
    local_rays = _apply(world_to_solid, rays)
    hit, distance, hit_normal = _cast(scene, local_origin, local_rays, np.ones(pixels, bool))
    nearer = distance < depth_m[hit]
    hit = hit[nearer]
    depth_m[hit] = distance[nearer]
    surface[hit] = _SOLID
    normal[:, hit] = _apply(scene.rotation.astype(np.float32), hit_normal[:, nearer])
    point = camera + depth_m * rays

    # Its shadow on floor and wall.
    light = scene.light.astype(np.float32)[:, None]
    local_point = _apply(world_to_solid, point - centre)
    to_light = _apply(world_to_solid, light)
    shaded, shadow_distance, _ = _cast(scene, local_point, to_light, surface != _SOLID)
    lit = np.ones(pixels, np.float32)
    lit[shaded[np.isfinite(shadow_distance)]] = 0

    position = np.where(surface == _SOLID, local_point, point / scene.scale.astype(np.float32))
    albedo = _albedo(draws, scene.wall_turn, surface, position)
    rgb = _expose(draws, albedo, normal, light, lit, normals[:3], size)
    slant = np.abs(dot(normal, rays)) / np.sqrt(dot(rays, rays))
    depth_mm = _measure(draws, depth_m, slant, normals[3], uniforms, size)
    return rgb, depth_mm


def _scene(name: str, draws: _Draws, size: int) -> _Scene:
    """Draw solid, camera, wall and light; every camera frames its solid in the same way."""
    solid = SHAPES[name](draws(0, 1, 4))
    poses = _POSES.get(name, (_UPRIGHT,))
    pose = poses[int(draws(0, len(poses) - 1e-9))]
    tilt_about = draws(0, 2 * np.pi)
    tilt = _turn(2, tilt_about) @ _turn(0, np.square(draws(0, 1)) * 0.35) @ _turn(2, -tilt_about)
    rotation = _turn(2, draws(0, 2 * np.pi)) @ tilt @ pose

    points = np.asarray(solid.points)
    radius = np.sqrt((points**2).sum(axis=1).max()) * 1.01
    distance_m = draws(0.8, 2.0)
    scale = distance_m * draws(0.14, 0.24) / radius
    points = points @ rotation.T * scale
    centre = np.array([0, 0, -points[:, 2].min()])
    points = points + centre

    elevation, roll = draws(0.15, 0.75), draws(-0.12, 0.12)
    forward = np.array([0, np.cos(elevation), -np.sin(elevation)])
    down = np.array([0, -np.sin(elevation), -np.cos(elevation)])
    right = np.array([1, 0, 0])
    across = np.cos(roll) * right + np.sin(roll) * down
    along = np.cos(roll) * down - np.sin(roll) * right
    axes = np.stack([across, along, forward])
    camera = centre - distance_m * forward
    seen = (points - camera) @ axes.T
    flat = seen[:, :2] / seen[:, 2:]
    low, high = flat.min(axis=0), flat.max(axis=0)
    extent = np.sqrt(((high - low) ** 2).mean())
    focal = np.minimum(draws(0.52, 0.68) / extent, 0.8 / (high - low).max())
    middle = 0.5 + draws(-0.1, 0.1, 2) - focal * (low + high) / 2  # of the optical axis
    grid = (np.arange(size) + 0.5) / size
    x, y = ((grid - middle[:, None]) / focal).astype(np.float32)
    to_right, downwards, ahead = axes.astype(np.float32)[:, :, None, None]
    rays = (to_right * x + downwards * y[:, None] + ahead).reshape(3, -1)

    azimuth, height = draws(-2.0, 2.0), draws(0.5, 1.2)
    light = np.array(
        [np.sin(azimuth) * np.cos(height), -np.cos(azimuth) * np.cos(height), np.sin(height)]
    )
    wall_m = scale * radius * 1.2 + draws(0.05, 1.0)
    wall_turn = draws(-0.45, 0.45)
    return _Scene(solid, rotation, centre, scale, radius, camera, rays, wall_turn, wall_m, light)


def _apply(matrix: Floats, vectors: Floats) -> Floats:
    """`(3, 3)` times `(3, P)`; see :func:`dot`."""
    return np.stack([dot(row, vectors) for row in matrix])


def _background(scene: _Scene) -> tuple[Floats, NDArray[np.intp], Floats]:
    """Depth in metres, surface and normal `(3, P)` of the floor (z = 0) and of the wall."""
    outward = np.array([np.sin(scene.wall_turn), np.cos(scene.wall_turn), 0])
    gap = (scene.wall_m - dot(outward, scene.camera)).astype(np.float32)
    outward = outward.astype(np.float32)[:, None]
    floor = -scene.camera[2].astype(np.float32) / np.minimum(scene.rays[2], -1e-4)
    wall = gap / np.maximum(dot(outward, scene.rays), 1e-2)
    at_wall = wall < floor
    up = np.array([[0], [0], [1]], np.float32)
    return np.minimum(wall, floor), at_wall.astype(np.intp), np.where(at_wall, -outward, up)


def _cast(
    scene: _Scene, origin: Floats, direction: Floats, among: NDArray[np.bool_]
) -> tuple[NDArray[np.intp], Floats, Floats]:
    """Cast those rays that `among` `(P,)` marks and that pass near the solid, in its frame.

    `origin` and `direction` are `(3, P)`, or `(3, 1)` where they are all the same.

    Returns:
        Their indices `(M,)`, distances `(M,)` (infinite on a miss) and normals `(3, M)`.
    """
    ahead = np.minimum(dot(origin, direction), 0)
    gap = dot(origin, origin) - ahead * ahead / dot(direction, direction)
    near = np.flatnonzero(among & (gap <= np.square(scene.radius.astype(np.float32))))
    shape = (3, len(among))
    origin, direction = (np.broadcast_to(rays, shape)[:, near] for rays in (origin, direction))
    return near, *first_hit(scene.solid, origin, direction)


def _albedo(draws: _Draws, wall_turn: float, surface: NDArray[np.intp], position: Floats) -> Floats:
    """Colours `(3, P)` in 0..1 of plain, checked, striped or mottled surfaces."""
    # Hues apart from one another, so that the solid mostly stands out.
    hue = draws(0, 1) + np.append(draws(0.2, 0.8, 2), 0)
    colours = _colour(hue, draws(0.1, 0.75, 3), draws(0.35, 1.0, 3))
    others = _colour(hue + draws(-0.1, 0.1, 3), draws(0.1, 0.75, 3), draws(0.25, 1.0, 3))
    kind = draws(0, 4 - 1e-9, 3).astype(int)
    kind_weights = np.stack([kind == 1, kind == 2, kind == 3]) * draws(0.2, 0.7, 3)
    turns = draws(0, np.pi, 3)
    turns[_WALL] = -wall_turn
    tips = draws(0, np.pi, 3)
    tips[_FLOOR] = 0
    tips[_WALL] = 0 if tips[_WALL] < np.pi / 2 else np.pi / 2
    frequency = 1 / draws(0.6, 1.8, 3)
    phases = draws(0, 1, 3, 3)
    phases[2, :2] = 0.25
    frames = np.stack([_turn(1, tips[i]) @ _turn(2, turns[i]) for i in range(3)], axis=2)
    fields = np.concatenate(
        [(frames * frequency).reshape(9, 3), phases, kind_weights, colours, others - colours]
    )
    picked = fields.astype(np.float32).take(surface, axis=1)
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
    """Light the surfaces and take the picture `(size, size, 3)`, exposed automatically."""
    single = draws.single
    ambient = single(0.3, 0.5) * (0.8 + 0.2 * normal[2])
    brightness = ambient + single(0.6, 1.0) * lit * np.maximum(dot(normal, light), 0)
    picture = albedo * single(0.85, 1.15, 3, 1) * brightness
    picture *= single(0.36, 0.56) / picture.mean()
    picture = picture.reshape(3, size, size)
    blur = single(0.05, 0.15) / 2
    picture[:, 1:-1] += blur * (picture[:, 2:] + picture[:, :-2] - 2 * picture[:, 1:-1])
    picture[..., 1:-1] += blur * (picture[..., 2:] + picture[..., :-2] - 2 * picture[..., 1:-1])
    picture += (single(0.005, 0.022) * noise).reshape(picture.shape)
    levels: NDArray[np.uint8] = (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)
    return levels.transpose(1, 2, 0)


def _measure(
    draws: _Draws, depth_m: Floats, slant: Floats, noise: Floats, chance: Floats, size: int
) -> NDArray[np.uint16]:
    """What a structured-light camera reports: `(size, size)` in millimetres, 0 = no reading.

    It measures 1 / depth with an even noise and in even steps, so errors in depth grow with its
    square. Readings go missing at jumps in depth, at grazing incidence, singly and in round spots.
    """
    single = draws.single
    step = np.float32(0.0028)  # 1 / m
    inverse = 1 / depth_m + single(0.001, 0.0025) * noise
    measured = 1000 / (np.maximum(np.round(inverse / step), 40) * step)

    lost = chance[0] < single(0.003, 0.02)
    lost |= chance[1] * single(0.1, 0.3) > slant
    picture = depth_m.reshape(size, size)
    jump = np.zeros(picture.shape, bool)
    for ahead, behind in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        broken = np.abs(picture[ahead] - picture[behind]) > 0.06 * np.minimum(
            picture[ahead], picture[behind]
        )
        jump[ahead] |= broken
        jump[behind] |= broken
    lost |= jump.ravel() & (chance[1] < single(0.2, 0.7))
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size
    for _ in range(3):
        x, y, spot = draws(0, 1), draws(0, 1), max(draws(-0.06, 0.06), 0)
        lost |= (((grid - x) ** 2 + (grid - y)[:, None] ** 2) < spot * spot).ravel()
    return np.where(lost, 0, measured + 0.5).astype(np.uint16).reshape(size, size)
