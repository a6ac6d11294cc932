"""Networks without a name: trusted or refused, written down, the same as where they came from."""

from __future__ import annotations

import contextlib
import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfkt_cli.config import Config, build
from sfkt_cli.errors import ConfigError, DataError
from sfkt_cli.models.classifier import Classifier
from sfkt_cli.models.importing import import_source
from sfkt_cli.models.programs import Program
from sfkt_cli.models.recording import record
from sfkt_cli.models.saving import load_model, save_model

CLASSES = ["box", "cone", "sphere"]
SIDE = 16
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


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
        seen = F.relu(self.norm(self.conv(images)), inplace=True)
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


def write(kind: str, path: Path) -> None:
    network, images = small(), torch.rand(2, 3, SIDE, SIDE)
    if kind == "pickle":
        torch.save(network, path)
    elif kind == "traced":
        torch.jit.save(torch.jit.trace(network, images), path)  # type: ignore[no-untyped-call]
    elif kind == "scripted":
        torch.jit.save(torch.jit.script(network), path)
    else:
        shapes = ({0: torch.export.Dim("batch", min=1)},)
        if kind == "pt2":
            torch.export.save(torch.export.export(network, (images,), dynamic_shapes=shapes), path)
        else:
            with contextlib.redirect_stdout(io.StringIO()):
                torch.onnx.export(
                    network, (images,), path, dynamo=True, external_data=False,
                    dynamic_shapes=shapes, verbose=False,
                )  # fmt: skip


SUFFIXES = {"pickle": ".pkl", "traced": ".pt", "scripted": ".pts", "pt2": ".pt2", "onnx": ".onnx"}


def settings(path: Path, **source: Any) -> Config:
    return build({"source": {"checkpoint": str(path), **PLAIN, **source}})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.slow) if kind == "onnx" else kind for kind in SUFFIXES],
)
def test_a_program_is_written_down_and_stays_the_same(kind: str, tmp_path: Path) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxscript")
    path = tmp_path / f"model{SUFFIXES[kind]}"
    write(kind, path)
    config = settings(path)
    if kind != "onnx":
        with pytest.raises(DataError, match=r"can run any code.*--trust"):
            import_source(config, CLASSES, size=SIDE)
    brought = import_source(config, CLASSES, size=SIDE, trust=kind != "onnx")
    save_model(
        tmp_path / "source", brought.model, kind="classifier", architecture=brought.architecture,
        classes=brought.classes, encoding=None, inputs={}, seed=0,
    )  # fmt: skip
    path.unlink()
    model = load_model(tmp_path / "source").module
    assert isinstance(model, Classifier)
    images = torch.rand(5, 3, SIDE, SIDE)
    features, logits = model(images)
    torch.testing.assert_close(logits, small()(images), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.head(features), logits)
    assert features.shape == (5, 8)
    student = copy.deepcopy(model).requires_grad_(True).train()
    before = student(images)[1]
    before.sum().backward()
    grads = [parameter.grad for parameter in student.parameters()]
    assert all(grad is not None and torch.isfinite(grad).all() for grad in grads)
    norms = [layer for layer in student.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert len(norms) == (0 if kind == "onnx" else 1)  # ONNX files hold it folded or as numbers
    if kind == "pickle":
        assert_exportable(model, images)


def assert_exportable(model: nn.Module, images: Tensor) -> None:
    logits = model(images)[1]
    again = torch.export.export(model, (images[:2],), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.testing.assert_close(again.module()(images)[1], logits, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def onnx_bytes() -> Any:
    """A function from nodes to the content of a file with weights w (4, 3, 3, 3) and f (2, 4)."""
    onnx = pytest.importorskip("onnx")

    def make(*nodes: Any, **more: Any) -> bytes:
        helper, number = onnx.helper, onnx.TensorProto.FLOAT
        torch.manual_seed(0)
        weights = {"w": torch.randn(4, 3, 3, 3), "f": torch.randn(2, 4), "b": torch.randn(2)}
        graph = helper.make_graph(
            [helper.make_node(kind, given, out, **rest) for kind, given, out, rest in nodes],
            "classifier",
            [helper.make_tensor_value_info("x", number, more.get("shape", ["n", 3, SIDE, SIDE]))],
            [helper.make_tensor_value_info("y", number, ["n", 2])],
            [onnx.numpy_helper.from_array(each.numpy(), name) for name, each in weights.items()],
        )
        content: bytes = helper.make_model(graph).SerializeToString()
        return content

    return make


TAIL = [
    ("Relu", ["c"], ["r"], {}),
    ("GlobalAveragePool", ["r"], ["g"], {}),
    ("Flatten", ["g"], ["p"], {}),
    ("Gemm", ["p", "f", "b"], ["z"], {"transB": 1}),
    ("Softmax", ["z"], ["y"], {}),
]


@pytest.mark.parametrize("layout", ["channels first", "channels last"])
def test_an_onnx_file_gives_what_onnxruntime_gives(
    layout: str, onnx_bytes: Any, tmp_path: Path
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    conv = ("Conv", ["t", "w"], ["c"], {"strides": [2, 2], "auto_pad": "SAME_UPPER"})
    if layout == "channels last":
        turn = ("Transpose", ["x"], ["t"], {"perm": [0, 3, 1, 2]})
        content = onnx_bytes(turn, conv, *TAIL, shape=["n", SIDE, SIDE, 3])
    else:
        content = onnx_bytes(("Identity", ["x"], ["t"], {}), conv, *TAIL)
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    brought = import_source(settings(path), ["box", "cone"], size=SIDE)
    images = torch.rand(5, 3, SIDE, SIDE)
    features, logits = brought.model(images)
    given = images.permute(0, 2, 3, 1) if layout == "channels last" else images
    (expected,) = onnxruntime.InferenceSession(content).run(None, {"x": given.numpy()})
    torch.testing.assert_close(logits.softmax(1), torch.from_numpy(expected))
    assert features.shape == (5, 4)
    brought.model.train()(images)[1].sum().backward()
    assert all(each.grad is not None for each in brought.model.parameters())


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
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".pkl", ".pt2", ".safetensors", ".onnx"])
@pytest.mark.parametrize("kind", ["pickle", "script"])
def test_planted_code_does_not_run_without_trust(kind: str, suffix: str, tmp_path: Path) -> None:
    trace, path = tmp_path / "trace", tmp_path / f"model{suffix}"
    planted = Planted(str(trace))
    if kind == "pickle":
        torch.save({"state_dict": planted}, path)
    else:
        torch.jit.save(torch.jit.script(planted), path)
    with pytest.raises(DataError, match=path.name):
        import_source(settings(path), CLASSES, size=SIDE)
    assert not trace.exists()


def test_code_of_an_exported_program_does_not_run_without_trust(tmp_path: Path) -> None:
    """Its archive holds pickles; one that is planted stays unread."""
    import zipfile

    trace, path, whole = (tmp_path / name for name in ("trace", "model.pt2", "whole.pt2"))
    write("pt2", whole)
    planted = io.BytesIO()
    torch.save(Planted(str(trace)), planted)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            is_pickle = name.endswith((".pt", ".pkl"))
            new.writestr(name, planted.getvalue() if is_pickle else old.read(name))
    with pytest.raises(DataError, match=r"an exported program.*--trust"):
        import_source(settings(path), CLASSES, size=SIDE)
    assert not trace.exists()


def test_a_program_on_disk_calls_nothing_but_arithmetic() -> None:
    program = {"output": {"step": 0}, "tensors": {}, "norms": {}, "features": 3}
    for name in ("from_file.default", "save.default", "__import__.default"):
        with pytest.raises(DataError, match="is not allowed"):
            Program(steps=[[name, ["trace", True, 4], {}]], **program)  # type: ignore[arg-type]


def test_what_cannot_be_written_down_is_refused() -> None:
    class Branching(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            pooled = images.mean((2, 3))
            return -pooled if len(images) > 3 else pooled

    class Fixed(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.view(2, 3, SIDE, SIDE).mean((2, 3))

    class Map(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images

    with pytest.raises(DataError, match="branch on what is in the images"):
        record(Branching(), SIDE, "branching")
    with pytest.raises(DataError, match="does not take 3 RGB images"):
        record(Fixed(), SIDE, "fixed")
    with pytest.raises(DataError, match="no classifier"):
        record(Map(), SIDE, "map")
    with pytest.raises(ConfigError, match=r"source\.features = 'head': small ends in .* 'fc'"):
        record(small(), SIDE, "small", "head")


def test_a_network_without_a_linear_end_gets_the_identity() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    program, _, weight, bias = record(network, SIDE, "all convolutions")
    assert program["features"] == 4
    assert torch.equal(weight, torch.eye(4))
    assert torch.equal(bias, torch.zeros(4))
    ended = nn.Sequential(network, nn.Linear(4, 2), nn.Softmax(1)).eval()
    program, _, weight, _ = record(ended, SIDE, "probabilities")
    assert weight.shape == (2, 4)
