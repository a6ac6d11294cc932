"""ONNX files, read into a list of operations that is checked against onnxruntime.

One boundary, :func:`read_onnx`, turns whatever is wrong with a file into one message.
"""

import contextlib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sfkt_cli.errors import ConfigError, DataError, SfktError, first_line, need
from sfkt_cli.files import require_file
from sfkt_cli.models.onnx_network import (
    BATCH_NORM,
    NUMBERS,
    OPERATIONS,
    OnnxNetwork,
    as_tuple,
    names_in,
)

BATCHES = (2, 3)  # two numbers of images tell which numbers of a graph stand for the batch
SCALES = (0.3, 1.0, 1.0, 2.0, 5.0)
"""Of the images on which the network is compared with onnxruntime, in standard deviations."""
LARGEST_DIFFERENCE = 1e-4  # of outputs, relative to the largest of them
LARGEST = {"Infinity": torch.finfo(torch.float32).max, "-Infinity": torch.finfo(torch.float32).min}
"""What stands for numbers that are not finite, such as what images are padded with."""
OLDEST_OPSET = 7
COMMON_OPSET = 18  # without the operations that later ones have for whole layers
SAVE_WEIGHTS = "torch.save(model.state_dict(), 'weights.pth')"
LAYERS = tuple(
    kind
    for kind in OPERATIONS
    if kind in ("Conv", "Gemm", "MatMul") or kind.endswith("Normalization") or "Reduce" in kind
)
"""Operations whose results are images no more."""
MASKED = 1e4  # so large are the numbers, such as -inf, that hide words from attention
SOFTMAXES = {"Softmax": F.softmax, "LogSoftmax": F.log_softmax}
ENDS = {"Sigmoid": lambda logits, _: logits.sigmoid(), **SOFTMAXES}
"""Operations that may come behind the logits."""
RESHAPING = ("Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")
"""Operations that may come between these, and change no number."""
LEAST = 1e-7  # of a probability whose logarithm is taken; float16 still holds it
Node = list[Any]


@dataclass(frozen=True)
class OnnxModel:
    """What an ONNX file holds."""

    # Keyword arguments of :class:`OnnxNetwork` for all up to the last linear layer.
    graph: dict[str, Any]
    network: OnnxNetwork  # that network, with its weights
    weight: Tensor  # of the last linear layer (K, F); the identity where there is none
    bias: Tensor  # its bias (K,)
    normalises: bool  # whether the network begins with a normalisation of its own
    remarks: tuple[str, ...]  # what the user should know of its features and logits
    facts: dict[str, str]  # what its writer noted beside the graph, such as class names


def read_onnx(path: Path, size: int, head: str = "") -> OnnxModel:
    """Read a classifier for RGB images; nothing is read but the file itself.

    The graph is settled for images of ``size`` pixels. ``head`` names its last linear layer; empty:
    whatever comes last.

    Raises:
        ConfigError: The extra ``onnx`` is not installed, or ``head`` is not what comes last.
        DataError: The file is missing, damaged, refers to other files, uses what is not known here,
            or computes something else than in onnxruntime.
    """
    need(str(path), "onnx", "onnx", "onnxruntime")
    require_file(path, "source.checkpoint")
    try:
        with warnings.catch_warnings(action="ignore"), torch.no_grad():
            return _read(path.read_bytes(), path, size, head)
    except Exception as error:  # a damaged file raises whatever its parts raise
        nodes = [f"{note}: " for note in getattr(error, "__notes__", ())]
        if isinstance(error, SfktError) and not nodes:
            raise
        why = f"{''.join(nodes[:1])}{first_line(error)}"
        raise DataError(f"{path} cannot be read as a classifier: {why}") from None


def _read(content: bytes, path: Path, size: int, head: str) -> OnnxModel:
    import onnx

    model = onnx.load_model_from_string(content)
    tensors, nodes = _parse(path, model)
    images_name, channels_last, batch = _check_input(path, model.graph, tensors, size)
    noise = torch.randn(len(SCALES), 3, size, size, generator=torch.Generator().manual_seed(0))
    images = noise * torch.tensor(SCALES).view(-1, 1, 1, 1)
    as_given = images.permute(0, 2, 3, 1).contiguous() if channels_last else images
    logits_name = model.graph.output[0].name
    try:
        seen = [_run(nodes, {**tensors, images_name: as_given[:count]}) for count in BATCHES]
        logits = seen[1][logits_name]
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != BATCHES[1]:
            raise DataError(
                f"{path} gives {tuple(logits.shape)} for {BATCHES[1]} images: no classifier"
            )
    except Exception as error:
        if batch:  # this number stands inside, too
            _refuse_batch(path, batch, images_name)
        if channels_last is None:
            raise DataError(
                f"{path} cannot be read as a classifier of images (B, 3, H, W): "
                f"{first_line(error)}. If it takes (B, H, W, 3), export it with a fixed number of "
                "channels, 3"
            ) from None
        raise
    independent = _independent(nodes, tensors)
    normalising = _normalising(nodes, independent, images_name)
    weights = _weights(nodes, tensors, normalising)
    nodes = _settle(nodes, tensors, weights, seen)
    output, ends, name, weight, bias = _split_head(
        path, nodes, independent, seen[1], logits_name, head
    )
    nodes = _needed(nodes, output)
    if seen[1][output].ndim != 2:
        nodes.append(["Flatten", [output], [output := f"{output} flat"], {}])
    remarks: list[str] = []
    if not name:
        if not ends and _are_probabilities(path, logits):
            ends = ["Softmax"]
            nodes.append(["Clip", [output, LEAST, None], [f"{output} clipped"], {}])
            nodes.append(["Log", [f"{output} clipped"], [output := f"{output} log"], {}])
            remarks.append("its outputs are probabilities: their logarithms are the logits")
        weight, bias = torch.eye(logits.shape[1]), torch.zeros(logits.shape[1])
        where = f"no last linear layer was found in {path}: features are its {len(bias)} outputs"
    else:
        where = f"features are the {weight.shape[1]} inputs of the last linear layer {name!r}"
    if "Sigmoid" in ends:
        remarks.append("its outputs are sigmoids: what enters these is taken for logits")
    others = [
        other.name
        for other in model.graph.output[1:]
        if getattr(seen[1][other.name], "ndim", 0) == 2
    ]
    if others:
        remarks.append(
            f"of its outputs the first, {logits_name}, is taken for the logits, and not "
            f"{', '.join(others)}: if that is wrong, export the logits alone"
        )
    norms = _name_norms(nodes, tensors, seen[0])
    used = {name for node in nodes for name in names_in(node[1])}
    graph: dict[str, Any] = {
        "nodes": nodes,
        "input": images_name,
        "output": output,
        "channels_last": bool(channels_last),
        "tensors": {
            name: [list(value.shape), str(value.dtype).removeprefix("torch."), name in weights]
            for name, value in tensors.items()
            if name in used
        },
        "norms": [settings for settings, _ in norms],
        "features": weight.shape[1],
    }
    # As model.json gives it back, which knows no infinite numbers.
    graph = json.loads(json.dumps(graph), parse_constant=LARGEST.__getitem__)
    network = _network(graph, tensors, [values for _, values in norms])
    ours = network(images) @ weight.T + bias
    for end in ends:
        ours = ENDS[end](ours, 1)
    batches = torch.split(as_given, batch or len(images))
    theirs = _in_onnxruntime(content, logits_name, images_name, batches)
    gap = float((ours - theirs).abs().max())
    if not gap <= LARGEST_DIFFERENCE * max(1.0, float(theirs.abs().max())):
        if batch:
            _refuse_batch(path, batch, images_name)
        raise DataError(
            f"{path} was not imported: its outputs differ by {gap:.2g} from those in onnxruntime. "
            "Does it branch on the content of the images? Otherwise bring the weights of the "
            f"network that it was exported from: {SAVE_WEIGHTS}"
        )
    normalises = normalising > {images_name}
    facts = {entry.key: entry.value for entry in model.metadata_props}
    return OnnxModel(graph, network, weight, bias, normalises, (where, *remarks), facts)


def _are_probabilities(path: Path, logits: Tensor) -> bool:
    """Whether outputs (B, K) are probabilities; numbers in [0, 1] of another sum are refused."""
    if not -LEAST < float(logits.min()) <= float(logits.max()) < 1 + 1e-4:
        return False
    if not torch.allclose(logits.sum(1), torch.ones(len(logits)), atol=1e-3):
        raise DataError(
            f"{path} gives numbers between 0 and 1 that do not add up to 1, so they are "
            "neither logits nor probabilities: export the logits, in front of any sigmoid"
        )
    return True


def _network(
    graph: Mapping[str, Any], tensors: Mapping[str, Tensor], norms: Sequence[Mapping[str, Tensor]]
) -> OnnxNetwork:
    """The network of a graph, with the weights of the file and those of its batch norms."""
    network = OnnxNetwork(**graph).eval()
    for name, own in network.named_tensors().items():
        own.copy_(tensors[name])
    for layer, values in zip(network.norms, norms, strict=True):
        layer.load_state_dict(values, strict=False)
    return network


def _in_onnxruntime(
    content: bytes, output: str, images_name: str, batches: Iterable[Tensor]
) -> Tensor:
    """What onnxruntime computes of some batches of images, one behind the other."""
    session = open_session(content)
    results = [session.run([output], {images_name: part.numpy()})[0] for part in batches]
    return torch.from_numpy(np.concatenate(results))


def _parse(path: Path, model: Any) -> tuple[dict[str, Tensor], list[Node]]:
    """Tensors and nodes of a file; constants are tensors."""
    graph = model.graph
    if not graph.node or not graph.output:
        raise DataError(f"{path} is not an intact ONNX file: it holds no graph")
    refuse_what_is_elsewhere(path, model)
    opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)
    if opset < OLDEST_OPSET:
        raise DataError(f"{path} is of opset {opset}: export it for opset 13 or later")
    if unknown := unknown_operations(model):
        from onnx.defs import has

        newer = not all(has(kind, COMMON_OPSET, "") for kind in unknown)
        raise DataError(
            f"{path} holds operations that are not known here: {', '.join(unknown)}. Bring "
            f"the weights of the network that it was exported from instead: {SAVE_WEIGHTS}"
            + (f", or export it with opset_version={COMMON_OPSET}" if newer else "")
        )
    tensors = {stored.name: _tensor(stored) for stored in graph.initializer}
    nodes: list[Node] = []
    for stored in graph.node:
        with _at(stored.name or (stored.output[0] if stored.output else ""), stored.op_type):
            attributes = {a.name: _attribute(a) for a in stored.attribute}
            if stored.op_type == "Constant":
                (value,) = attributes.values()
                tensors[stored.output[0]] = torch.as_tensor(value)
            elif stored.op_type == "Identity" and stored.input[0] in tensors:
                # An exporter stores weights once that have the same values by chance.
                tensors[stored.output[0]] = tensors[stored.input[0]].clone()
            else:
                inputs = [name or None for name in stored.input]
                nodes.append([stored.op_type, inputs, list(stored.output), attributes])
                _adapt(nodes[-1], opset)
    return tensors, _in_order(nodes, {*tensors, *(entry.name for entry in graph.input)})


def unknown_operations(model: Any) -> list[str]:
    """Operations of an ONNX file that are not known here."""
    return sorted({node.op_type for node in model.graph.node} - {*OPERATIONS, "Constant"})


def _in_order(nodes: Sequence[Node], given: set[str]) -> list[Node]:
    """The nodes, each behind those whose outputs it takes; some converters write them anyhow."""
    kept: list[Node] = []
    while nodes:
        later: list[Node] = []
        for node in nodes:
            missing = set(names_in(node[1])) - given
            (later if missing else kept).append(node)
            given |= set() if missing else set(node[2])
        if len(later) == len(nodes):
            missing = set(names_in(nodes[0][1])) - given
            with _at(nodes[0][2][0], nodes[0][0]):
                raise DataError(f"nothing gives its input {min(missing)!r}: the file is damaged")
        nodes = later
    return kept


@contextlib.contextmanager
def _at(name: str, kind: str) -> Iterator[None]:
    """Note on errors which node they are about."""
    try:
        yield
    except Exception as error:
        error.add_note(f"node {name!r} ({kind})")
        raise


def refuse_what_is_elsewhere(path: Path, model: Any) -> None:
    """Refuse values in other files, at any place of the file, and operations of other makers."""
    for where, kind, part in _parts(model):
        if kind == "FunctionProto" or (kind == "NodeProto" and part.domain not in ("", "ai.onnx")):
            raise DataError(
                f"{path}: {where or f'function {part.name!r}'} of {part.domain!r} is not known: it "
                "is none of ONNX's own operations"
            )
        if kind == "TensorProto" and (part.external_data or part.data_location):
            raise DataError(
                f"{path}: {where} keeps its values in another file. Export with "
                f"external_data=False, or put them inside: onnx.save(onnx.load('{path.name}'), "
                "'inside.onnx')"
            )


def _parts(message: Any, where: str = "") -> Iterator[tuple[str, str, Any]]:
    """All that lies inside of a message: the node or weight it belongs to, its kind, and itself."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for part in [value] if hasattr(value, "ListFields") else value:
            at = where
            if field.name == "node":
                at = f"node {part.name or ' '.join(part.output)!r} ({part.op_type})"
            elif field.name in ("initializer", "sparse_initializer"):
                at = f"weight {getattr(part, 'name', 'sparse')!r}"
            yield at, field.message_type.name, part
            yield from _parts(part, at)


def _tensor(stored: Any) -> Tensor:
    from onnx import numpy_helper

    value = torch.from_numpy(numpy_helper.to_array(stored).copy())
    return value.float() if value.is_floating_point() else value


def _attribute(attribute: Any) -> Any:
    from onnx import helper

    value = helper.get_attribute_value(attribute)
    if attribute.type == attribute.TENSOR:
        return _tensor(value)
    return value.decode() if isinstance(value, bytes) else value


def _adapt(node: Node, opset: int) -> None:
    """Write as attributes what an operation means at the opset of the file.

    Axes, bounds and paddings were attributes once and are inputs now; operations take both.
    """
    kind, _, outputs, attributes = node
    if kind in SOFTMAXES and opset < 13:
        attributes.setdefault("axis", 1)
        attributes["flatten"] = 1
    elif kind == "Split":
        attributes.setdefault("num_outputs", len(outputs))
    elif kind == "ConstantOfShape" and "value" in attributes:
        attributes["value"] = attributes["value"].item()
    elif kind == BATCH_NORM and (
        attributes.get("training_mode") or not attributes.get("spatial", 1)
    ):
        raise DataError("batch norm in training mode, or for each pixel, is not supported")


def _check_input(
    path: Path, graph: Any, tensors: Mapping[str, Tensor], size: int
) -> tuple[str, bool | None, int]:
    """Name of the images, whether they are (B, H, W, 3), and how many.

    None: the file does not say it; 0: any number.
    """
    inputs = [entry for entry in graph.input if entry.name not in tensors]
    if len(inputs) != 1:
        raise DataError(f"{path} has {len(inputs)} inputs: an image classifier has one")
    kind = inputs[0].type.tensor_type
    if kind.elem_type != 1:
        raise DataError(f"{path} takes no float32 images: export it with a float32 input")
    sides = [max(0, dimension.dim_value) for dimension in kind.shape.dim]  # some write -1 for any
    channels_last: bool | None = False
    batch = 0
    if len(sides) == 4:
        channels_last = None if sides[1] == sides[3] == 0 else sides[3] == 3 != sides[1]
        batch, *sides = sides
        if batch > 1:
            _refuse_batch(path, batch, inputs[0].name)
        height, width = sides[:2] if channels_last else sides[1:]
        if 0 != height != width != 0:
            raise DataError(
                f"{path} takes images of {height} x {width} pixels, and only square ones can be "
                f"given to it: export it for {size} x {size}"
            )
        if height not in (0, size) or width not in (0, size):
            raise DataError(
                f"{path} takes images of {height} x {width} pixels, the data have {size} x {size}: "
                f"prepare them again with --set image_size={height}, or export it for {size}"
            )
    return inputs[0].name, channels_last, batch


def _refuse_batch(path: Path, batch: int, images_name: str) -> NoReturn:
    raise DataError(
        f"{path} takes {batch} image{'s' if batch > 1 else ''} at a time: export it with a batch "
        "of any size, torch.onnx.export(..., dynamic_shapes=({0: 'batch'},)), with dynamo=False "
        f"dynamic_axes={{{images_name!r}: {{0: 'batch'}}}}"
    )


def _run(nodes: Sequence[Node], given: Mapping[str, Any]) -> dict[str, Any]:
    """Every value of the graph."""
    values: dict[str, Any] = dict(given)
    for kind, inputs, outputs, attributes in nodes:
        with _at(outputs[0], kind):
            arguments = [None if name is None else values[name] for name in inputs]
            results = OPERATIONS[kind](*arguments, **attributes)
            values.update(zip(outputs, as_tuple(results), strict=False))
    return values


def _settle(
    nodes: Sequence[Node],
    tensors: dict[str, Tensor],
    weights: set[str],
    traces: Sequence[Mapping[str, Any]],
) -> list[Node]:
    """Work out all that depends on the images' shape only; put numbers where numbers are wanted."""
    fixed = tensors.keys() - weights
    kept: list[Node] = []
    for kind, inputs, outputs, attributes in nodes:
        settled = inputs[:1] if kind == "CastLike" else inputs
        if kind == "Shape" or all(name is None or name in fixed for name in settled):
            fixed |= set(outputs)
            if all(_equal(*(values.get(name) for values in traces)) for name in outputs):
                tensors |= {name: traces[0][name] for name in outputs if name in traces[0]}
                continue
        kept.append([kind, list(inputs), outputs, attributes])
    for kind, inputs, outputs, _ in kept:
        for place in range(NUMBERS.get(kind, len(inputs)), len(inputs)):
            if inputs[place] is None:
                continue
            with _at(outputs[0], kind):
                if inputs[place] not in fixed:
                    raise DataError("it depends on the images' content")
                inputs[place] = _literal(*(values[inputs[place]].tolist() for values in traces))
    return kept


def _equal(one: Any, two: Any) -> bool:
    if not (isinstance(one, Tensor) and isinstance(two, Tensor)):
        return one is two is None  # an output that is not computed; never a sequence
    return bool(torch.equal(one, two))


def _literal(one: Any, two: Any) -> Any:
    """Numbers for any batch: what differs must be a multiple of the batch."""
    if isinstance(one, list):
        return [_literal(*pair) for pair in zip(one, two, strict=True)]
    if one == two:
        return one
    if isinstance(one, int) and one * BATCHES[1] == two * BATCHES[0]:
        return {"batch": one // BATCHES[0]}
    raise DataError(f"it does different things for {BATCHES[0]} and {BATCHES[1]} images")


def _independent(nodes: Sequence[Node], tensors: Mapping[str, Tensor]) -> set[str]:
    """Names of the tensors, and of what is made of these alone."""
    names = set(tensors)
    for _, inputs, outputs, _ in nodes:
        if inputs and set(inputs) <= names:
            names |= set(outputs)
    return names


def _normalising(nodes: Sequence[Node], independent: set[str], images_name: str) -> set[str]:
    """Names of the images and of the constants that normalise them, in front of any layer."""
    images, constants = {images_name}, {images_name}
    behind: set[str] = set()
    for kind, inputs, outputs, _ in nodes:
        if behind & set(inputs) or (kind in LAYERS and images & set(inputs)):
            behind |= set(outputs)
        elif images & set(inputs) and kind != "Shape":
            images |= set(outputs)
            if kind in ("Add", "Div", "Mul", "Sub"):
                constants |= independent & set(inputs)
    for _, inputs, outputs, _ in reversed(nodes):
        if constants & set(outputs):  # a constant that is made of others
            constants |= set(names_in(inputs))
    return constants


def _weights(
    nodes: Sequence[Node], tensors: Mapping[str, Tensor], normalising: set[str]
) -> set[str]:
    """Names of the tensors that are trained.

    Constants are whole numbers, single numbers, masks, statistics, and what normalises the images.
    """
    statistics = {name for kind, inputs, *_ in nodes if kind == BATCH_NORM for name in inputs[3:]}
    return {
        name
        for name, value in tensors.items()
        if name not in normalising | statistics and value.is_floating_point() and value.numel() > 1
        and float(value.abs().max()) < MASKED
    }  # fmt: skip


def _split_head(
    path: Path,
    nodes: Sequence[Node],
    independent: set[str],
    trace: Mapping[str, Any],
    output: str,
    head: str,
) -> tuple[str, list[str], str, Tensor, Tensor]:
    """Name of what enters the last linear layer, what comes behind it; its name, weight and bias.

    Without such a layer the last three are empty, and the first is what those behind it take.
    """
    node_of = {name: node for node in nodes for name in node[2][:1]}
    ends: list[str] = []
    behind, classes = output, trace[output].shape[1]
    while (node := node_of.get(output)) and _ends(node, trace, classes):
        output = node[1][0]
        if node[0] in ENDS:
            ends.insert(0, node[0])
            behind = output
    kind, inputs, _, attributes = node_of.get(output, ["", [], [], {}])
    shift: Any = None
    if kind == "Add":
        for one, two in (inputs, inputs[::-1]):
            if node_of.get(one, [""])[0] == "MatMul" and two in independent:
                (kind, inputs, _, attributes), shift = node_of[one], two
                break
    elif kind in ("Conv", "Gemm") and len(inputs) > 2:
        shift = inputs[2]
    usual = {"alpha": 1, "beta": 1, "transA": 0, "group": 1}
    plain = all(attributes.get(key, value) == value for key, value in usual.items())
    name, matrix = "", torch.empty(0)
    if kind in ("Conv", "Gemm", "MatMul") and plain and {inputs[1], shift} <= {None, *independent}:
        weight = trace[inputs[1]]
        if kind == "Conv":
            weight = weight.flatten(1)  # a linear layer, where it covers the whole map
        elif weight.ndim == 2 and not attributes.get("transB"):
            weight = weight.T
        if weight.ndim == 2 and trace[inputs[0]].flatten(1).shape[1:] == weight.shape[1:]:
            name, matrix = str(inputs[1]).removesuffix(".weight"), weight
    if head and head != name:
        raise ConfigError(
            f"source.features = {head!r}: {path} ends in "
            + (f"the linear layer {name!r}" if name else "no linear layer")
        )
    bias = trace[shift] if name and shift else torch.zeros(1)
    features = inputs[0] if name else behind
    return features, ends, name, matrix.contiguous(), bias.flatten().expand(len(matrix)).clone()


def _ends(node: Node, trace: Mapping[str, Any], classes: int) -> bool:
    """Whether a node leaves logits (B, K) what they are: an activation behind them, or a shape."""
    kind, inputs, outputs, attributes = node
    if kind not in (*ENDS, *RESHAPING):
        return False
    before, after = trace[inputs[0]], trace[outputs[0]]
    axis = attributes.get("axis", -1) % max(before.ndim, 1)
    over_classes = kind not in SOFTMAXES or (axis > 0 and before.shape[axis] == classes)
    whole = before.ndim > 1 and before.flatten(1).shape == (len(after), classes)
    return bool(over_classes and whole and before.dtype == after.dtype)


def _needed(nodes: Sequence[Node], output: str) -> list[Node]:
    """The nodes that lead to the output."""
    needed, kept = {output}, []
    for node in reversed(nodes):
        if needed & set(node[2]):
            needed |= set(names_in(node[1]))
            kept.append(node)
    return kept[::-1]


def _name_norms(
    nodes: Sequence[Node], tensors: Mapping[str, Tensor], trace: Mapping[str, Any]
) -> list[tuple[list[Any], dict[str, Tensor]]]:
    """Make layers of the batch norms, so that training takes new statistics."""
    norms = []
    for node in nodes:
        kind, inputs, _, attributes = node
        if kind != BATCH_NORM or trace[inputs[0]].ndim > 4 or not set(inputs[1:]) <= set(tensors):
            continue
        names = ("weight", "bias", "running_mean", "running_var")
        values = {name: tensors[own] for name, own in zip(names, inputs[1:], strict=True)}
        eps, momentum = attributes.get("epsilon", 1e-5), 1 - attributes.get("momentum", 0.9)
        vectors = [] if trace[inputs[0]].ndim == 4 else [1]
        norms.append(([len(values["weight"]), eps, round(momentum, 6), *vectors], values))
        node[1], node[3] = inputs[:1], {"layer": len(norms) - 1}
    return norms


def open_session(content: bytes) -> Any:
    """An ONNX file in onnxruntime, on the CPU, without its warnings."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    parts = _parts(onnx.load_model_from_string(content))
    half = onnx.TensorProto.FLOAT16
    if any(kind == "TensorProto" and part.data_type == half for _, kind, part in parts):
        # At ORT_ENABLE_ALL, attention in float16 ends the process (onnxruntime 1.32).
        level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.graph_optimization_level = level
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
