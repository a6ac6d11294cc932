"""What a network sees on its way from pixels to features: its activations at each resolution."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sfkt_cli.models.programs import Program

Watch = Callable[[str, Any], None]
"""Takes the name of a module, or of a step of a recorded program, and its output."""


class Levels:
    """The activations of networks at the end of each of their resolutions, noted as they work.

    The end of a resolution is the last module, or step of a recorded program, that gives maps
    (B, C, H, W) of that size, such as a stage of a ResNet. Maps of more than a quarter of the
    images' side are left out: they are little more than the picture, and cost the most.

    Args:
        networks: In inference mode; one, or the backbones of a mixture.
        look: Passes images through them, such as ``features`` of a classifier.
        images: Some of those that they were made for (B, 3, H, W), for two trials.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        look: Callable[[Tensor], object],
        images: Tensor,
    ) -> None:
        self._ends = [(each, _ends_of_resolutions(each, look, images[:1])) for each in networks]
        with torch.inference_mode(), self.noted() as seen:
            look(images)
        self.variances = [max(float(level.float().var()), 1e-6) for level in seen]
        """Of the activations of these images at each level."""

    @property
    def names(self) -> list[str]:
        """Of the modules, from fine to coarse, network by network."""
        return [name for _, ends in self._ends for name in ends]

    @contextlib.contextmanager
    def noted(self) -> Iterator[list[Tensor]]:
        """A list that passes of the networks inside the block add their activations to."""
        seen: list[Tensor] = []
        with contextlib.ExitStack() as watched:
            for network, ends in self._ends:
                note = _watching(network, lambda _, output: seen.append(output), ends)
                watched.enter_context(note)
            yield seen


def _ends_of_resolutions(
    network: nn.Module, look: Callable[[Tensor], object], images: Tensor
) -> list[str]:
    last: dict[tuple[int, ...], str] = {}
    most = images.shape[-1] // 4

    def note(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and 1 < max(output.shape[2:]) <= most:
            last.pop(size := tuple(output.shape[2:]), None)
            last[size] = name

    with torch.inference_mode(), _watching(network, note):
        look(images)
    return list(last.values())


@contextlib.contextmanager
def _watching(
    network: nn.Module, watch: Watch, only: Sequence[str] | None = None
) -> Iterator[None]:
    """Have modules, or the steps of a program, tell of their outputs: all, or those of a name."""
    if isinstance(network, Program):
        network.watch = lambda name, out: watch(name, out) if only is None or name in only else None
        try:
            yield
        finally:
            network.watch = None
        return

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, given, output: watch(name, output)

    hooks = [
        module.register_forward_hook(hook(name))
        for name, module in network.named_modules()
        if name and (only is None or name in only)
    ]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()
