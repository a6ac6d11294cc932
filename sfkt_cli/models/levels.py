"""What a network sees on its way from pixels to features: its activations at each resolution."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class Levels:
    """The activations of a network at the end of each of its resolutions, noted as it works.

    The end of a resolution is the last module that gives maps (B, C, H, W) of that size, such as a
    stage of a ResNet. Of a recorded program the modules are its batch norms.

    Args:
        network: In inference mode.
        images: What it takes (B, 3, H, W), for one trial.
    """

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        self._noted: list[Tensor] | None = None
        self.names = _ends_of_resolutions(network, images)
        """Of the modules, from fine to coarse."""
        for name in self.names:
            network.get_submodule(name).register_forward_hook(self._note)

    @contextlib.contextmanager
    def noted(self) -> Iterator[list[Tensor]]:
        """A list that passes of the network inside the block add their activations to."""
        self._noted = []
        try:
            yield self._noted
        finally:
            self._noted = None

    def _note(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if self._noted is not None:
            self._noted.append(output)


def _ends_of_resolutions(network: nn.Module, images: Tensor) -> list[str]:
    last: dict[tuple[int, ...], str] = {}

    def watch(name: str) -> Any:
        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4 and min(output.shape[2:]) > 1:
                last.pop(size := tuple(output.shape[2:]), None)
                last[size] = name

        return note

    hooks = [
        module.register_forward_hook(watch(name))
        for name, module in network.named_modules()
        if name
    ]
    with torch.inference_mode():
        network(images)
    for hook in hooks:
        hook.remove()
    return list(last.values())
