"""Simple solids in closed form, and where rays first meet them.

A solid is a union of parts. A part is either a torus or a convex piece: the points inside one
quadric and on the inner side of some planes, less what an optional second quadric (the bore) takes
out. Every number may differ from sample to sample, so parameters carry a trailing axis B (samples),
rays a trailing axis M (rays of all samples, with `owner` naming each ray's sample). The upright
axis is z.
"""

from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]

_TINY = 1e-6


class Part(NamedTuple):
    """A convex piece: `quadric <= 0`, every `n . p <= w`, and not `bore < 0`."""

    planes: Floats  # `(F, 4, B)`, rows `(n_x, n_y, n_z, w)`
    quadric: Floats | None = None  # `(5, B)`, the factors of `x^2, y^2, z^2, z, 1`, or None
    bore: Floats | None = None  # like `quadric`: the region taken out


class Torus(NamedTuple):
    """A ring around z: the radius to the tube's middle and the tube's own radius, each `(B,)`."""

    major: Floats
    minor: Floats


class Solid(NamedTuple):
    """A union of parts, and points `(K, 3, B)` whose convex hull is (nearly) that of the solid."""

    parts: tuple[Part | Torus, ...]
    points: Floats


def cast(solid: Solid, kind: type[np.floating[Any]]) -> Solid:
    """The same solid with parts in another precision."""

    def converted(part: Any) -> Any:
        return type(part)(*(None if rows is None else rows.astype(kind) for rows in part))

    return solid._replace(parts=tuple(converted(part) for part in solid.parts))


def dot(a: Floats, b: Floats) -> Floats:
    """Inner product over the leading axis of 3; unlike a BLAS call, its rounding is fixed."""
    product: Floats = a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
    return product


def first_hit(
    solid: Solid, owner: Ints, origin: Floats, direction: Floats
) -> tuple[Floats, Floats]:
    """First meeting of each ray with its sample's solid.

    Args:
        solid: Parameters of B samples.
        owner: `(M,)`, the sample of each ray, below B.
        origin: `(3, M)`, in the solid's frame, outside the solid.
        direction: `(3, M)`, any length but 0.

    Returns:
        `(M,)` ray parameters t > 0, infinite where the ray misses, and `(3, M)` outward unit
        normals (any value on a miss).
    """
    # Counting t from the point nearest the centre keeps float32 precise however far the camera is.
    inverse_length = 1 / np.sqrt(dot(direction, direction))
    unit = direction * inverse_length
    start = dot(origin, unit)
    foot = origin - start * unit
    best, normal = np.full_like(start, np.inf), np.zeros_like(foot)
    for part in solid.parts:
        hit: Callable[..., tuple[Floats, Floats]] = (
            _torus_hit if isinstance(part, Torus) else _convex_hit
        )
        distance, part_normal = hit(part, owner, foot, unit, start)
        nearer = distance < best
        best = np.where(nearer, distance, best)
        normal = np.where(nearer, part_normal, normal)
    normal = normal / np.sqrt(np.maximum(dot(normal, normal), _TINY))
    return (best - start) * inverse_length, normal


def _convex_hit(
    part: Part, owner: Ints, foot: Floats, unit: Floats, start: Floats
) -> tuple[Floats, Floats]:
    """Clip the ray to the piece: it enters at the last entrance, if before the first exit."""
    if part.quadric is None:
        near, far = np.full_like(start, -np.inf), np.full_like(start, np.inf)
    else:
        near, far = _inside(part.quadric[:, owner], foot, unit)
    face = np.full(len(start), -1)
    for number, plane in enumerate(part.planes):
        plane = plane.take(owner, axis=1)
        slope = dot(plane[:3], unit)
        slope = np.where(np.abs(slope) < _TINY, np.float32(_TINY), slope)
        at = (plane[3] - dot(plane[:3], foot)) / slope
        enters = slope < 0
        later = enters & (at > near)
        near = np.where(later, at, near)
        face[later] = number
        far = np.where(enters, far, np.minimum(far, at))
    near = np.maximum(near, start)
    in_bore = np.zeros(len(start), bool)
    if part.bore is not None:
        bore_near, bore_far = _inside(part.bore[:, owner], foot, unit)
        in_bore = (bore_near <= near) & (near < bore_far)
        near = np.where(in_bore, bore_far, near)
    missed = ~(near < far)
    point = foot + np.where(missed, 0, near) * unit
    normal = np.zeros_like(foot)
    if len(part.planes):
        normal = np.stack([part.planes[face, axis, owner] for axis in range(3)])
    if part.quadric is not None:
        normal = np.where(face < 0, _gradient(part.quadric[:, owner], point), normal)
    if part.bore is not None:
        normal = np.where(in_bore, -_gradient(part.bore[:, owner], point), normal)
    return np.where(missed, np.inf, near), normal


def _inside(quadric: Floats, foot: Floats, unit: Floats) -> tuple[Floats, Floats]:
    """Where each ray enters and leaves a quadric; of a double cone, its lower nappe."""
    a = dot(quadric[:3], unit * unit)
    a = np.where(np.abs(a) < _TINY, np.float32(_TINY), a)
    b = dot(quadric[:3], foot * unit) + 0.5 * quadric[3] * unit[2]
    c = dot(quadric[:3], foot * foot) + quadric[3] * foot[2] + quadric[4]
    discriminant = b * b - a * c
    root = np.sqrt(np.maximum(discriminant, 0))
    # The stable pair: no difference of two close numbers.
    q = -(b + np.copysign(root, b))
    one, two = q / a, c / np.where(q == 0, np.float32(_TINY), q)
    first, second = np.minimum(one, two), np.maximum(one, two)
    steep, down = a < 0, unit[2] < 0
    near = np.where(steep, np.where(down, second, -np.inf), first)
    far = np.where(steep, np.where(down, np.inf, first), second)
    return np.where((discriminant < 0) & ~steep, np.inf, near), far


def _gradient(quadric: Floats, point: Floats) -> Floats:
    gradient = 2 * quadric[:3] * point
    gradient[2] += quadric[3]
    return gradient


def _torus_hit(
    torus: Torus, owner: Ints, foot: Floats, unit: Floats, start: Floats
) -> tuple[Floats, Floats]:
    """Ferrari's solution in float64.

    With t counted from the foot point the quartic, `t^4 + p t^2 + q t + s`, has no cubic term.
    """
    kind = start.dtype
    foot, unit = foot.astype(np.float64), unit.astype(np.float64)
    major, minor = torus.major[owner].astype(np.float64), torus.minor[owner].astype(np.float64)
    k = dot(foot, foot) + major**2 - minor**2
    p = 2 * k - 4 * major**2 * (unit[0] ** 2 + unit[1] ** 2)
    q = -8 * major**2 * (foot[0] * unit[0] + foot[1] * unit[1])
    q = np.where(np.abs(q) < 1e-9, 1e-9, q)  # q = 0 would need a case of its own
    s = k * k - 4 * major**2 * (foot[0] ** 2 + foot[1] ** 2)
    root = np.sqrt(2 * np.maximum(_largest_cubic_root(p, p * p / 4 - s, -q * q / 8), 1e-30))
    best = np.full(len(p), np.inf)
    for sign in (1.0, -1.0):
        inner = -root * root / 4 - p / 2 - sign * q / (2 * root)
        half = np.sqrt(np.maximum(inner, 0))
        for side in (-1.0, 1.0):
            at = sign * root / 2 + side * half
            for _ in range(2):
                slope = 4 * at**3 + 2 * p * at + q
                slope = np.where(np.abs(slope) < _TINY, np.inf, slope)
                at = at - np.clip((((at * at + p) * at + q) * at + s) / slope, -0.02, 0.02)
            residual = np.abs(((at * at + p) * at + q) * at + s)
            valid = (inner >= 0) & (residual < 1e-4) & (at > start) & (at < best)
            best = np.where(valid, at, best)
    point = foot + np.where(np.isfinite(best), best, 0) * unit
    around = np.maximum(np.hypot(point[0], point[1]), 1e-9)
    normal = point * np.stack([1 - major / around, 1 - major / around, np.ones_like(around)])
    return best.astype(kind), normal.astype(kind)


def _largest_cubic_root(a: Floats, b: Floats, c: Floats) -> Floats:
    """Largest real root of `m^3 + a m^2 + b m + c`: Cardano's or, of three, by the cosine.

    Newton's steps afterwards keep small roots precise.
    """
    shift = a / 3
    p, q = b - a * shift, c + shift * (2 * shift * shift - b)
    discriminant = (q / 2) ** 2 + (p / 3) ** 3
    real = np.cbrt(-q / 2 + np.copysign(np.sqrt(np.maximum(discriminant, 0)), -q))
    single = real - p / (3 * np.where(real == 0, 1, real))
    radius = np.sqrt(np.maximum(-p / 3, 1e-18))
    triple = 2 * radius * np.cos(np.arccos(np.clip(-q / (2 * radius**3), -1, 1)) / 3)
    largest: Floats = np.where(discriminant > 0, single, triple) - shift
    for _ in range(3):
        slope = (3 * largest + 2 * a) * largest + b
        step = (((largest + a) * largest + b) * largest + c) / np.where(slope > 0, slope, np.inf)
        largest = largest - step
    return largest


# --- the shapes: functions of uniforms (4, B), each solid about 2 units wide and centred near 0 ---


def _rows(like: Floats, *rows: tuple[float | Floats, ...]) -> Floats:
    """Numbers and `(B,)` arrays to `(rows, columns, B)`; `like` gives B."""
    zeros = np.zeros_like(like)
    return np.array([[value + zeros for value in row] for row in rows])


def _quadric(like: Floats, *factors: float | Floats) -> Floats:
    return np.array([factor + np.zeros_like(like) for factor in factors])


def _ring(radius: Floats, z: float | Floats) -> Floats:
    turn = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    return _rows(radius, *((np.cos(a) * radius, np.sin(a) * radius, z) for a in turn))


def _ball(radius: Floats, z: float | Floats = 0.0, squeeze: float | Floats = 1.0) -> Floats:
    """Points all over an ellipsoid around the axis, by circles of latitude."""
    latitudes = np.linspace(-np.pi / 2, np.pi / 2, 13)
    rings = [_ring(radius * np.cos(a), z + squeeze * radius * np.sin(a)) for a in latitudes]
    return np.concatenate(rings)


def _caps(like: Floats, low: float | Floats, high: float | Floats) -> Floats:
    return _rows(like, (0, 0, -1, -low), (0, 0, 1, high))


def _cuboid(
    low: tuple[float | Floats, ...], high: tuple[float | Floats, ...], like: Floats
) -> Solid:
    axes = np.eye(3)
    rows = [(*axes[i], high[i]) for i in range(3)] + [(*-axes[i], -low[i]) for i in range(3)]
    corners = product(*zip(low, high, strict=True))
    return Solid((Part(_rows(like, *rows)),), _rows(like, *corners))


def _spheroid(radius: Floats, z: float | Floats = 0.0, squeeze: float | Floats = 1.0) -> Solid:
    """A ball around a point of the axis; `squeeze` times as high as wide, for those around 0."""
    quadric = _quadric(radius, 1, 1, squeeze**-2, -2 * z, z * z - radius * radius)
    return Solid((Part(_rows(radius), quadric),), _ball(radius, z, squeeze))


def _column(
    radius: Floats, low: float | Floats, high: float | Floats, bore: Floats | None = None
) -> Solid:
    """A cylinder around the axis."""
    part = Part(_caps(radius, low, high), _quadric(radius, 1, 1, 0, 0, -radius * radius), bore)
    return Solid((part,), np.concatenate([_ring(radius, low), _ring(radius, high)]))


def _union(*solids: Solid) -> Solid:
    parts = tuple(part for solid in solids for part in solid.parts)
    return Solid(parts, np.concatenate([solid.points for solid in solids]))


def sphere(u: Floats) -> Solid:
    """A ball of radius 1."""
    return _spheroid(np.ones_like(u[0]))


def box(u: Floats) -> Solid:
    """A cuboid; each half edge 0.62..1."""
    x, y, z = 0.62 + 0.38 * u[:3]
    return _cuboid((-x, -y, -z), (x, y, z), x)


def cylinder(u: Floats) -> Solid:
    """Radius 1, half height 1.2..1.8."""
    h = 1.2 + 0.6 * u[0]
    return _column(np.ones_like(h), -h, h)


def _cone(radius: Floats, low: Floats, high: Floats, apex: Floats) -> Solid:
    """A cone with its point at `apex`, cut at `high`; `radius` is that at `low`."""
    k = (radius / (apex - low)) ** 2
    part = Part(_caps(k, low, high), _quadric(k, 1, 1, -k, 2 * k * apex, -k * apex * apex))
    return Solid(
        (part,), np.concatenate([_ring(radius, low), _ring(np.sqrt(k) * (apex - high), high)])
    )


def cone(u: Floats) -> Solid:
    """Base radius 1, half height 0.9..1.3."""
    h = 0.9 + 0.4 * u[0]
    return _cone(np.ones_like(h), -h, h, h)


def torus(u: Floats) -> Solid:
    """A ring of radius 1 with a tube of radius 0.26..0.44."""
    minor = 0.26 + 0.18 * u[0]
    rings = [_ring(1 + minor * np.cos(a), minor * np.sin(a)) for a in np.linspace(-1.6, 1.6, 7)]
    return Solid((Torus(np.ones_like(minor), minor),), np.concatenate(rings))


def octahedron(u: Floats) -> Solid:
    """Regular but for its height."""
    h = 1.1 + 0.3 * u[0]
    tips = [(-1, 0, 0), (1, 0, 0), (0, -1, 0), (0, 1, 0), (0, 0, -h), (0, 0, h)]
    planes = _rows(h, *((x, y, z / h, 1) for x, y, z in product((-1, 1), repeat=3)))
    return Solid((Part(planes),), _rows(h, *tips))


def pyramid(u: Floats) -> Solid:
    """On a square base."""
    h = 0.7 + 0.5 * u[0]
    k = 1 / (2 * h)
    sides = [(1, 0, k, 0.5), (-1, 0, k, 0.5), (0, 1, k, 0.5), (0, -1, k, 0.5)]
    corners = [(x, y, -h) for x in (-1, 1) for y in (-1, 1)]
    return Solid((Part(_rows(h, *sides, (0, 0, -1, h))),), _rows(h, *corners, (0, 0, h)))


def capsule(u: Floats) -> Solid:
    """A cylinder with round ends."""
    h, r = 0.6 + 0.6 * u[0], np.full_like(u[0], 0.8)
    return _union(_column(r, -h, h), _spheroid(r, -h), _spheroid(r, h))


def prism(u: Floats) -> Solid:
    """A hexagonal prism."""
    h, turn = 0.4 + 0.9 * u[0], np.arange(6) * np.pi / 3
    sides = _rows(h, *((np.cos(a), np.sin(a), 0, np.sqrt(0.75)) for a in turn))
    corners = [(np.cos(a), np.sin(a), z) for a in turn + np.pi / 6 for z in (-h, h)]
    return Solid((Part(np.concatenate([sides, _caps(h, -h, h)])),), _rows(h, *corners))


def wedge(u: Floats) -> Solid:
    """A ramp."""
    h, y = 0.55 + 0.4 * u[0], 0.5 + 0.4 * u[1]
    rows = [(-1, 0, 0, 1), (0, 1, 0, y), (0, -1, 0, y), (0, 0, -1, h), (1, 0, 1 / h, 0)]
    corners = [(x, side, z) for x, z in ((-1, -h), (1, -h), (-1, h)) for side in (-y, y)]
    return Solid((Part(_rows(h, *rows)),), _rows(h, *corners))


def dome(u: Floats) -> Solid:
    """A cut ball, about half of one."""
    one, cut = np.ones_like(u[0]), 0.3 * u[0] - 0.2
    ball = _ball(one)
    points = np.stack([ball[:, 0], ball[:, 1], np.maximum(ball[:, 2], cut)], axis=1)
    return Solid((Part(_rows(one, (0, 0, -1, -cut)), _quadric(one, 1, 1, 1, 0, -1)),), points)


def cross(u: Floats) -> Solid:
    """Two crossing bars."""
    a, b = 0.25 + 0.15 * u[0], 0.25 + 0.2 * u[1]
    one = np.ones_like(a)
    lying = _cuboid((-one, -b, -a), (one, b, a), a)
    return _union(lying, _cuboid((-a, -b, -one), (a, b, one), a))


def frustum(u: Floats) -> Solid:
    """A cone without its top."""
    h, top = 0.6 + 0.5 * u[0], 0.35 + 0.3 * u[1]
    return _cone(np.ones_like(h), -h, h, h * (1 + top) / (1 - top))


def tube(u: Floats) -> Solid:
    """A cylinder with a bore."""
    h, r = 0.35 + 0.7 * u[0], 0.55 + 0.25 * u[1]
    return _column(np.ones_like(h), -h, h, bore=_quadric(h, 1, 1, 0, 0, -r * r))


def ellipsoid(u: Floats) -> Solid:
    """Flat or long, round about the axis."""
    squeeze = np.where(u[1] < 0.5, 0.45 + 0.2 * u[0], 1.5 + 0.4 * u[0])
    return _spheroid(np.ones_like(squeeze), squeeze=squeeze)


def tetrahedron(u: Floats) -> Solid:
    """Four equal faces."""
    corners = [(1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1)]
    planes = _rows(u[0], *((-x, -y, -z, 1) for x, y, z in corners))
    return Solid((Part(planes),), _rows(u[0], *corners))


def stairs(u: Floats) -> Solid:
    """Three steps."""
    y, h = 0.5 + 0.4 * u[0], 0.5 + 0.25 * u[1]
    thirds = (-1.0, -1 / 3, 1 / 3, 1.0)
    steps = [
        _cuboid((-1, -y, -h), (thirds[3 - i], y, -h + 2 * h * (i + 1) / 3), y) for i in range(3)
    ]
    return _union(*steps)


def mushroom(u: Floats) -> Solid:
    """Half a ball on a stem."""
    stem = _column(0.3 + 0.2 * u[0], -0.7 - 0.5 * u[1], 0.1)
    return _union(dome(np.full_like(u, 2 / 3)), stem)


SHAPES: dict[str, Callable[[Floats], Solid]] = {
    shape.__name__: shape
    for shape in (
        sphere, box, cylinder, cone, torus, octahedron, pyramid, capsule, prism, wedge, dome,
        cross, frustum, tube, ellipsoid, tetrahedron, stairs, mushroom,
    )
}  # fmt: skip
