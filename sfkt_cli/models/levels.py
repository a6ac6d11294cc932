"""What a network sees on its way from pixels to features: its activations at each resolution."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sfkt_cli.models.programs import Program

Watch = Callable[[str, Any], None]
"""Takes the name of a module, or of a step of a recorded program, and its output."""


class Levels:
    """The activations of a network at the end of each of its resolutions, noted as it works.

    The end of a resolution is the last module, or step of a recorded program, that gives maps
    (B, C, H, W) of that size, such as a stage of a ResNet.

    Args:
        network: In inference mode.
        images: What it takes (B, 3, H, W), for one trial.
    """

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        self._network = network
        self.names = _ends_of_resolutions(network, images)
        """Of the modules, from fine to coarse."""

    @contextlib.contextmanager
    def noted(self) -> Iterator[list[Tensor]]:
        """A list that passes of the network inside the block add their activations to."""
        seen: list[Tensor] = []

        def note(name: str, output: Any) -> None:
            if name in self.names:
                seen.append(output)

        with _watching(self._network, note, self.names):
            yield seen


def _ends_of_resolutions(network: nn.Module, images: Tensor) -> list[str]:
    last: dict[tuple[int, ...], str] = {}

    def note(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and min(output.shape[2:]) > 1:
            last.pop(size := tuple(output.shape[2:]), None)
            last[size] = name

    names = [name for name, _ in network.named_modules() if name]
    with torch.inference_mode(), _watching(network, note, names):
        network(images)
    return list(last.values())


@contextlib.contextmanager
def _watching(network: nn.Module, watch: Watch, names: list[str]) -> Iterator[None]:
    """Have modules of these names, or the steps of a program, tell of their outputs."""
    if isinstance(network, Program):
        network.watch = watch
        try:
            yield
        finally:
            network.watch = None
        return

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, given, output: watch(name, output)

    hooks = [network.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()
