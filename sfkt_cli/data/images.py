"""The one place that turns stored images into model input.

Stored RGB is (B, H, W, 3) uint8; stored target images are (B, H, W) or (B, H, W, C): depth in
uint16 millimetres with 0 = no reading, NIR and thermal as uint8 or uint16. Model input is
(B, C, H, W) float32 in [0, 1].

| encoding     | for      | channels | what it shows                                              |
| ------------ | -------- | -------- | ---------------------------------------------------------- |
| window       | depth    | 1 or C   | low .. high millimetres                                    |
| relative     | depth    | 1 or C   | mean -+ 2 sd of each image's valid pixels                  |
| colormap     | depth    | 3        | the window through the colours of "jet"                    |
| shading      | depth    | 3        | the surface in the light of three lamps above the camera;  |
|              |          |          | each channel is the mean -+ 2 sd of the image in one light |
| normals      | depth    | 3        | surface normals; x right, y down, z to the camera          |
| hha          | depth    | 3        | disparity, height above the lowest point, angle to gravity |
| linear       | nir, ... | 1 or C   | low .. high raw values                                     |
| standardised | nir, ... | 1 or C   | mean -+ 2 sd of each image (earlier name: percentile)      |

Where depth is missing, every channel is 0, in shading the mean of the image: RGB models take black
holes for things.
"""

from dataclasses import dataclass
from typing import Annotated, Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BeforeValidator
from torch import Tensor
from torch.nn import functional as F

from sfkt_cli.data.store import Store, spread
from sfkt_cli.errors import ConfigError
from sfkt_cli.settings.config import EncodingKind, current_name

DEFAULTS: dict[str, EncodingKind] = {
    "depth": "shading",
    "nir": "linear",
    "thermal": "standardised",
    "other": "standardised",
}
FROM_NORMALS = ("shading", "normals", "hha")
DEPTH_ONLY = ("window", "relative", "colormap", *FROM_NORMALS)
THREE_CHANNELS = ("colormap", *FROM_NORMALS)
LAMPS = ((-0.48, -0.64, 0.6), (0.0, -0.8, 0.6), (0.48, -0.64, 0.6))
"""Unit vectors to the lamps at the upper left, above and at the upper right; y points down."""
KINECT_FOCAL = 0.92  # focal length as a share of the image side: a Kinect sees 57 degrees across
USUAL_SLOPE = 0.5  # slope (tangent of the tilt) that the measured focal length gives to most pixels


@dataclass(frozen=True)
class Encoding:
    """How target images become model input; it travels with the model."""

    # See the table above; models of earlier versions have earlier names.
    kind: Annotated[EncodingKind, BeforeValidator(current_name)]
    low: float  # stored value shown as 0 (window, colormap, linear)
    high: float  # stored value shown as 1
    channels: int  # number of channels of the stored images
    missing: bool  # whether 0 means "no reading" (depth)
    # Focal length as a share of the image side (shading, normals, hha). Measured, not calibrated:
    # crops of objects would look flat through the camera's own.
    focal: float = KINECT_FOCAL
    revision: int = 1  # of the kind; shading is at 2: in 1 holes were black

    @property
    def encoded_channels(self) -> int:
        """Channels of the encoded image."""
        return 3 if self.kind in THREE_CHANNELS else self.channels


def choose_encoding(kind: str, modality: str, sample: NDArray[Any]) -> Encoding:
    """The encoding of a data set: the kind asked for, its window measured on unlabelled images.

    ``auto`` is the modality's default; ``sample`` holds some hundreds of stored target images,
    (N, H, W) or (N, H, W, C).

    Raises:
        ConfigError: The kind does not fit the modality or the number of channels.
    """
    chosen = DEFAULTS[modality] if kind == "auto" else kind
    channels = sample.shape[3] if sample.ndim == 4 else 1
    depth = modality == "depth"
    if (chosen in DEPTH_ONLY) != depth:
        fitting = [k for k in get_args(EncodingKind) if (k in DEPTH_ONLY) == depth]
        raise ConfigError(
            f"encoding = {kind!r} does not fit modality {modality!r}: "
            f"choose one of {', '.join(fitting)}"
        )
    if chosen in THREE_CHANNELS and channels != 1:
        raise ConfigError(f"encoding = {kind!r} needs one channel, the images have {channels}")
    values = sample[sample > 0] if depth else sample.reshape(-1)
    if sample.dtype == np.uint8 or values.size == 0:
        low, high = 0.0, float(np.iinfo(sample.dtype).max)
    else:
        low, high = (float(value) for value in np.percentile(values, (1.0, 99.0)))
    focal = _measure_focal(sample) if chosen in FROM_NORMALS else KINECT_FOCAL
    revision = 2 if chosen == "shading" else 1
    return Encoding(chosen, low, max(high, low + 1.0), channels, depth, focal, revision)  # type: ignore[arg-type]


def sample_rows(store: Store, count: int = 512) -> NDArray[Any]:
    """Target images, evenly spread over TI and TR rows, to measure value windows on."""
    parts = [store[name] for name in ("ti/target", "target/target") if store.count(name[:-7])]
    return np.concatenate([part[spread(len(part), count // 2)] for part in parts])


def _measure_focal(sample: NDArray[Any]) -> float:
    """The focal length that gives the median surface its usual slope.

    A surface rises by slope * depth / focal from one pixel to the next, in units of the image side.
    It is measured on 256 images, which are TI alone where there are so many; TR would give the demo
    0.92 and not 0.94. Others would change what every model of today is trained on.
    """
    depth = torch.from_numpy(sample[:256].astype(np.float32)).unsqueeze(1)
    valid = (depth > 0).to(torch.float32)
    whole = F.avg_pool2d(valid, 3, 1, 1)[:, :, 1:-1, 1:-1] > 0.99
    smooth = _fill_noise(depth, valid)
    across = (smooth[:, :, 1:-1, 2:] - smooth[:, :, 1:-1, :-2]) / 2
    down = (smooth[:, :, 2:, 1:-1] - smooth[:, :, :-2, 1:-1]) / 2
    rise = (across.square() + down.square()).sqrt() / smooth[:, :, 1:-1, 1:-1].clamp_min(1.0)
    if not whole.any():
        return KINECT_FOCAL
    median = float(rise[whole].median()) * depth.shape[-1]
    return float(np.clip(USUAL_SLOPE / max(median, 1e-6), 0.2, 50.0))


def rgb_to_float(rgb: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) float32 in [0, 1], channels last in memory."""
    return rgb.permute(0, 3, 1, 2).to(torch.float32).mul(1 / 255)


def as_rgb(encoded: Tensor) -> Tensor:
    """Three channels for an RGB model: one is copied, of more the first three are taken."""
    if encoded.shape[1] >= 3:
        return encoded[:, :3]
    return encoded[:, :1].expand(-1, 3, -1, -1)


def encode(stored: Tensor, encoding: Encoding) -> Tensor:
    """Turn stored target images, (B, H, W) or (B, H, W, C) of any number type, into model input.

    That is (B, C', H, W) float32 in [0, 1] with C' = ``encoding.encoded_channels``.
    """
    values = stored.to(torch.float32)
    values = values.unsqueeze(1) if values.ndim == 3 else values.permute(0, 3, 1, 2)
    valid = (values > 0).to(torch.float32) if encoding.missing else torch.ones_like(values)
    if encoding.kind in ("window", "linear", "colormap"):
        encoded = ((values - encoding.low) / (encoding.high - encoding.low)).clamp(0, 1)
        return _jet(encoded) * valid if encoding.kind == "colormap" else encoded * valid
    if encoding.kind in ("relative", "standardised"):
        return _relative(values, valid) * valid
    if encoding.kind not in FROM_NORMALS:
        raise ConfigError(f"encoding = {encoding.kind!r} is unknown")
    smooth = _fill_noise(values, valid)
    normals, scale = _normals(smooth, encoding.focal)
    if encoding.kind == "hha":
        return _hha(values, valid, smooth, scale * normals[1], encoding)
    if encoding.kind == "normals":
        middle = 0.5 * valid
        scale = middle * scale
        parts = [torch.addcmul(middle, part, scale) for part in normals]
    else:
        parts = [_relative(_lit(normals, scale, lamp), valid) for lamp in LAMPS]
    # Channels last in memory, as networks want it.
    return torch.stack(parts, dim=-1).squeeze(1).permute(0, 3, 1, 2)


def _relative(values: Tensor, valid: Tensor) -> Tensor:
    count = valid.sum(dim=(1, 2, 3), keepdim=True).clamp_min(1.0)
    mean = (values * valid).sum(dim=(1, 2, 3), keepdim=True) / count
    centred = (values - mean) * valid
    deviation = (centred.square().sum(dim=(1, 2, 3), keepdim=True) / count).sqrt()
    return (0.5 + 0.25 * centred / deviation.clamp_min(1e-3)).clamp(0, 1)


def _jet(shares: Tensor) -> Tensor:
    centres = torch.arange(3.0, 0.0, -1.0, device=shares.device).view(1, 3, 1, 1)
    return (1.5 - (4 * shares - centres).abs()).clamp(0, 1)


def _fill_noise(depth: Tensor, valid: Tensor) -> Tensor:
    """Mean of the valid pixels around each pixel: less noise, and small holes filled."""
    return _box_sum(depth * valid) / _box_sum(valid).clamp_min(1e-5)


def _box_sum(values: Tensor) -> Tensor:
    """Sum over 3 x 3 pixels, 0 outside; five times as fast as pooling on a CPU."""
    padded = F.pad(values, (1, 1, 1, 1))
    across = padded[..., :-2] + padded[..., 1:-1] + padded[..., 2:]
    return across[..., :-2, :] + across[..., 1:-1, :] + across[..., 2:, :]


def _rays(depth: Tensor, focal_share: float) -> tuple[Tensor, Tensor]:
    """Points at depth 1: x by column (1, 1, 1, W) and y by row (1, 1, H, 1); y points down."""
    height, width = depth.shape[-2:]
    rows = torch.arange(height, device=depth.device, dtype=depth.dtype) - (height - 1) / 2
    columns = torch.arange(width, device=depth.device, dtype=depth.dtype) - (width - 1) / 2
    focal = focal_share * width
    return columns.view(1, 1, 1, -1) / focal, rows.view(1, 1, -1, 1) / focal


def _normals(depth: Tensor, focal_share: float) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Normals, and what makes them unit vectors to the camera: products of central differences.

    All are (B, 1, H, W). A point is d (x, y, 1), z away. With the difference a of the depths to the
    right and left and their sum s, b and t of those below and above, and f pixels of focal length,
    differences of points are (x a + s / f, y a, a) and (x b, y b + t / f, b); f times their product
    is (-a t, -b s, z) with z = x a t + y b s + s t / f. Turned round, and z to the camera, it is
    (a t, b s, z). Beyond the border lies its pixel again.
    """
    x, y = _rays(depth, focal_share)
    edge, none = F.pad(depth, (1, 1, 1, 1), mode="replicate"), F.pad(depth, (1, 1, 1, 1))
    across = edge[:, :, 1:-1, 2:] - edge[:, :, 1:-1, :-2]
    down = edge[:, :, 2:, 1:-1] - edge[:, :, :-2, 1:-1]
    beside = none[:, :, 1:-1, 2:] + none[:, :, 1:-1, :-2]
    above = none[:, :, 2:, 1:-1] + none[:, :, :-2, 1:-1]
    nx, ny = across * above, down * beside
    nz = (beside * above / (focal_share * depth.shape[-1])).addcmul(x, nx).addcmul(y, ny)
    scale = (nx * nx).addcmul(ny, ny).addcmul(nz, nz).rsqrt().clamp_max(1e6)
    return (nx, ny, nz), scale * nz.sign()


def _lit(normals: tuple[Tensor, ...], scale: Tensor, lamp: tuple[float, float, float]) -> Tensor:
    """Brightness of a matt surface (Lambert), in [0, 1]; normals and scale as in _normals."""
    facing = sum(part * share for part, share in zip(normals, lamp, strict=True)) * scale
    return facing.clamp(0.0, 1.0)


def _hha(depth: Tensor, valid: Tensor, smooth: Tensor, down: Tensor, encoding: Encoding) -> Tensor:
    """Disparity, height, angle (Gupta et al., ECCV 2014), gravity taken as the image's down."""
    near = max(encoding.low, 1.0)
    disparity = (near / depth.clamp_min(near)).clamp(0, 1)
    upward = -smooth * _rays(smooth, encoding.focal)[1]
    lowest = torch.where(valid > 0, upward, torch.inf).amin(dim=(2, 3), keepdim=True)
    height = ((upward - lowest) / encoding.high).clamp(0, 1)
    angle = torch.acos((-down).clamp(-1, 1)) / torch.pi
    return torch.cat([disparity, height, angle], dim=1) * valid
