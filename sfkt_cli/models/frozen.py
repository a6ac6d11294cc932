"""Tools for a frozen source model: its batch norms are folded, its activations recorded.

With stored statistics a batch norm is a factor and an offset for each channel, which a convolution
can bear itself. A step of the bridge then passes no batch norm of the source model, neither
forward nor backward, and keeps less for the backward pass (docs/decisions.md, 2026-11-26).

What a network sees on its way from pixels to features are its activations at each resolution.
"""

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.parametrize import is_parametrized

from sfkt_cli.models.classifier import Model
from sfkt_cli.models.onnx_network import OnnxNetwork

LARGEST_DIFFERENCE = 1e-4  # of outputs, relative to the largest of them
Call = tuple[str, int]
"""The n-th call of a module, or of a node of an ONNX network, in a pass: some modules, such as
activations, are used at several places."""
Hook = Callable[[str, nn.Module, tuple[Any, ...], Any], None]
"""Takes the name of a module, itself, its inputs and its output."""


def fold_batch_norms(model: Model, size: int) -> Model:
    """A copy of a frozen model without the batch norms that directly follow a convolution.

    The model takes images (B, 3, S, S) in [0, 1], S = ``size``, to features and logits. The model
    itself is returned if there are none, or if the outputs of the copy differ, for example because
    something else also reads the output of the convolution.
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
    # By identity and version of the output. The version tells whether something, such as an
    # activation, changed it in between. It is kept, so that no other tensor gets its identity.
    convolved: dict[tuple[int, int], tuple[str, Tensor]] = {}
    candidates: list[tuple[str, str]] = []

    def note(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        calls[name] += 1
        if isinstance(module, nn.Conv2d):
            convolved[id(output), output._version] = name, output
        elif inputs:
            convolution, _ = convolved.get((id(inputs[0]), inputs[0]._version), ("", None))
            candidates.append((convolution, name))

    layers = {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, nn.Conv2d) and not is_parametrized(module))
        or (type(module) is nn.BatchNorm2d and module.running_var is not None)
    }
    with _hooked(layers, note):
        outputs: tuple[Tensor, ...] = model(images)
    norms = Counter(convolution for convolution, _ in candidates)
    return [(c, n) for c, n in candidates if calls[c] == calls[n] == norms[c] == 1], outputs


@contextlib.contextmanager
def _hooked(modules: Mapping[str, nn.Module], hook: Hook) -> Iterator[None]:
    """Call the hook after each call of one of the modules."""
    handles = [
        module.register_forward_hook(partial(hook, name)) for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class FeatureMaps:
    """The activations of networks at the end of each resolution, recorded as they work.

    The end of a resolution is the outermost module that returns maps (B, C, S, S) of that size,
    such as a stage of a ResNet; where there are several, the last one. In an ONNX network it is the
    last node. Maps larger than a quarter of the image's side are left out: they are little more
    than the picture, and cost the most.

    Args:
        networks: In inference mode; one, or the backbones of a mixture.
        forward: Passes images through them, such as ``features`` of a classifier.
        images: Some of those that they were made for (B, 3, H, H), for trials.
    """

    def __init__(
        self, networks: Sequence[nn.Module], forward: Callable[[Tensor], object], images: Tensor
    ) -> None:
        # What has as many rows as there are images by chance, such as a bias, has so only once.
        self._ends: list[tuple[nn.Module, list[Call]]] = []
        for network in networks:
            two, three = (
                _ends_of_resolutions(network, forward, images[:count]) for count in (2, 3)
            )
            self._ends.append((network, [call for call in three if call in two]))
        with torch.inference_mode(), self.recording() as activations:
            forward(images)
        self.variances = [max(float(level.float().var()), 1e-6) for level in activations]
        """Variance of the activations of these images at each level."""

    @property
    def names(self) -> list[str]:
        """Names of the modules, from fine to coarse, network by network."""
        return [name for _, ends in self._ends for name, _ in ends]

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[Tensor]]:
        """A list that one pass of the networks inside the block adds its activations to."""
        activations: list[Tensor] = []
        with contextlib.ExitStack() as watched:
            for network, ends in self._ends:
                record = _watching(network, lambda _, output: activations.append(output), ends)
                watched.enter_context(record)
            yield activations


def _ends_of_resolutions(
    network: nn.Module, forward: Callable[[Tensor], object], images: Tensor
) -> list[Call]:
    last: dict[int, tuple[int, Call]] = {}  # how deep the module lies, by side of the map
    listed = isinstance(network, OnnxNetwork)  # the names of its nodes tell nothing

    def note(call: Call, output: Any) -> None:
        if isinstance(output, Tensor) and _is_map(output, images):
            if "pad" in call[0] and not listed:
                return
            side, depth = output.shape[-1], 0 if listed else call[0].count(".")
            if side not in last or depth <= last[side][0]:
                last.pop(side, None)
                last[side] = depth, call

    with torch.inference_mode(), _watching(network, note):
        forward(images)
    return [call for _, call in last.values()]


def _is_map(output: Tensor, images: Tensor) -> bool:
    if output.ndim != 4 or output.shape[0] != len(images) or output.shape[2] != output.shape[3]:
        return False
    return 1 < output.shape[3] <= images.shape[3] // 4


@contextlib.contextmanager
def _watching(
    network: nn.Module, watch: Callable[[Call, Any], object], only: Sequence[Call] | None = None
) -> Iterator[None]:
    """Watch the outputs of modules, or of nodes of an ONNX network: all calls, or those given."""
    calls: Counter[str] = Counter()

    def note(name: str, output: Any) -> None:
        calls[name] += 1
        if only is None or (name, calls[name]) in only:
            watch((name, calls[name]), output)

    if isinstance(network, OnnxNetwork):
        network.watch = note
        try:
            yield
        finally:
            network.watch = None
        return
    names = None if only is None else {name for name, _ in only}
    modules = {
        name: module
        for name, module in network.named_modules()
        if name and (names is None or name in names)
    }
    with _hooked(modules, lambda name, module, inputs, output: note(name, output)):
        yield
