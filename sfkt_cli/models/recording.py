"""Run a network twice and write down what it does: any callable module becomes a Program.

Recorded are the operations below autograd, with dropout off. Two batch sizes tell which numbers
stand for the batch; a branch that depends on the images' content is lost, hence the comparison.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sfkt_cli.errors import ConfigError, DataError
from sfkt_cli.models.programs import ALLOWED, BATCH_NORM, Program, steps_in
from sfkt_cli.models.recorder import Writer

BATCHES = (2, 3)
CHECKED = 5
"""Images on which a recording is compared with the original."""
LARGEST_DIFFERENCE = 1e-4
"""Of logits, relative to the largest of them."""
SOFTMAX = ("_softmax", "_log_softmax")


def record(
    network: nn.Module, size: int, what: str, head: str = ""
) -> tuple[dict[str, Any], dict[str, Tensor], Tensor, Tensor]:
    """Write a network down.

    Args:
        network: In inference mode, from normalised images (B, 3, S, S) to logits or
            probabilities (B, K).
        size: S.
        what: Its name in messages.
        head: Name of its last linear layer; empty: whatever comes last.

    Returns:
        Keyword arguments of :class:`Program` for all up to the last linear layer; its tensors; that
        layer's weight (K, F) and bias (K,). A network that does not end in one gets the identity.

    Raises:
        ConfigError: ``head`` is not what comes last.
        DataError: It cannot be written down, or the recording computes something else.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, second = (
            Writer(network, torch.randn(count, 3, size, size), what) for count in BATCHES
        )
        images = torch.randn(CHECKED, 3, size, size)
    steps = _merge(first.steps, second.steps, what)
    output, weight, bias = _split_head(first, steps, head)
    if weight is None or bias is None:
        weight, bias = torch.eye(first.classes), torch.zeros(first.classes)
    steps, output = _needed(steps, output, what)
    norms = {step[2]["layer"] for step in steps if step[0] == BATCH_NORM}
    used = {name for name in _tensors_in([steps, output]) if name.rpartition(".")[0] not in norms}
    program: dict[str, Any] = {
        "steps": steps,
        "output": output,
        "tensors": {
            name: [
                list(first.tensors[name].shape),
                str(first.tensors[name].dtype).removeprefix("torch."),
                name in first.trained and first.tensors[name].is_floating_point(),
            ]
            for name in sorted(used)
        },
        "norms": {name: first.norms[name] for name in sorted(norms)},
        "features": weight.shape[1],
    }
    state = {
        name: value
        for name, value in first.tensors.items()
        if name in used or name.rpartition(".")[0] in norms
    }
    _compare(network, program, state, weight, bias, images, what)
    return program, state, weight, bias


def _merge(one: Any, two: Any, what: str) -> Any:
    """The recording for any batch: what differs must be a multiple of the batch."""
    if isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        return [_merge(*pair, what) for pair in zip(one, two, strict=True)]
    if isinstance(one, Mapping) and isinstance(two, Mapping) and set(one) == set(two):
        return {key: _merge(one[key], two[key], what) for key in one}
    if one == two:
        return one
    if isinstance(one, int) and isinstance(two, int) and one * BATCHES[1] == two * BATCHES[0]:
        return {"batch": one // BATCHES[0]}
    raise DataError(f"{what} does different things for {BATCHES[0]} and {BATCHES[1]} images")


def _split_head(
    writer: Writer, steps: list[Any], head: str
) -> tuple[Any, Tensor | None, Tensor | None]:
    """What enters the last linear layer, and that layer; a softmax behind it is left out."""
    output = writer.output
    while "step" in output and steps[output["step"]][0].partition(".")[0] in SOFTMAX:
        output = steps[output["step"]][1][0]
    name, args, _ = _step(steps, output)
    bias = None
    if name == "add.Tensor" and _step(steps, args[0])[0] == "mm.default":
        bias, (name, args, _) = args[1], _step(steps, args[0])
    elif name == "addmm.default":
        bias, *args = args
    found, matrix, shift = "", torch.empty(0), torch.empty(0)
    if name in ("addmm.default", "mm.default") and (bias is None or "tensor" in bias):
        features, last = args
        turned = _step(steps, last)
        if turned[0] in ("t.default", "transpose.int"):
            last = turned[1][0]
        if "tensor" in last:
            found = str(last["tensor"]).rpartition(".")[0] or str(last["tensor"])
            matrix = writer.tensors[last["tensor"]]
            matrix = matrix if turned[0] else matrix.T.contiguous()
            shift = writer.tensors[bias["tensor"]] if bias else torch.zeros(len(matrix))
    if head and head != found:
        raise ConfigError(
            f"source.features = {head!r}: {writer.what} ends in "
            + (f"the linear layer {found!r}" if found else "no linear layer")
        )
    return (features, matrix, shift) if found else (output, None, None)


def _step(steps: list[Any], written: Any) -> list[Any]:
    """The step that an argument refers to; an empty one where it refers to none."""
    if isinstance(written, Mapping) and "step" in written:
        found: list[Any] = steps[written["step"]]
        return found
    return ["", [], {}]


def _needed(steps: list[Any], output: Any, what: str) -> tuple[list[Any], Any]:
    """The steps that lead to the output, numbered anew; those in place all count.

    Raises:
        DataError: One of them is not allowed in a program.
    """
    needed: set[int] = set(steps_in(output))
    for number in range(max(needed, default=-1), -1, -1):
        name, args, more = steps[number]
        if number in needed or name.partition(".")[0].endswith("_"):
            needed |= {number, *steps_in([args, list(more.values())])}
            if name != BATCH_NORM and name.partition(".")[0] not in ALLOWED:
                raise DataError(f"{what} uses the operation {name}, which is not supported")
    place = {number: index for index, number in enumerate(sorted(needed))}
    kept = [steps[number] for number in place]
    renumbered: tuple[list[Any], Any] = tuple(_renumber([kept, output], place))
    return renumbered


def _renumber(written: Any, place: Mapping[int, int]) -> Any:
    if isinstance(written, list):
        return [_renumber(each, place) for each in written]
    if isinstance(written, Mapping):
        return {**written, "step": place[written["step"]]} if "step" in written else written
    return written


def _tensors_in(written: Any) -> set[str]:
    if isinstance(written, list):
        return {name for each in written for name in _tensors_in(each)}
    if isinstance(written, Mapping):
        found = {written["tensor"]} if "tensor" in written else set()
        return found | {name for each in written.values() for name in _tensors_in(each)}
    return set()


def _compare(
    network: nn.Module, program: Any, state: Any, weight: Any, bias: Any, images: Tensor, what: str
) -> None:
    again = Program(**program)
    missing, unknown = again.network.load_state_dict(state, strict=False)
    left = [name for name in missing if not name.endswith("num_batches_tracked")]
    if left or unknown:
        raise DataError(f"{what} cannot be written down: its tensors {left + unknown} got lost")
    with torch.no_grad():
        expected = network(images)
        expected = expected[0] if isinstance(expected, (tuple, list)) else expected
        found = again.eval()(images) @ weight.T + bias
    gaps = [found - expected, found.softmax(1) - expected, found.log_softmax(1) - expected]
    gap = min(float(each.abs().max()) for each in gaps)
    if not gap <= LARGEST_DIFFERENCE * max(1.0, float(expected.abs().max())):
        raise DataError(
            f"{what} cannot be written down: the recording differs from it by {gap:.2g}; does it "
            "branch on what is in the images?"
        )
