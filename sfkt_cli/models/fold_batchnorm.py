"""Fold batch norms into the convolutions before them: a frozen network has no use for their own.

With stored statistics a batch norm is a factor and an offset for each channel, which a convolution
can bear itself. A step of the bridge then passes no batch norm of the source model, neither
forward nor backward, and keeps less for the backward pass (docs/decisions.md, 2026-11-26).
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.parametrize import is_parametrized

Model = TypeVar("Model", bound=nn.Module)

LARGEST_DIFFERENCE = 1e-4
"""Of outputs, relative to the largest of them."""


def fold_batch_norms(model: Model, size: int) -> Model:
    """A copy of a frozen model without the batch norms that directly follow a convolution.

    Args:
        model: In inference mode, images (B, 3, H, W) in [0, 1] to features and logits.
        size: Side of the images, in pixels.

    Returns:
        The copy; the model itself where there are none, or where the copy says otherwise, as when
        something else looks at the convolution's output, too.
    """
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    folded = copy.deepcopy(model).cpu()  # where a trial rounds to float32 and not to less
    with torch.no_grad():
        pairs, before = _norms_behind_convolutions(folded, images)
        if not pairs:
            return model
        for convolution, norm in pairs:
            layers: Any = folded.get_submodule(convolution), folded.get_submodule(norm)
            folded.set_submodule(convolution, fuse_conv_bn_eval(*layers))
            folded.set_submodule(norm, nn.Identity())
        after = folded(images)
    alike = all(
        torch.allclose(b, a, rtol=0.0, atol=LARGEST_DIFFERENCE * float(b.abs().max()))
        for a, b in zip(after, before, strict=True)
    )
    device = next(model.parameters()).device
    return folded.requires_grad_(False).to(device) if alike else model


def _norms_behind_convolutions(
    model: nn.Module, images: Tensor
) -> tuple[list[tuple[str, str]], tuple[Tensor, ...]]:
    """Names of convolutions and of the batch norms that take their outputs; the model's outputs."""
    calls: Counter[str] = Counter()
    made: list[tuple[Tensor, int, str]] = []  # kept, so that no other tensor gets one's identity
    taken: list[tuple[Tensor, int, str]] = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            calls[name] += 1
            if isinstance(module, nn.Conv2d):
                made.append((output, output._version, name))
            elif given:
                taken.append((given[0], given[0]._version, name))

        return hook

    hooks = [
        module.register_forward_hook(note(name))
        for name, module in model.named_modules()
        if (isinstance(module, nn.Conv2d) and not is_parametrized(module))
        or (type(module) is nn.BatchNorm2d and module.running_var is not None)
    ]
    try:
        outputs: tuple[Tensor, ...] = model(images)
    finally:
        for handle in hooks:
            handle.remove()
    # The version tells whether something, such as an activation, changed the output in between.
    maker = {(id(output), version): name for output, version, name in made}
    candidates = [(maker.get((id(given), version), ""), name) for given, version, name in taken]
    norms = Counter(convolution for convolution, _ in candidates)
    return [(c, n) for c, n in candidates if calls[c] == calls[n] == norms[c] == 1], outputs
