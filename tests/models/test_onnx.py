"""Models as ONNX: taken as onnxruntime understands them, or refused; nothing else is read."""

from __future__ import annotations

import copy
import itertools
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torchvision import models

from sfkt_cli.data.images import Encoding
from sfkt_cli.errors import ConfigError, DataError
from sfkt_cli.models import graph_files, onnx_network
from sfkt_cli.models.classifier import Classifier
from sfkt_cli.models.frozen import FeatureMaps
from sfkt_cli.models.graph_files import (
    SensorGraph,
    for_export,
    halved,
    open_onnx,
    open_pt2,
    quietly,
    to_int8,
    to_onnx,
    to_pt2,
)
from sfkt_cli.models.importing import Imported, import_source
from sfkt_cli.models.onnx_files import open_session, read_onnx
from sfkt_cli.models.onnx_network import OnnxNetwork
from sfkt_cli.models.saving import load_model, save_model
from sfkt_cli.models.translators import TRANSLATORS, make_translator
from sfkt_cli.settings.config import Config, build
from sfkt_cli.settings.stage import Stage

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
CLASSES = ["box", "cone", "sphere"]
SIDE = 16
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
FLOAT = onnx.TensorProto.FLOAT


class Small(nn.Module):
    """What classifiers consist of: convolution, batch and layer norm, attention, a linear end."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.norm = nn.BatchNorm2d(8)
        self.layer_norm = nn.LayerNorm(8)
        self.mixed = nn.Linear(8, 24)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        seen = F.relu(self.norm(self.conv(images)))
        words = self.layer_norm(F.max_pool2d(seen, 2).flatten(2).transpose(1, 2))
        query, key, value = self.mixed(words).unsqueeze(1).chunk(3, 3)
        words = words + F.scaled_dot_product_attention(query, key, value).squeeze(1)
        pooled: Tensor = self.fc(self.drop(words.mean(1).view(images.shape[0], -1)))
        return pooled


def small() -> nn.Module:
    torch.manual_seed(0)
    network = Small().eval()
    with torch.no_grad():
        network.norm.running_mean.normal_()  # type: ignore[union-attr]
    return network


class Probabilities(nn.Module):
    """Images to logits and probabilities, as exported files give them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        _, logits = self.model(images)
        return logits, logits.softmax(1)


def settings(path: Path, **source: Any) -> Config:
    return build({"source": {"checkpoint": str(path), **PLAIN, **source}})


def read_back(brought: Imported, folder: Path) -> Classifier:
    """The model from its files."""
    save_model(
        Stage("test", folder / "source", Config(), {}), brought.model, kind="classifier",
        architecture=brought.architecture, classes=brought.classes, encoding=None,
    )  # fmt: skip
    model = load_model(folder / "source").module
    assert isinstance(model, Classifier)
    return model


@pytest.mark.filterwarnings("ignore")
def test_a_network_written_to_onnx_comes_back_and_can_be_trained_and_exported(
    tmp_path: Path,
) -> None:
    pytest.importorskip("onnxscript")
    path = tmp_path / "MODEL.ONNX"
    images = torch.rand(2, 3, SIDE, SIDE)
    content = to_onnx(small(), images, {}, outputs=["logits"], keep_norms=True)
    path.write_bytes(content)
    brought = import_source(settings(path), CLASSES, size=SIDE)
    path.unlink()
    model = read_back(brought, tmp_path)
    images = torch.rand(5, 3, SIDE, SIDE)
    features, logits = model(images)
    torch.testing.assert_close(logits, small()(images), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.head(features), logits)
    assert features.shape == (5, 8)
    student = copy.deepcopy(model).requires_grad_(True).train()
    student(images)[1].sum().backward()
    grads = [parameter.grad for parameter in student.parameters()]
    assert all(grad is not None and torch.isfinite(grad).all() for grad in grads)
    (norm,) = [layer for layer in student.modules() if isinstance(layer, nn.BatchNorm2d)]
    (frozen,) = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert not torch.equal(norm.running_mean, frozen.running_mean)  # type: ignore[arg-type]
    again = torch.export.export(model, (images[:2],), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.testing.assert_close(again.module()(images)[1], logits, atol=1e-5, rtol=1e-4)


def write(network: nn.Module, path: Path, *, legacy: bool) -> None:
    """Export a network for any number of images."""
    images = torch.rand(2, 3, SIDE, SIDE)
    if legacy:
        with quietly():
            torch.onnx.export(
                network, (images,), path, input_names=["images"],
                dynamic_axes={"images": {0: "batch"}}, dynamo=False,
            )  # fmt: skip
    else:
        path.write_bytes(to_onnx(network, images, {}, outputs=["logits"], keep_norms=True))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "class token": lambda: models.VisionTransformer(SIDE, 8, 1, 2, 8, 8, num_classes=3),
    "convnext": lambda: models.ConvNeXt(
        [models.convnext.CNBlockConfig(8, 12, 1), models.convnext.CNBlockConfig(12, None, 1)],
        num_classes=3,
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("legacy", [False, True], ids=["dynamo", "legacy"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_that_came_as_onnx_is_exported_for_any_batch(
    name: str, legacy: bool, tmp_path: Path
) -> None:
    """Its operations make tensors whose size is that of the batch."""
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    network, path = NETWORKS[name]().eval(), tmp_path / "model.onnx"
    write(network, path, legacy=legacy)
    images = torch.rand(5, 3, SIDE, SIDE)
    graph = Probabilities(import_source(settings(path), CLASSES, size=SIDE).model)
    for content, open_file in (
        (to_onnx(graph, images[:2], {}), open_onnx),
        (to_pt2(graph, images[:2], {}, any_batch=True), open_pt2),
    ):
        torch.testing.assert_close(open_file(content)(images), graph(images)[1])


class WithConstants(nn.Module):
    """Normalises its images itself, has a table of places and masked attention."""

    middle: Tensor
    spread: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("middle", torch.tensor([0.4, 0.5, 0.6]))
        self.register_buffer("spread", torch.tensor([0.2, 0.3, 0.2]).view(3, 1, 1))
        self.register_buffer("mask", torch.full((16, 16), -torch.inf).triu(1))
        self.conv = nn.Conv2d(3, 8, 4, 4)
        self.fc = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        images = (images.clamp(0, 1) - self.middle.view(3, 1, 1)) / self.spread
        words = self.conv(images).flatten(2).transpose(1, 2)
        places = torch.arange(words.shape[1] * 8, device=words.device).view(1, -1, 8)
        words = words + torch.tanh(places / 8)
        attention = torch.softmax(words @ words.transpose(1, 2) + self.mask, 2)
        pooled: Tensor = self.fc((attention @ words).mean(1))
        return pooled


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("legacy", [False, True], ids=["dynamo", "legacy"])
def test_constants_of_a_network_are_not_trained(legacy: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    network, path = WithConstants().eval(), tmp_path / "model.onnx"
    write(network, path, legacy=legacy)
    student = import_source(settings(path), CLASSES, size=SIDE).model.train()
    shapes = sorted(sorted(parameter.shape) for parameter in student.parameters())
    assert shapes == sorted(sorted(parameter.shape) for parameter in network.parameters())
    optimizer = torch.optim.SGD(student.parameters(), 0.1, 0.9, weight_decay=0.1, nesterov=True)
    student(torch.rand(2, 3, SIDE, SIDE))[1].sum().backward()
    optimizer.step()
    assert student(torch.rand(2, 3, SIDE, SIDE))[1].isfinite().all()


WRITERS: dict[str, Callable[[Path], None]] = {
    "pickle.pkl": lambda path: torch.save(small(), path),
    "script.pt": lambda path: torch.jit.save(torch.jit.script(small()), path),
    "program.pt2": lambda path: torch.export.save(
        torch.export.export(
            small(), (torch.rand(2, 3, SIDE, SIDE),), dynamic_shapes=({0: torch.export.Dim("n")},)
        ),
        path,
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WRITERS)
def test_a_file_with_a_whole_network_is_refused_with_lines_that_make_onnx_of_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    WRITERS[name](Path(name))
    with pytest.raises(DataError, match="can run any code") as refused:
        import_source(settings(Path(name)), CLASSES, size=SIDE)
    lines = [line.strip() for line in str(refused.value).splitlines() if line.startswith("  ")]
    assert len(lines) == 3
    with quietly():
        exec("\n".join(lines), {"S": SIDE})
    brought = import_source(settings(Path(name).with_suffix(".onnx")), CLASSES, size=SIDE)
    images = torch.rand(5, 3, SIDE, SIDE)
    torch.testing.assert_close(brought.model(images)[1], small()(images), atol=1e-5, rtol=1e-4)


class Planted(nn.Module):
    """Writes a file when it is unpickled, and as TorchScript when it is run."""

    def __init__(self, trace: str) -> None:
        super().__init__()
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self.trace, "w"))

    def forward(self, images: Tensor) -> Tensor:
        torch.from_file(self.trace, shared=True, size=4)
        return images.mean((2, 3))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", [".pth", ".PT", ".pkl", ".pt2", ".safetensors", ".onnx"])
@pytest.mark.parametrize("kind", ["pickle", "script"])
def test_planted_code_does_not_run(kind: str, suffix: str, tmp_path: Path) -> None:
    trace, path = tmp_path / "trace", tmp_path / f"model{suffix}"
    planted = Planted(str(trace))
    if kind == "pickle":
        torch.save({"state_dict": planted}, path)
    else:
        torch.jit.save(torch.jit.script(planted), path)
    with pytest.raises(DataError, match=path.name):
        import_source(settings(path), CLASSES, size=SIDE)
    assert not trace.exists()


Described = tuple[str, list[str], list[str], dict[str, Any]]
Breaking = Callable[[Any], object]
CONV: Described = ("Conv", ["x", "w"], ["c"], {"strides": [2, 2], "auto_pad": "SAME_UPPER"})
POOL: Described = ("GlobalAveragePool", ["c"], ["g"], {})
FLAT: Described = ("Flatten", ["g"], ["p"], {})
GEMM: Described = ("Gemm", ["p", "f", "b"], ["y"], {"transB": 1})


def model_of(*nodes: Described, opset: int = 17, shape: Any = ("n", 3, SIDE, SIDE)) -> Any:
    """A file with weights w (4, 3, 3, 3), f (2, 4), b (2,), v (4,), whole numbers and bounds."""
    torch.manual_seed(0)
    tensors = {
        "w": torch.randn(4, 3, 3, 3), "f": torch.randn(2, 4), "b": torch.randn(2),
        "v": torch.rand(4) + 0.5, "axes": torch.tensor([2, 3]), "low": torch.tensor(-0.5),
        "high": torch.tensor(0.5), "pads": torch.tensor([0, 0, 1, 0, 0, 0, 2, 1]),
        "sizes": torch.tensor([1, 3]), "zero": torch.tensor(0), "one": torch.tensor(1),
        "column": torch.tensor([-1, 1, 1, 1]), "row": torch.randn(1, 2),
        "zero1": torch.tensor([0]), "minus": torch.tensor([-1]), "one1": torch.tensor([1]),
        "minus2": torch.tensor([-2]), "far": torch.tensor([-(2**31)]),
        "lowest": torch.tensor(-torch.inf), "highest": torch.tensor(torch.inf),
        "pointwise": torch.randn(2, 4, 1, 1), "alone": torch.tensor([1, -1]),
    }  # fmt: skip
    helper = onnx.helper
    graph = helper.make_graph(
        [helper.make_node(kind, given, out, **rest) for kind, given, out, rest in nodes],
        "classifier",
        [helper.make_tensor_value_info("x", FLOAT, list(shape))],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [onnx.numpy_helper.from_array(each.numpy(), name) for name, each in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 8
    return model


def stored(folder: Path, model: Any) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def between(*nodes: Described) -> list[Described]:
    """Nodes from ``c`` to ``d`` in the middle of a classifier."""
    return [CONV, *nodes, ("GlobalAveragePool", ["d"], ["g"], {}), FLAT, GEMM]


SEMANTICS: dict[str, tuple[list[Described], tuple[int, ...]]] = {
    "softmax over all axes from 1 on, once": (between(("Softmax", ["c"], ["d"], {})), (11, 13)),
    "log softmax of one axis": (between(("LogSoftmax", ["c"], ["d"], {"axis": 2})), (11, 13)),
    "probabilities": ([CONV, POOL, FLAT, (*GEMM[:2], ["z"], GEMM[3]),
                       ("Softmax", ["z"], ["y"], {})], (11, 17)),
    "probabilities that are cast": (
        [CONV, POOL, FLAT, (*GEMM[:2], ["z"], GEMM[3]), ("Softmax", ["z"], ["s"], {}),
         ("Cast", ["s"], ["t"], {"to": FLOAT}), ("Cast", ["t"], ["y"], {"to": FLOAT})], (13,)),
    "probabilities of maps": (
        [CONV, POOL, FLAT, (*GEMM[:2], ["z"], GEMM[3]), ("Unsqueeze", ["z", "axes"], ["u"], {}),
         ("Softmax", ["u"], ["s"], {"axis": 1}), ("Squeeze", ["s", "axes"], ["y"], {})], (13,)),
    "sigmoids": ([CONV, POOL, FLAT, (*GEMM[:2], ["z"], GEMM[3]), ("Sigmoid", ["z"], ["y"], {})],
                 (13,)),
    "a convolution as the head": (
        [CONV, POOL, ("Conv", ["g", "pointwise", "b"], ["z"], {}), ("Flatten", ["z"], ["y"], {})],
        (13,)),
    "a head that is worked out": (
        [("Mul", ["f", "high"], ["m"], {}), CONV, POOL, FLAT,
         ("Gemm", ["p", "m", "b"], ["y"], {"transB": 1})], (13,)),
    "a bias of one row": ([CONV, POOL, FLAT, ("Gemm", ["p", "f", "row"], ["y"], {"transB": 1})],
                          (13,)),
    "squeezed by attribute": ([CONV, POOL, ("Squeeze", ["g"], ["p"], {"axes": [2, 3]}), GEMM],
                              (11,)),
    "squeezed by input": ([CONV, POOL, ("Squeeze", ["g", "axes"], ["p"], {}), GEMM], (13,)),
    "reduced by attribute": ([CONV, ("ReduceMean", ["c"], ["p"], {"axes": [-2, 3], "keepdims": 0}),
                              GEMM], (11, 17)),
    "reduced by input": ([CONV, ("ReduceMax", ["c", "axes"], ["p"], {"keepdims": 0}), GEMM], (18,)),
    "not reduced": (between(("ReduceSum", ["c"], ["d"], {"noop_with_empty_axes": 1})), (13,)),
    "padded by attribute": (between(("Pad", ["c"], ["d"], {"pads": [0, 0, 1, 0, 0, 0, 2, 1],
                                                           "value": 3.0})), (7,)),
    "padded by input": (between(("Pad", ["c", "pads", "high"], ["d"], {})), (13,)),
    "reflected": (between(("Pad", ["c", "pads"], ["d"], {"mode": "reflect"})), (13,)),
    "clipped by attribute": (between(("Clip", ["c"], ["d"], {"min": -0.5, "max": 0.5})), (7,)),
    "clipped by input": (between(("Clip", ["c", "low", "high"], ["d"], {})), (13,)),
    "clipped above": (between(("Clip", ["c", "", "high"], ["d"], {})), (13,)),
    "dropout": (between(("Dropout", ["c"], ["d"], {})), (7, 13)),
    "batch norm": (between(("BatchNormalization", ["c", "v", "v", "v", "v"], ["d"], {})), (9, 15)),
    "batch norm, equal weights stored once": (
        between(("Identity", ["v"], ["i"], {}),
                ("BatchNormalization", ["c", "v", "v", "i", "i"], ["d"], {})), (15,)),
    "batch norm of vectors": (
        [CONV, POOL, FLAT, ("BatchNormalization", ["p", "v", "v", "v", "v"], ["q"], {}),
         ("Gemm", ["q", "f", "b"], ["y"], {"transB": 1})], (9, 15)),
    "group norm": (between(("GroupNormalization", ["c", "v", "v"], ["d"], {"num_groups": 2})),
                   (21,)),
    "instance norm": (between(("InstanceNormalization", ["c", "v", "v"], ["d"], {})), (7,)),
    "split in as many as there are outputs": (
        between(("Split", ["c"], ["s", "t", "u", "e"], {"axis": 1}),
                ("Concat", ["e", "s", "u", "t"], ["d"], {"axis": 1})), (11, 13)),
    "channels the other way round, all and then some of them": (
        between(("Slice", ["c", "minus", "far", "one1", "minus"], ["r"], {}),
                ("Slice", ["r", "minus2", "zero1", "one1", "minus"], ["s"], {}),
                ("Concat", ["s", "s"], ["d"], {"axis": 1})), (13,)),
    "split by input": (between(("Split", ["c", "sizes"], ["s", "t"], {"axis": 1}),
                               ("Concat", ["t", "s"], ["d"], {"axis": 1})), (13,)),
    "flattened at another axis": (
        [CONV, POOL, ("Flatten", ["g"], ["h"], {"axis": 2}),
         ("Flatten", ["g"], ["p"], {"axis": -3}),
         GEMM], (13,)),
    "reshaped by the shape of the images": (
        [CONV, POOL, ("Shape", ["x"], ["k"], {}), ("Gather", ["k", "zero"], ["m"], {}),
         ("Unsqueeze", ["m", "zero1"], ["u"], {}), ("Concat", ["u", "minus"], ["r"], {"axis": 0}),
         ("Reshape", ["g", "r"], ["p"], {}), GEMM], (13,)),
    "channels last": ([("Transpose", ["x"], ["i"], {"perm": [0, 3, 1, 2]}),
                       ("Conv", ["i", "w"], *CONV[2:]), POOL, FLAT, GEMM], (13,)),
    "activations": (between(("Celu", ["c"], ["k"], {"alpha": 0.5}), ("Selu", ["k"], ["l"], {}),
                            ("Softsign", ["l"], ["d"], {})), (13,)),
    "padded by minus infinity": (
        between(("Pad", ["c", "pads", "lowest"], ["e"], {}),
                ("MaxPool", ["e"], ["d"], {"kernel_shape": [3, 3]})), (13,)),
    "filled with minus infinity": (
        between(("Shape", ["c"], ["k"], {}),
                ("ConstantOfShape", ["k"], ["e"], {"value": onnx.helper.make_tensor(
                    "", FLOAT, [1], [-torch.inf])}),
                ("Max", ["c", "e"], ["d"], {})), (13,)),
    "clipped at infinity": (between(("Clip", ["c", "low", "highest"], ["d"], {})), (13,)),
    "standardised by values that others make": (
        [("Mul", ["v", "high"], ["s"], {}), *between(
            ("BatchNormalization", ["c", "v", "v", "s", "s"], ["d"], {}))], (15,)),
    "the largest of three": (between(("Max", ["c", "high", "low"], ["d"], {})), (13,)),
}  # fmt: skip


@pytest.mark.parametrize("what", SEMANTICS)
def test_every_operation_means_what_it_means_at_the_opset_of_the_file(
    what: str, tmp_path: Path
) -> None:
    nodes, opsets = SEMANTICS[what]
    for opset in opsets:
        last = what == "channels last"
        shape = ("n", SIDE, SIDE, 3) if last else ("n", 3, SIDE, SIDE)
        path = stored(tmp_path, model_of(*nodes, opset=opset, shape=shape))
        imported = import_source(settings(path), ["box", "cone"], size=SIDE)
        brought = read_back(imported, tmp_path).requires_grad_(True)
        images = torch.rand(4, 3, SIDE, SIDE)
        (expected,) = open_session(path.read_bytes()).run(
            None, {"x": (images.permute(0, 2, 3, 1) if last else images).numpy()}
        )
        features, logits = brought(images)
        outputs = logits.softmax(1) if what.startswith("probabilities") else logits
        outputs = logits.sigmoid() if what == "sigmoids" else outputs
        torch.testing.assert_close(outputs, torch.from_numpy(expected), atol=1e-5, rtol=1e-4)
        assert features.shape == (4, 4)
        statistics = [value.clone() for value in brought.backbone.buffers()]
        brought.train()(images)[1].sum().backward()
        renewed = [
            not torch.equal(old, new)
            for old, new in zip(statistics, brought.backbone.buffers(), strict=True)
        ]
        assert any(renewed) == what.startswith("batch norm")
        assert all(each.grad is not None for each in brought.backbone.parameters())


@pytest.mark.parametrize("what", ["padded by minus infinity", "clipped at infinity"])
def test_infinite_bounds_fit_every_precision(what: str, tmp_path: Path) -> None:
    path = stored(tmp_path, model_of(*SEMANTICS[what][0]))
    model = import_source(settings(path), ["box", "cone"], size=SIDE).model
    images = torch.rand(4, 3, SIDE, SIDE)
    with torch.no_grad():
        expected = model(images)[1]
        rounded = copy.deepcopy(model).bfloat16()(images.bfloat16())[1].float()
    torch.testing.assert_close(rounded, expected, atol=0.05, rtol=0.05)


def test_statistics_of_a_batch_norm_are_not_trained(tmp_path: Path) -> None:
    """Its factor is worked out from another tensor, so it becomes no layer."""
    scale: Described = ("Reshape", ["row", "minus"], ["h"], {})
    doubled: Described = ("Concat", ["h", "h"], ["s"], {"axis": 0})
    norm: Described = ("BatchNormalization", ["c", "s", "s", "v", "v"], ["d"], {})
    path = stored(tmp_path, model_of(scale, doubled, *between(norm)))
    backbone = import_source(settings(path), ["box", "cone"], size=SIDE).model.backbone
    assert sorted(tuple(own.shape) for own in backbone.parameters()) == [(1, 2), (4, 3, 3, 3)]


def test_what_is_made_of_numbers_lies_where_the_images_are(tmp_path: Path) -> None:
    """No GPU is needed: tensors without values stand for those on one."""
    made: list[Described] = [
        ("Shape", ["c"], ["k"], {}), ("Gather", ["k", "zero"], ["n"], {}),
        ("ConstantOfShape", ["k"], ["o"], {}),
        ("Range", ["zero", "n", "one"], ["r"], {}), ("Reshape", ["r", "column"], ["e"], {}),
        ("Cast", ["e"], ["t"], {"to": FLOAT}), ("Cast", ["n"], ["m"], {"to": FLOAT}),
        ("Sum", ["c", "o", "t", "m"], ["d"], {}),
    ]  # fmt: skip
    graph = read_onnx(stored(tmp_path, model_of(*between(*made))), SIDE).graph
    with FakeTensorMode():
        network = OnnxNetwork(**graph)
        held: list[Any] = [[p._parameters, p._buffers] for p in network.modules()]
        for tensors in itertools.chain(*held):
            tensors |= {name: value.detach().to("cuda") for name, value in tensors.items()}
        result = network(torch.empty(5, 3, SIDE, SIDE, device="cuda"))
    assert (result.device.type, result.shape) == ("cuda", (5, 4))


def test_what_comes_out_otherwise_than_in_onnxruntime_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(onnx_network.OPERATIONS, "Relu", torch.sigmoid)
    path = stored(tmp_path, model_of(*between(("Relu", ["c"], ["d"], {}))))
    with pytest.raises(DataError, match=r"differ by .* from those in onnxruntime"):
        read_onnx(path, SIDE)


def elsewhere() -> Any:
    """A tensor whose values lie in /etc/hostname."""
    tensor = onnx.TensorProto(data_type=FLOAT, dims=[1], data_location=1, name="e")
    tensor.external_data.add(key="location", value="/etc/hostname")
    return tensor


def added(kind: str, given: list[str], out: list[str], domain: str = "", **more: Any) -> Breaking:
    """Adds a node."""
    name = "mine" if domain else None
    made = onnx.helper.make_node(kind, given, out, name, domain=domain, **more)
    return lambda model: model.graph.node.append(made)


def side(place: int, length: int) -> Breaking:
    """Fixes a side of the input."""
    return lambda model: setattr(
        model.graph.input[0].type.tensor_type.shape.dim[place], "dim_value", length
    )


INNER = onnx.helper.make_graph([], "inner", [], [], [elsewhere()])
ELSEWHERE = "keeps its values in another file"
BROKEN: dict[str, tuple[Breaking, str]] = {
    "weight": (lambda model: model.graph.initializer.append(elsewhere()),
               f"weight 'e' {ELSEWHERE}"),
    "constant": (added("Constant", [], ["e"], value=elsewhere()),
                 rf"node 'e' \(Constant\) {ELSEWHERE}"),
    "attribute": (added("ConstantOfShape", ["axes"], ["e"], value=elsewhere()),
                  rf"node 'e' \(ConstantOfShape\) {ELSEWHERE}"),
    "subgraph": (added("If", ["k"], ["e"], then_branch=INNER, else_branch=INNER),
                 f"weight 'e' {ELSEWHERE}"),
    "sparse": (lambda model: model.graph.sparse_initializer.add().values.CopyFrom(elsewhere()),
               f"weight 'sparse' {ELSEWHERE}"),
    "domain": (added("Gelu", ["c"], ["e"], "com.microsoft"),
               r"node 'mine' \(Gelu\) of 'com.microsoft'"),
    "lacking": (lambda model: model.graph.node[1].input.__setitem__(0, "lost"),
                r"node 'g' \(GlobalAveragePool\): .* input 'lost'"),
    "old": (lambda model: setattr(model.opset_import[0], "version", 6), "opset 6"),
    "batch": (side(0, 4), "takes 4 images at a time.*dynamic_axes={'x'"),
    "size": (lambda model: [side(place, 64)(model) for place in (2, 3)], "--set image_size=64"),
    "operation": (lambda model: setattr(model.graph.node[1], "op_type", "Hardmax"),
                  r"not known here: Hardmax.*'weights\.pth'\)$"),
    "newer operation": (lambda model: setattr(model.graph.node[1], "op_type", "RMSNormalization"),
                        r"not known here: RMSNormalization.* opset_version=18"),
    "pooling": (added("AveragePool", ["c"], ["d"], kernel_shape=[2, 2], pads=[0, 0, 1, 1]),
                r"model\.onnx cannot be read .* node 'd' \(AveragePool\): .* on one side only"),
    "shape": (lambda model: model.graph.node[0].attribute.append(
                  onnx.helper.make_attribute("group", 2)), r"node 'c' \(Conv\)"),
}  # fmt: skip


def broken(what: str) -> Any:
    model = model_of(CONV, POOL, FLAT, GEMM)
    BROKEN[what][0](model)
    return model


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_refused_is_named(what: str, tmp_path: Path) -> None:
    path = stored(tmp_path, broken(what))
    with pytest.raises(DataError, match=BROKEN[what][1]):
        read_onnx(path, SIDE)


LOGITS = [CONV, POOL, FLAT, (*GEMM[:2], ["z"], GEMM[3])]


def test_probabilities_are_never_taken_for_logits(tmp_path: Path) -> None:
    """Nothing here knows that the maximum with -0.5 changes none of them."""
    soft: Described = ("Softmax", ["z"], ["s"], {})
    most: Described = ("Max", ["s", "low"], ["y"], {})
    path = stored(tmp_path, model_of(*LOGITS, soft, most))
    brought = import_source(settings(path), ["box", "cone"], size=SIDE)
    images = torch.rand(4, 3, SIDE, SIDE)
    (expected,) = open_session(path.read_bytes()).run(None, {"x": images.numpy()})
    found = brought.model(images)[1].softmax(1)
    torch.testing.assert_close(found, torch.from_numpy(expected), atol=1e-5, rtol=1e-4)
    assert any("no last linear layer" in remark for remark in brought.remarks)
    stored(tmp_path, model_of(*LOGITS, ("Sigmoid", *soft[1:]), most))
    with pytest.raises(DataError, match=r"model\.onnx gives numbers between 0 and 1.* export"):
        read_onnx(path, SIDE)


@pytest.mark.parametrize("backbone", ["small", "efficientnet_lite0"])
def test_a_backbone_that_says_how_onnx_is_normalised_is_warned_of(
    backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may be left over from an earlier start of the stage."""
    path = stored(tmp_path, model_of(*LOGITS, ("Identity", ["z"], ["y"], {})))
    given = {"backbone": backbone, "mean": None, "std": None}
    import_source(settings(path, **given), CLASSES[:2], size=SIDE)
    assert ("--set source.backbone=small" in capsys.readouterr().err) == (backbone != "small")


def test_the_outputs_and_the_layer_that_were_taken_are_named(tmp_path: Path) -> None:
    model = model_of(*LOGITS, ("Identity", ["z"], ["y"], {}))
    for name in ("z", "p"):
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, FLOAT, None))
    remarks = read_onnx(stored(tmp_path, model), SIDE).remarks
    assert "4 inputs of the last linear layer 'f'" in remarks[0]
    assert "y, is taken" in remarks[1]
    assert "not z, p" in remarks[1]


@pytest.mark.parametrize(
    ("key", "noted", "taken"),
    [("names", "{0: 'cone', 1: 'box'}", True), ("classes", '["cone", "box"]', True),
     ("names", "{[0]: 'cone'}", False), ("names", "print(1)", False), ("classes", "cone", False),
     ("names", "{0: 'cone'}", False)],
)  # fmt: skip
def test_class_names_that_a_file_notes_say_what_its_outputs_are(
    key: str, noted: str, taken: bool, tmp_path: Path
) -> None:
    model = model_of(CONV, POOL, FLAT, GEMM)
    path, images = stored(tmp_path, model), torch.rand(2, 3, SIDE, SIDE)
    plain = import_source(settings(path), ["box", "cone"], size=SIDE).model(images)[1]
    onnx.helper.set_model_props(model, {key: noted})
    brought = import_source(settings(stored(tmp_path, model)), ["box", "cone"], size=SIDE)
    torch.testing.assert_close(brought.model(images)[1], plain.flip(1) if taken else plain)


IN_FRONT: dict[str, list[Described]] = {
    "nothing": [("Identity", ["x"], ["i"], {})],
    "clamp": [("Clip", ["x", "low", "high"], ["i"], {})],
    "bgr": [("Slice", ["x", "minus", "far", "one1", "minus"], ["i"], {})],
    "padding": [("Pad", ["x", "pads"], ["i"], {})],
    "one channel after the other": [("Split", ["x"], ["r", "o", "l"], {"axis": 1}),
                                    ("Concat", ["l", "o", "r"], ["i"], {"axis": 1})],
    "reshaped by its own shape": [("Shape", ["x"], ["k"], {}), ("Reshape", ["x", "k"], ["i"], {})],
}  # fmt: skip


@pytest.mark.parametrize("kind", ["Sub", "Mul"])
@pytest.mark.parametrize("front", IN_FRONT)
def test_a_normalisation_inside_is_not_applied_twice(front: str, kind: str, tmp_path: Path) -> None:
    inside: list[Described] = [(kind, ["i", "m"], ["n"], {}), ("Conv", ["n", "w"], *CONV[2:])]
    made: Described = ("Unsqueeze", ["high", "zero1"], ["m"], {})
    path = stored(tmp_path, model_of(made, *IN_FRONT[front], *inside, POOL, FLAT, GEMM))
    for given in ({"mean": None, "std": None}, {"std": None}):
        with pytest.raises(ConfigError, match=r"normalises its images itself.*source\.std=\[1, 1"):
            import_source(settings(path, **given), ["box", "cone"], size=SIDE)
    assert (
        import_source(settings(path), ["box", "cone"], size=SIDE).architecture["mean"] == (0,) * 3
    )


def test_arithmetic_that_is_no_normalisation_does_not_ask_for_mean_and_std(tmp_path: Path) -> None:
    """Numbers of the shape, statistics of each image, and what comes behind a convolution."""
    nodes: list[Described] = [
        ("Shape", ["x"], ["k"], {}), ("Gather", ["k", "zero"], ["n"], {}),
        ("Mul", ["n", "one"], ["o"], {}), ("Cast", ["o"], ["count"], {"to": FLOAT}),
        ("ReduceMean", ["x"], ["s"], {"axes": [1, 2, 3]}), ("Sub", ["x", "s"], ["i"], {}),
        ("Conv", ["i", "w"], ["h"], {"auto_pad": "SAME_UPPER"}), ("Mul", ["h", "high"], ["c"], {}),
        POOL, FLAT, GEMM,
    ]  # fmt: skip
    path = stored(tmp_path, model_of(*nodes))
    import_source(settings(path, mean=None, std=None), ["box", "cone"], size=SIDE)


def test_channels_that_may_be_last_must_be_fixed(tmp_path: Path) -> None:
    turned: Described = ("Transpose", ["x"], ["i"], {"perm": [0, 3, 1, 2]})
    nodes = [turned, ("Conv", ["i", "w"], *CONV[2:]), POOL, FLAT, GEMM]
    path = stored(tmp_path, model_of(*nodes, shape="nhwc"))
    with pytest.raises(DataError, match=r"export it with a fixed number of channels"):
        read_onnx(path, SIDE)
    stored(tmp_path, model_of(CONV, POOL, FLAT, GEMM, shape="nchw"))
    assert read_onnx(path, SIDE).graph["channels_last"] is False


def test_only_square_images_are_taken(tmp_path: Path) -> None:
    path = stored(tmp_path, model_of(CONV, POOL, FLAT, GEMM, shape=("n", 3, 48, SIDE)))
    with pytest.raises(DataError, match=rf"48 x {SIDE} .* square .* export it for {SIDE} x {SIDE}"):
        read_onnx(path, SIDE)


def test_nodes_may_come_in_any_order_and_the_batch_as_minus_one(tmp_path: Path) -> None:
    model = model_of(CONV, POOL, FLAT, GEMM)
    expected = read_onnx(stored(tmp_path, model), SIDE)
    nodes = list(reversed(model.graph.node))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    side(0, -1)(model)
    assert read_onnx(stored(tmp_path, model), SIDE).graph == expected.graph


def test_a_file_for_one_image_is_taken_where_its_network_works_on_several(tmp_path: Path) -> None:
    graphs = [
        read_onnx(
            stored(tmp_path, model_of(CONV, POOL, FLAT, GEMM, shape=(n, 3, SIDE, SIDE))), SIDE
        )
        for n in ("n", 1)
    ]
    assert graphs[0].graph == graphs[1].graph
    inside: Described = ("Reshape", ["g", "alone"], ["p"], {})
    path = stored(tmp_path, model_of(CONV, POOL, inside, GEMM, shape=(1, 3, SIDE, SIDE)))
    with pytest.raises(DataError, match=r"takes 1 image at a time.*dynamic_axes"):
        read_onnx(path, SIDE)


def test_levels_do_not_hang_on_the_names_of_values(tmp_path: Path) -> None:
    pool: Described = ("MaxPool", ["c"], ["m"], {"kernel_shape": [2, 2], "strides": [2, 2]})
    end: Described = ("Relu", ["m"], ["a.pad"], {})
    nodes = [CONV, pool, end, ("GlobalAveragePool", ["a.pad"], ["g"], {}), FLAT, GEMM]
    network = read_onnx(stored(tmp_path, model_of(*nodes)), SIDE).network
    assert FeatureMaps([network], network, torch.rand(4, 3, SIDE, SIDE)).names == ["a.pad Relu"]


def test_the_last_layer_is_the_one_that_is_named(tmp_path: Path) -> None:
    path = stored(tmp_path, model_of(CONV, POOL, FLAT, GEMM))
    assert read_onnx(path, SIDE, "f").weight.shape == (2, 4)
    with pytest.raises(ConfigError, match=r"source\.features = 'head': .* linear layer 'f'"):
        read_onnx(path, SIDE, "head")
    stored(tmp_path, model_of(CONV, POOL, (FLAT[0], ["g"], ["y"], {})))
    assert torch.equal(read_onnx(path, SIDE).weight, torch.eye(4))


def test_a_network_on_disk_calls_nothing_but_arithmetic() -> None:
    rest = {"input": "x", "output": "y", "channels_last": False, "tensors": {}, "norms": []}
    with pytest.raises(DataError, match="unknown operations: from_file"):
        OnnxNetwork(nodes=[["from_file", ["x"], ["y"], {}]], features=3, **rest)  # type: ignore[arg-type]


_opened: list[str] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event == "open":
        _opened.append(str(arguments[0]))


sys.addaudithook(_note)


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_damaged_files_are_refused_and_nothing_else_is_read(count: int, tmp_path: Path) -> None:
    global _opened
    from tests.faults.mutating import mutate

    constant = broken("constant").SerializeToString()
    path = stored(tmp_path, model_of(
        CONV, ("Clip", ["c", "low", "high"], ["d"], {}), ("Pad", ["d", "pads"], ["e"], {}),
        ("ReduceMean", ["e"], ["p"], {"axes": [2, 3], "keepdims": 0}), GEMM,
    ))  # fmt: skip
    clipped = path.read_bytes()
    read_onnx(path, SIDE)  # what is loaded once is loaded now
    refused = 0
    for number in range(count):
        chance = random.Random(number)
        path.write_bytes(mutate(constant if number % 5 == 0 else clipped, chance))
        _opened = []
        try:
            read_onnx(path, SIDE)
        except DataError:
            refused += 1
        finally:
            opened, _opened = _opened, None
        assert set(opened) <= {str(path)}
    assert refused > count // 4


ATTENTION = """
import torch
from sfkt_cli.models.graph_files import Half, to_onnx
from sfkt_cli.models.onnx_files import open_session

class Attention(torch.nn.MultiheadAttention):
    def forward(self, words):
        return super().forward(words, words, words, need_weights=False)[0]

words = torch.rand(2, 5, 16)
network = Half(Attention(16, 2, batch_first=True)).eval()
content = to_onnx(network, words, {}, outputs=["words"])
(found,) = open_session(content).run(None, {"images": words.numpy()})
torch.testing.assert_close(torch.from_numpy(found), network(words), atol=1e-2, rtol=0.0)
"""


def test_attention_in_float16_does_not_crash_onnxruntime() -> None:
    pytest.importorskip("onnxscript")
    subprocess.run([sys.executable, "-W", "ignore", "-c", ATTENTION], check=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TRANSLATORS)
def test_every_translator_is_exported_in_float16(name: str) -> None:
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"codes": 8} if name == "vqgan" else {}
    translator = make_translator(name, channels=1, width=4, **sizes)
    model = Classifier(
        backbone="small", classes=3, width=4, bottleneck=0, mean=(0.5,) * 3, std=(0.2,) * 3
    )
    encoding = Encoding("linear", 0, 65535, 1, False)
    graph = for_export(SensorGraph(model, encoding, translator=translator))
    images = torch.randint(0, 65536, (2, SIDE, SIDE)).to(torch.uint16)
    found = open_onnx(to_onnx(halved(graph), images, {}))(images)
    torch.testing.assert_close(found, graph(images)[1], atol=0.05, rtol=0.0)


@pytest.mark.parametrize("equal", [False, True], ids=["own biases", "equal biases, stored once"])
def test_corrected_biases_keep_the_mean_of_every_channel(
    equal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)

    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(
                nn.Conv2d(1, 16, 3), nn.ReLU6(), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU6(),
                nn.Conv2d(16, 8, 1, groups=2), nn.Flatten(), nn.Linear(8 * 4 * 4, 5),
            )  # fmt: skip
            if equal:
                for values in self.model.parameters():
                    if values.shape == (16,):  # the biases of two convolutions
                        nn.init.constant_(values, 0.1)

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.model(images.float().unsqueeze(1) / 255)
            return logits, logits

    images = torch.randint(0, 256, (64, 8, 8), dtype=torch.uint8)
    content = to_onnx(Graph().eval(), images, {}, any_batch=True)
    expected = open_onnx(content)(images).mean(0)

    def error() -> float:
        found = open_onnx(to_int8(content, lambda: [images]))(images).mean(0)
        return float((found - expected).abs().mean())

    corrected = error()
    monkeypatch.setattr(graph_files, "_correct_biases", lambda *_: None)
    assert corrected < 0.7 * error()
