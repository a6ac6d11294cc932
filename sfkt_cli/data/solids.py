"""Simple solids in closed form, and where rays first meet them.

A solid is a union of parts. A part is either a torus or a convex piece: the points inside one
quadric and on the inner side of some planes, less what an optional second quadric (the bore) takes
out. Rays carry a trailing axis M. The upright axis is z.
"""

from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.floating[Any]]

_TINY = 1e-6


class Part(NamedTuple):
    """A convex piece: `quadric <= 0`, every `n . p <= w`, and not `bore < 0`."""

    planes: ArrayLike = ()  # `(F, 4)`, rows `(n_x, n_y, n_z, w)`
    quadric: ArrayLike | None = None  # `(5,)`, the factors of `x^2, y^2, z^2, z, 1`, or None
    bore: ArrayLike | None = None  # like `quadric`: the region taken out


class Torus(NamedTuple):
    """A ring around z, of radius 1 to the tube's middle."""

    minor: float  # the tube's own radius


class Solid(NamedTuple):
    """A union of parts, and points `(K, 3)` whose convex hull is (nearly) that of the solid."""

    parts: tuple[Part | Torus, ...]
    points: ArrayLike


def dot(a: Floats, b: Floats) -> Floats:
    """Inner product over the leading axis of 3; unlike a BLAS call, its rounding is fixed."""
    product: Floats = a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
    return product


def first_hit(solid: Solid, origin: Floats, direction: Floats) -> tuple[Floats, Floats]:
    """First meeting of each ray with a solid, in the precision of the rays.

    Args:
        solid: The solid.
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
        if isinstance(part, Torus):
            distance, part_normal = _torus_hit(part, foot, unit, start)
        else:
            distance, part_normal = _convex_hit(part, foot, unit, start)
        nearer = distance < best
        best = np.where(nearer, distance, best)
        normal = np.where(nearer, part_normal, normal)
    normal = normal / np.sqrt(np.maximum(dot(normal, normal), _TINY))
    return (best - start) * inverse_length, normal


def _convex_hit(part: Part, foot: Floats, unit: Floats, start: Floats) -> tuple[Floats, Floats]:
    """Clip the ray to the piece: it enters at the last entrance, if before the first exit."""
    planes = np.array(part.planes, start.dtype)
    quadric, bore = (
        None if factors is None else np.array(factors, start.dtype)
        for factors in (part.quadric, part.bore)
    )
    near, far = np.full_like(start, -np.inf), np.full_like(start, np.inf)
    if quadric is not None:
        near, far = _inside(quadric, foot, unit)
    face = np.full(len(start), -1)
    for number, plane in enumerate(planes):
        slope = dot(plane, unit)
        slope = np.where(np.abs(slope) < _TINY, np.float32(_TINY), slope)
        at = (plane[3] - dot(plane, foot)) / slope
        enters = slope < 0
        later = enters & (at > near)
        near = np.where(later, at, near)
        face[later] = number
        far = np.where(enters, far, np.minimum(far, at))
    near = np.maximum(near, start)
    in_bore = np.zeros(len(start), bool)
    if bore is not None:
        bore_near, bore_far = _inside(bore, foot, unit)
        in_bore = (bore_near <= near) & (near < bore_far)
        near = np.where(in_bore, bore_far, near)
    missed = ~(near < far)
    point = foot + np.where(missed, 0, near) * unit
    normal = planes[face, :3].T if len(planes) else np.zeros_like(foot)
    if quadric is not None:
        normal = np.where(face < 0, _gradient(quadric, point), normal)
    if bore is not None:
        normal = np.where(in_bore, -_gradient(bore, point), normal)
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
    gradient = 2 * quadric[:3, None] * point
    gradient[2] += quadric[3]
    return gradient


def _torus_hit(torus: Torus, foot: Floats, unit: Floats, start: Floats) -> tuple[Floats, Floats]:
    """Ferrari's solution in float64.

    With t counted from the foot point the quartic, `t^4 + p t^2 + q t + s`, has no cubic term.
    """
    kind = start.dtype
    foot, unit = foot.astype(np.float64), unit.astype(np.float64)
    minor = float(kind.type(torus.minor))
    k = dot(foot, foot) + 1 - minor * minor
    p = 2 * k - 4 * (unit[0] ** 2 + unit[1] ** 2)
    q = -8 * (foot[0] * unit[0] + foot[1] * unit[1])
    q = np.where(np.abs(q) < 1e-9, 1e-9, q)  # q = 0 would need a case of its own
    s = k * k - 4 * (foot[0] ** 2 + foot[1] ** 2)
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
    normal = point * np.stack([1 - 1 / around, 1 - 1 / around, np.ones_like(around)])
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


# --- the shapes: functions of four uniforms, each about 2 units wide and centred near 0 ---


def _ring(radius: float, z: float) -> Floats:
    turn = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    return np.stack([np.cos(turn) * radius, np.sin(turn) * radius, np.full(24, z)], axis=1)


def _ball(radius: float, z: float = 0.0, squeeze: float = 1.0) -> Floats:
    """Points all over an ellipsoid around the axis, by circles of latitude."""
    latitudes = np.linspace(-np.pi / 2, np.pi / 2, 13)
    rings = [_ring(radius * np.cos(a), z + squeeze * radius * np.sin(a)) for a in latitudes]
    return np.concatenate(rings)


def _caps(low: float, high: float) -> list[tuple[float, ...]]:
    return [(0, 0, -1, -low), (0, 0, 1, high)]


def _cuboid(low: tuple[float, ...], high: tuple[float, ...]) -> Solid:
    axes = np.eye(3)
    planes = np.concatenate([np.c_[axes, high], np.c_[-axes, np.negative(low)]])
    return Solid((Part(planes),), list(product(*zip(low, high, strict=True))))


def _spheroid(radius: float, z: float = 0.0, squeeze: float = 1.0) -> Solid:
    """A ball around a point of the axis; `squeeze` times as high as wide, for those around 0."""
    quadric = (1, 1, squeeze**-2, -2 * z, z * z - radius * radius)
    return Solid((Part(quadric=quadric),), _ball(radius, z, squeeze))


def _column(radius: float, low: float, high: float, bore: ArrayLike | None = None) -> Solid:
    """A cylinder around the axis."""
    part = Part(_caps(low, high), (1, 1, 0, 0, -radius * radius), bore)
    return Solid((part,), np.concatenate([_ring(radius, low), _ring(radius, high)]))


def _union(*solids: Solid) -> Solid:
    parts = tuple(part for solid in solids for part in solid.parts)
    return Solid(parts, np.concatenate([solid.points for solid in solids]))


def sphere(u: Floats) -> Solid:
    """A ball of radius 1."""
    del u
    return _spheroid(1)


def box(u: Floats) -> Solid:
    """A cuboid; each half edge 0.62..1."""
    x, y, z = 0.62 + 0.38 * u[:3]
    return _cuboid((-x, -y, -z), (x, y, z))


def cylinder(u: Floats) -> Solid:
    """Radius 1, half height 1.2..1.8."""
    h = 1.2 + 0.6 * u[0]
    return _column(1, -h, h)


def _cone(low: float, high: float, apex: float) -> Solid:
    """A cone with its point at `apex`, cut at `high`, and of radius 1 at `low`."""
    slope = 1 / (apex - low)
    k = slope * slope
    part = Part(_caps(low, high), (1, 1, -k, 2 * k * apex, -k * apex * apex))
    return Solid((part,), np.concatenate([_ring(1, low), _ring(np.sqrt(k) * (apex - high), high)]))


def cone(u: Floats) -> Solid:
    """Base radius 1, half height 0.9..1.3."""
    h = 0.9 + 0.4 * u[0]
    return _cone(-h, h, h)


def torus(u: Floats) -> Solid:
    """A ring of radius 1 with a tube of radius 0.26..0.44."""
    minor = 0.26 + 0.18 * u[0]
    rings = [_ring(1 + minor * np.cos(a), minor * np.sin(a)) for a in np.linspace(-1.6, 1.6, 7)]
    return Solid((Torus(minor),), np.concatenate(rings))


def octahedron(u: Floats) -> Solid:
    """Regular but for its height."""
    h = 1.1 + 0.3 * u[0]
    tips = [(-1, 0, 0), (1, 0, 0), (0, -1, 0), (0, 1, 0), (0, 0, -h), (0, 0, h)]
    planes = [(x, y, z / h, 1) for x, y, z in product((-1, 1), repeat=3)]
    return Solid((Part(planes),), tips)


def pyramid(u: Floats) -> Solid:
    """On a square base."""
    h = 0.7 + 0.5 * u[0]
    k = 1 / (2 * h)
    sides = [(1, 0, k, 0.5), (-1, 0, k, 0.5), (0, 1, k, 0.5), (0, -1, k, 0.5)]
    corners = [(x, y, -h) for x in (-1, 1) for y in (-1, 1)]
    return Solid((Part([*sides, (0, 0, -1, h)]),), [*corners, (0, 0, h)])


def capsule(u: Floats) -> Solid:
    """A cylinder with round ends."""
    h, r = 0.6 + 0.6 * u[0], 0.8
    return _union(_column(r, -h, h), _spheroid(r, -h), _spheroid(r, h))


def prism(u: Floats) -> Solid:
    """A hexagonal prism."""
    h, turn = 0.4 + 0.9 * u[0], np.arange(6) * np.pi / 3
    sides = [(np.cos(a), np.sin(a), 0, np.sqrt(0.75)) for a in turn]
    corners = [(np.cos(a), np.sin(a), z) for a in turn + np.pi / 6 for z in (-h, h)]
    return Solid((Part([*sides, *_caps(-h, h)]),), corners)


def wedge(u: Floats) -> Solid:
    """A ramp."""
    h, y = 0.55 + 0.4 * u[0], 0.5 + 0.4 * u[1]
    planes = [(-1, 0, 0, 1), (0, 1, 0, y), (0, -1, 0, y), (0, 0, -1, h), (1, 0, 1 / h, 0)]
    corners = [(x, side, z) for x, z in ((-1, -h), (1, -h), (-1, h)) for side in (-y, y)]
    return Solid((Part(planes),), corners)


def dome(u: Floats) -> Solid:
    """A cut ball, about half of one."""
    cut = 0.3 * u[0] - 0.2
    points = np.maximum(_ball(1), (-np.inf, -np.inf, cut))
    return Solid((Part([(0, 0, -1, -cut)], (1, 1, 1, 0, -1)),), points)


def cross(u: Floats) -> Solid:
    """Two crossing bars."""
    a, b = 0.25 + 0.15 * u[0], 0.25 + 0.2 * u[1]
    return _union(_cuboid((-1, -b, -a), (1, b, a)), _cuboid((-a, -b, -1), (a, b, 1)))


def frustum(u: Floats) -> Solid:
    """A cone without its top."""
    h, top = 0.6 + 0.5 * u[0], 0.35 + 0.3 * u[1]
    return _cone(-h, h, h * (1 + top) / (1 - top))


def tube(u: Floats) -> Solid:
    """A cylinder with a bore."""
    h, r = 0.35 + 0.7 * u[0], 0.55 + 0.25 * u[1]
    return _column(1, -h, h, bore=(1, 1, 0, 0, -r * r))


def ellipsoid(u: Floats) -> Solid:
    """Flat or long, round about the axis."""
    return _spheroid(1, squeeze=0.45 + 0.2 * u[0] if u[1] < 0.5 else 1.5 + 0.4 * u[0])


def tetrahedron(u: Floats) -> Solid:
    """Four equal faces."""
    del u
    corners = [(1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1)]
    return Solid((Part([(-x, -y, -z, 1) for x, y, z in corners]),), corners)


def stairs(u: Floats) -> Solid:
    """Three steps."""
    y, h = 0.5 + 0.4 * u[0], 0.5 + 0.25 * u[1]
    steps = [
        _cuboid((-1, -y, -h), (end, y, -h + 2 * h * (i + 1) / 3))
        for i, end in enumerate((1.0, 1 / 3, -1 / 3))
    ]
    return _union(*steps)


def mushroom(u: Floats) -> Solid:
    """Half a ball on a stem."""
    stem = _column(0.3 + 0.2 * u[0], -0.7 - 0.5 * u[1], 0.1)
    return _union(dome(np.full(4, 2 / 3)), stem)


SHAPES: dict[str, Callable[[Floats], Solid]] = {
    shape.__name__: shape
    for shape in (
        sphere, box, cylinder, cone, torus, octahedron, pyramid, capsule, prism, wedge, dome,
        cross, frustum, tube, ellipsoid, tetrahedron, stairs, mushroom,
    )
}  # fmt: skip
