"""A source model that the user brings: weights with the name of their architecture, or ONNX.

Features are what enters the last linear layer, which becomes the head. Nothing is loaded that
could run code.
"""

import ast
import contextlib
import json
import pickle
import re
import unicodedata
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch
import torch
from torch import Tensor

from sfkt_cli.console import warn
from sfkt_cli.errors import ConfigError, DataError, first_line
from sfkt_cli.files import require_file, sha256_file, sha256_json
from sfkt_cli.models.backbones import (
    AS_ONNX,
    IMAGENET,
    SIDE_HEADS,
    card_beside,
    normalisation_beside,
    normalisation_of,
)
from sfkt_cli.models.classifier import Classifier
from sfkt_cli.models.onnx_files import SAVE_WEIGHTS, read_onnx
from sfkt_cli.models.saving import CARD, WEIGHTS, load_model
from sfkt_cli.settings.config import Config, SourceConfig

STATE_DICT_SUFFIXES = (".pth", ".pt", ".pts", ".pt2", ".bin", ".ckpt", ".tar", ".pkl")
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights")
"""Keys under which training scripts put the state dict."""
PREFIXES = re.compile(r"^(module\.|_orig_mod\.)+")
"""What data parallelism and torch.compile put in front of every name."""
NORMALISATION = re.compile(r"(?:^|\.)(?:image_|pixel_)?(mean|std)$")
"""What networks that normalise their images call mean and deviation."""
CLASS_NAMES = ("classes", "class_names", "class_to_idx", "CLASSES", "label_names")
"""Keys under which training scripts, and timm (the last one), put the names of classes."""
COUNTER = "num_batches_tracked"  # of batch norms; old checkpoints have none
PICKLE = b"\x80"  # first byte of every pickle since Python 2.3
_DYNAMIC = "dynamo=True, external_data=False, dynamic_shapes=({0: 'batch'},)"
SCRIPT, PROGRAM = "a TorchScript program", "an exported program"
PICKLED = "a pickle with more than tensors in it"
LOADERS = {
    SCRIPT: (
        "torch.jit.load({0!r}).eval()",
        "input_names=['images'], dynamic_axes={'images': {0: 'batch'}}, dynamo=False",
    ),
    PROGRAM: ("torch.export.load({0!r}).module()", _DYNAMIC),
    PICKLED: ("torch.load({0!r}, weights_only=False).eval()", _DYNAMIC),
}
"""How each kind of file that holds a whole network is loaded, and exported to ONNX."""
OF_DICT = (
    "If it holds a dict, as training scripts write it, take the weights out by their key, such as "
    "state_dict or model: torch.save(torch.load({0!r}, weights_only=False)['state_dict'], "
    "'weights.pth')"
)


@dataclass(frozen=True)
class Imported:
    """A source model that was brought along."""

    model: Classifier  # its outputs are in the order of ``classes``
    architecture: dict[str, Any]  # keyword arguments of :class:`Classifier` that build it again
    classes: list[str]  # the data's class names; the checkpoint's where the data has none
    remarks: tuple[str, ...] = ()  # what the user should know of how it was taken
    pretrained: bool = True  # whether its weights were trained elsewhere, wholly or at first


def digest_of(checkpoint: Path) -> str:
    """SHA-256 of the file of ``source.checkpoint``; raises DataError if there is none.

    Where a config.json beside it says something of it, that counts, too.
    """
    path = checkpoint
    if path.is_dir():
        path = _own_folder(path, "source.checkpoint") / WEIGHTS
    require_file(path, "source.checkpoint")
    digest = sha256_file(path)
    if _is_own(path):
        return digest
    told = [(normalisation_beside(path) or ())[:2], _class_names(card_beside(path))]
    return sha256_json([digest, *told]) if any(told) else digest


def _is_own(path: Path) -> bool:
    """Whether this is a model of ``sfkt source``, or a folder, which must hold one."""
    return path.is_dir() or (path.name == WEIGHTS and path.with_name(CARD).is_file())


def import_source(config: Config, classes: Sequence[str], *, size: int = 224) -> Imported:
    """Load the model of ``source.checkpoint`` for these classes (empty if the data has none).

    ``size`` is the side of the images in pixels; the graph of an ONNX file is settled for it.

    Raises:
        ConfigError: Architecture, checkpoint and classes do not fit each other.
        DataError: The file is missing, damaged, or could run code.
    """
    path = config.source.checkpoint
    if path is None:
        raise ConfigError("source.checkpoint is not set")
    if _is_own(path):
        folder = path if path.is_dir() else path.parent
        brought = own_model(folder, "source.checkpoint")
        _refuse_unused(config.source, folder, brought)
    elif path.suffix.lower() == ".onnx":
        brought = _from_onnx(config.source, path, size)
    else:
        brought = _from_weights(config.source, path)
    if brought.architecture.get("classes") == 1 and len(brought.classes) != 1:
        brought = _of_one_logit(brought)
    outputs = _outputs(config.source, path, brought, classes)
    order = list(classes) or outputs
    rows = [outputs.index(name) for name in order]
    for value in brought.model.head.state_dict().values():  # each has a row for each class
        value.copy_(value[rows])
    remarks = brought.remarks
    if classes and not (brought.classes or config.source.classes):
        remarks += (
            f"its outputs are taken to be {', '.join(classes)}, in the order of the data: if that "
            "of the model is another, set source.classes",
        )
    return replace(brought, model=brought.model.eval(), classes=order, remarks=remarks)


def _of_one_logit(brought: Imported) -> Imported:
    """The same with logits 0 and z in place of z alone: their softmax is its sigmoid."""
    model, single = brought.model, brought.model.head.state_dict()
    model.head = torch.nn.Linear(model.feature_size, 2)
    double = {n: torch.cat([torch.zeros_like(value), value]) for n, value in single.items()}
    model.head.load_state_dict(double)
    remark = "its one output is taken for the logit of the second of two classes"
    architecture = {**brought.architecture, "classes": 2}
    return replace(brought, architecture=architecture, remarks=(*brought.remarks, remark))


def _own_folder(path: Path, setting: str) -> Path:
    """Where a model of ``sfkt source`` lies: in this folder, or in that of a run."""
    for folder in (path, path / "source"):
        if (folder / CARD).is_file():
            return folder
    raise ConfigError(
        f"{setting}: {path} holds no model of `sfkt source` (no {CARD}): run that first, or "
        "give source.checkpoint the file of weights itself, and its network as source.backbone"
    )


def own_model(folder: Path, setting: str) -> Imported:
    """A model of ``sfkt source``; raises ConfigError, which names the setting, if it is another."""
    saved = load_model(_own_folder(folder, setting))
    if not isinstance(saved.module, Classifier) or saved.card.encoding is not None:
        raise ConfigError(f"{setting}: {folder} holds no RGB classifier")
    architecture = dict(saved.card.architecture)
    return Imported(saved.module, architecture, saved.card.classes, (), saved.card.pretrained)


def _refuse_unused(settings: SourceConfig, folder: Path, brought: Imported) -> None:
    """Refuse settings that say something else than a model of sfkt says of itself."""
    unnamed = brought.classes == _unnamed(len(brought.classes))  # these may get names here
    facts = {
        **brought.architecture,
        "features": brought.architecture.get("layer"),
        "classes": settings.classes if unnamed else brought.classes,
    }
    for name in ("backbone", "mean", "std", "channel_order", "features", "classes"):
        value, usual = getattr(settings, name), SourceConfig.model_fields[name].default
        own = tuple(facts[name]) if isinstance(facts.get(name), list) else facts.get(name)
        if value not in (own, usual):
            raise ConfigError(
                f"source.{name} = {value!r}: {folder} is a model of sfkt, which keeps its own, "
                f"{own!r}: leave source.{name} out, or --set 'source.{name}={json.dumps(usual)}'"
            )


def _unnamed(count: int) -> list[str]:
    return [f"class-{index}" for index in range(count)]


def _from_onnx(settings: SourceConfig, path: Path, size: int) -> Imported:
    """A network without a name: its operations are kept, and the file is not needed again."""
    onnx_model = read_onnx(path, size, settings.features)
    if onnx_model.normalises and not (settings.mean and settings.std):
        raise ConfigError(
            f"{path} normalises its images itself: say what is still to be done in front of it, by "
            "source.mean and source.std (mean and std of import_model): for a network that takes "
            "0..1, --set 'source.mean=[0, 0, 0]' --set 'source.std=[1, 1, 1]'; for one that takes "
            "0..255, the same mean and 'source.std=[0.003922, 0.003922, 0.003922]'; for one of "
            f"torchvision with transform_input, {IMAGENET[0]} and {IMAGENET[1]}"
        )
    count = len(onnx_model.weight)
    names, more = _named(settings, path, _noted_names(onnx_model.facts), count)
    architecture, remark = architecture_of(settings, "onnx", count)
    if f"weights of {settings.backbone}" in remark:
        warn(
            f"{path}: images are normalised as source.backbone = {settings.backbone!r} wants them: "
            "if that is left over from an earlier start, add --set source.backbone=small, or set "
            "source.mean and source.std"
        )
    architecture["graph"] = onnx_model.graph
    model = Classifier(**architecture)
    model.backbone.load_state_dict(onnx_model.network.state_dict())
    model.head.load_state_dict({"weight": onnx_model.weight, "bias": onnx_model.bias})
    operations = (
        f"{path} gives the same as in onnxruntime; {len(onnx_model.graph['nodes'])} operations"
    )
    return Imported(model, architecture, names, (operations, *onnx_model.remarks, *more, remark))


def _from_weights(settings: SourceConfig, path: Path) -> Imported:
    """Weights of the network that ``source.backbone`` names."""
    state, names, others = read_weights(path)
    if {"mean", "std", "head.bias"} <= set(state) and any(n.startswith("backbone.") for n in state):
        raise DataError(f"{path} was written by sfkt, but its {CARD} is not beside it: copy it too")
    architecture, remark = architecture_of(settings, settings.backbone, 1)
    if settings.features:
        architecture["layer"] = settings.features
    model = Classifier(**architecture)
    expected = model.backbone.state_dict()
    state, features, remarks = _named_as(path, expected, state, settings.features)
    state = {name: v for name, v in state.items() if name.partition(".")[0] not in SIDE_HEADS}
    head = features or _find_head(path, state, model, settings.backbone)
    if getattr(state.get(f"{head}.weight"), "ndim", 0) < 2:
        linear = [name.removesuffix(".weight") for name, v in state.items() if v.ndim == 2]
        raise ConfigError(
            f"source.features = {head!r}: {path} holds no linear layer of this name; its last are "
            f"{', '.join(linear[-4:]) or 'none'}"
        )
    state[f"{head}.weight"] = state[f"{head}.weight"].flatten(1)  # some heads are 1x1 convolutions
    architecture["classes"] = count = len(state[f"{head}.weight"])
    remarks += _fill(path, model, state, head, settings)
    names, more = _named(settings, path, names, count)
    return Imported(model, architecture, names, (*others, *remarks, *more, remark))


def _named(
    settings: SourceConfig, path: Path, names: list[str], count: int
) -> tuple[list[str], list[str]]:
    """Names of so many outputs, those in the file or in a config.json beside it, and a remark."""
    if not names:
        names, path = _class_names(card_beside(path)), path.with_name("config.json")
    if len(set(names)) != max(count, 2):
        return [], []
    if settings.classes and names != list(settings.classes):
        return [], [f"source.classes wins over the names in {path}: {', '.join(names)}"]
    return names, [] if settings.classes else [f"{path} names its outputs: {', '.join(names)}"]


def _noted_names(facts: Mapping[str, str]) -> list[str]:
    """Class names in the notes of an ONNX file: a list, or names by index as of ultralytics."""
    with contextlib.suppress(SyntaxError, TypeError, ValueError, MemoryError, RecursionError):
        return _class_names(
            {"classes": ast.literal_eval(facts.get("names") or facts.get("classes", ""))}
        )
    return []


def architecture_of(
    settings: SourceConfig, backbone: str, classes: int, bottleneck: int = 0
) -> tuple[dict[str, Any], str]:
    """Arguments of a :class:`Classifier`, and a remark on its normalisation."""
    mean, std, origin = normalisation_of(settings)
    numbers = (", ".join(f"{value:.3g}" for value in values) for values in (mean, std))
    remark = "images are normalised with mean ({}), std ({}): {}".format(*numbers, origin)
    return {
        "backbone": backbone,
        "classes": classes,
        "width": settings.width,
        "bottleneck": bottleneck,
        "mean": mean,
        "std": std,
        "channel_order": settings.channel_order,
    }, remark


def _named_as(
    path: Path, expected: Mapping[str, Tensor], state: dict[str, Tensor], features: str
) -> tuple[dict[str, Tensor], str, list[str]]:
    """Take off what a wrapper, such as a Lightning module, put in front of the backbone's names.

    Of several copies, such as a running average, that one is taken of which ``features`` names a
    layer. Returns the weights, ``features`` in their names, and remarks.
    """
    required = [name for name in expected if not name.endswith(COUNTER)]
    key = max(required, key=len, default="")
    fitting = [
        prefix
        for prefix in (name.removesuffix(key) for name in state if name.endswith(f".{key}"))
        if all(f"{prefix}{name}" in state for name in required)
    ]
    chosen = sorted((prefix for prefix in fitting if features.startswith(prefix)), key=len)[-1:]
    if not chosen and (not fitting or any(name in state for name in required)):
        return state, features, []
    prefix, *more = chosen or fitting
    own = {n.removeprefix(prefix): value for n, value in state.items() if n.startswith(prefix)}
    others = {name: value for name, value in state.items() if not name.startswith(prefix)}
    if more or (not chosen and own.keys() & others.keys()):
        raise ConfigError(
            f"{path} holds weights of the same names behind {', '.join(map(repr, fitting))}"
            f"{'' if more else ' and without it'}: set source.features to the whole name of the "
            f"last linear layer of one network, or save the weights of one alone: {SAVE_WEIGHTS}"
        )
    remark = f"names of the weights begin with {prefix!r}, which is removed"
    return {**others, **own}, features.removeprefix(prefix), [remark]


def _find_head(path: Path, state: Mapping[str, Tensor], model: Classifier, backbone: str) -> str:
    """Name of the checkpoint's linear layer that takes the backbone's output."""
    features = model.feature_size
    expected = model.backbone.state_dict()
    heads = [
        name.removesuffix(".weight")
        for name, value in state.items()
        if name not in expected
        and name.endswith(".weight")
        and value.ndim > 1
        and value.shape[1] == features == value[0].numel()
    ]
    if len(heads) > 1:  # a loss may keep a vector for each class, but seldom a bias
        heads = [name for name in heads if f"{name}.bias" in state] or heads
    if len(heads) != 1:
        linear = [
            f"{name.removesuffix('.weight')} with {value.shape[1]}"
            for name, value in state.items()
            if name.endswith(".weight") and value.ndim == 2
        ]
        hint = "which architecture is it?"
        if heads:
            own = {name for name, _ in model.backbone.named_modules() if name}
            parts = [head for head in heads if any(f"{head}.".startswith(f"{n}.") for n in own)]
            hint = f"say which with source.features. If it predicts by several, {AS_ONNX}"
            if len(parts) > 1:  # of two in the network, neither can be left out
                hint = AS_ONNX
        raise ConfigError(
            f"{path} does not fit source.backbone = {backbone!r}: its last layer should be linear "
            f"with {features} inputs, found {', '.join(heads or linear[-1:]) or 'none'}; {hint}"
        )
    return heads[0]


def _outputs(
    settings: SourceConfig, path: Path, brought: Imported, classes: Sequence[str]
) -> list[str]:
    """Class names in the order of the checkpoint's outputs."""
    count = int(brought.architecture.get("classes", len(brought.classes)))
    named = list(settings.classes or brought.classes)
    if named != brought.classes and sorted(named) == sorted(brought.classes):
        raise ConfigError(
            f"source.classes names {', '.join(named)}, but {path} names its outputs "
            f"{', '.join(brought.classes)}, in this order: leave source.classes out"
        )
    if named and len(named) != count:
        raise ConfigError(
            f"{path} has {count} outputs, source.classes names {len(named)} classes: name all"
        )
    names = named or list(classes) or _unnamed(count)
    if len(set(names)) != len(names):
        raise ConfigError("source.classes names a class twice")
    if len(names) != count or (classes and set(names) != set(classes)):
        missing = [name for name in classes if name not in names]
        extra = [name for name in names if name not in classes]
        detail = "".join(
            f"; {where}: {', '.join(differing[:8])}"
            for where, differing in (("only in the data", missing), ("only in the model", extra))
            if differing
        )
        raise ConfigError(
            f"{path}: the checkpoint has {count} classes, the data {len(classes)}{detail}. "
            "Name the model's classes with source.classes, in its order. If it knows more than you "
            "recorded, prepare the data again with all of them: "
            "--set 'classes.tr=[...]' --set 'source.classes=[...]' --force"
        )
    return names


def _fill(
    path: Path, model: Classifier, state: Mapping[str, Tensor], head: str, settings: SourceConfig
) -> list[str]:
    """Put a checkpoint's tensors into a model; remarks tell which are no part of it.

    Beside a whole network, a loss's own weights and means of the weights may be left out. What
    takes part in the predictions may not: more layers at the head, norms of features, other heads.
    """
    weight, parent, backbone = state[f"{head}.weight"], head.rpartition(".")[0], settings.backbone
    remarks = [] if f"{head}.bias" in state else [f"{head} has no bias in {path}: it is taken as 0"]
    of_head = {f"{head}.weight": weight, f"{head}.bias": torch.zeros(len(weight))}
    state = {**of_head, **state}
    expected = {**model.backbone.state_dict(), **of_head}
    rest = [name for name in state if name not in expected]
    # Where its heads were, it has nn.Identity. The network itself has no name.
    own = {name for name, _ in model.backbone.named_modules() if name}
    networks = {name.partition(".")[0] for name in rest if state[name].ndim > 1}

    def takes_part(name: str) -> bool:
        if not state[name].is_floating_point():  # an index, which says where a table is read
            return False
        layer, _, kind = name.rpartition(".")
        after_head = kind == "weight" and state[name].shape[1:] == (len(weight),)
        of_features = state[name].shape == weight.shape[1:]
        norm = of_features and name.partition(".")[0] not in networks  # not of one on the side
        return after_head or norm or layer in own or bool(parent and name.startswith(f"{parent}."))

    layers = {name: name.rpartition(".")[0] for name in rest if takes_part(name)}
    behind = list({name if layer in (head, "") else layer: None for name, layer in layers.items()})
    if behind:
        raise ConfigError(
            f"{path}: beside {head} it holds {', '.join(behind[:4])}, which source.backbone = "
            f"{backbone!r} does not have in front of or beside its one last linear layer: {AS_ONNX}"
        )
    _refuse_normalisation(path, model, {name: state[name] for name in rest}, settings)
    missing = [name for name in expected if name not in state and not name.endswith(COUNTER)]
    wrong = [
        f"{name} has shape {tuple(state[name].shape)} and not {tuple(value.shape)}"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    wrong += [f"{name} is missing" for name in missing]
    wrong += [f"{name} is unknown" for name in rest if missing]
    if wrong:
        of_places = all("pos_emb" in line or "position" in line for line in wrong)
        hint = f"For another image size, {AS_ONNX}" if of_places else "Which architecture is it?"
        raise ConfigError(
            f"{path} does not fit source.backbone = {backbone!r} in {len(wrong)} tensors: "
            f"{'; '.join(sorted(wrong)[:4])}. {hint}"
        )
    model.backbone.load_state_dict(state, strict=False)
    model.head = torch.nn.Linear(weight.shape[1], len(weight))
    model.head.load_state_dict({name.rpartition(".")[2]: state[name] for name in of_head})
    more = f" and {len(rest) - 6} more" if len(rest) > 6 else ""
    if rest:
        remarks.append(f"left out of {path}, no part of {backbone}: {', '.join(rest[:6])}{more}")
    return remarks


def _refuse_normalisation(
    path: Path, model: Classifier, rest: Mapping[str, Tensor], settings: SourceConfig
) -> None:
    """Refuse to leave out a mean and deviation of images that are not those to be used."""
    own = {
        name: (match[1], value.flatten().float())
        for name, value in rest.items()
        if (match := NORMALISATION.search(name)) and value.numel() == 3
    }
    alike = (
        torch.allclose(getattr(model, kind).flatten(), value, atol=1e-3)
        for kind, value in own.values()
    )
    if not (settings.mean and settings.std) and not all(alike):
        values = (f"{n} = {[round(x, 6) for x in v.tolist()]}" for n, (_, v) in own.items())
        raise ConfigError(
            f"{path} holds a normalisation, {', '.join(values)}, which would be left out: set "
            "source.mean and source.std to what the network was trained with"
        )


def read_weights(path: Path) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """The tensors of a .safetensors file or of a state dict, by their plain names.

    Floats become float32. Behind the tensors come the class names that the file holds, if any, and
    remarks on other weights in it.

    Raises:
        DataError: The file is missing or damaged, holds a whole network instead of tensors, or has
            values that are not finite.
    """
    require_file(path, "source.checkpoint")
    classes: list[str] = []
    remarks: list[str] = []
    if path.suffix.lower() == ".safetensors":
        content = path.read_bytes()  # safetensors itself opens no name that is not UTF-8
        try:
            tensors = safetensors.torch.load(content)
        except Exception as error:  # damaged ones raise almost anything, such as KeyError
            raise DataError(f"{path} is not an intact .safetensors file: {error}") from None
    elif path.suffix.lower() in STATE_DICT_SUFFIXES:
        tensors, classes, remarks = _unwrap(path, _read_torch(path))
    else:
        raise DataError(
            f"{path} is not a file of weights: expected .safetensors, or a state dict in "
            f"{', '.join(STATE_DICT_SUFFIXES)}; a network of Keras or TensorFlow as .onnx, which "
            "tf2onnx makes of it"
        )
    for name, value in tensors.items():
        odd = value.is_quantized or value.is_meta or value.is_complex()
        if odd or value.layout != torch.strided:
            raise DataError(
                f"{path}: {name} is sparse, quantised, complex or without values: save plain "
                f"float32 weights with {SAVE_WEIGHTS}"
            )
    short = {name: PREFIXES.sub("", name) for name in tensors}
    if len(set(short.values())) < len(short):  # two networks: which one counts is settled later
        short = {name: name for name in tensors}
    plain = {
        short[name]: value.float() if value.is_floating_point() else value
        for name, value in tensors.items()
    }
    for name, value in plain.items():
        if not torch.isfinite(value).all():
            raise DataError(f"{path}: {name} has values that are not finite: the model is broken")
    return plain, classes, remarks


def _refuse_network(path: Path, kind: str) -> NoReturn:
    """Refuse a file that holds a whole network, with the three lines that make ONNX of it."""
    load, shape = LOADERS[kind]
    raise DataError(
        f"{path} is {kind}, and loading one can run any code. Turn it into ONNX where you trust it "
        "(S is the side of its images in pixels), then give that file:\n"
        "  import torch\n"
        f"  model = {load.format(path.name)}\n"
        f"  torch.onnx.export(model, (torch.rand(2, 3, S, S),), {path.stem + '.onnx'!r}, {shape})\n"
        f"Or take its weights alone, {SAVE_WEIGHTS}, and name the network with source.backbone"
        + (f"\n{OF_DICT.format(path.name)}" if kind == PICKLED else "")
    )


def _read_torch(path: Path) -> Any:
    try:
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            with zipfile.ZipFile(path) as file:
                inside = [name.partition("/")[2] for name in file.namelist()]
            if any(name.startswith(("code/", "constants.pkl")) for name in inside):
                _refuse_network(path, SCRIPT)
            if any(name.startswith(("models/", "archive_format")) for name in inside):
                _refuse_network(path, PROGRAM)
        return torch.load(path, map_location="cpu", weights_only=True)
    except DataError:
        raise
    except pickle.UnpicklingError:
        if is_zip or path.read_bytes()[:1] == PICKLE:
            _refuse_network(path, PICKLED)
        raise DataError(
            f"{path} cannot be read: it is not a file of weights; write one with {SAVE_WEIGHTS}"
        ) from None
    except Exception as error:  # damaged archives raise almost anything, such as zlib.error
        raise DataError(f"{path} cannot be read as a state dict: {first_line(error)}") from None


def _unwrap(path: Path, loaded: Any) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Find the state dict and class names in what a training script saved.

    Where there are averaged weights, too, those that were trained are taken; a remark names others.
    """
    classes: list[str] = []
    remarks: list[str] = []
    for _ in range(3):
        if not isinstance(loaded, Mapping):
            break
        classes = classes or _class_names(loaded)
        tensors = {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}
        inner = [key for key in WRAPPERS if isinstance(loaded.get(key), Mapping)]
        if tensors and not inner:
            return tensors, classes, remarks
        inner += [key for key, part in loaded.items() if key not in inner and _is_state(part)]
        if not inner:
            break
        names = ", ".join(map(repr, inner))
        if len(inner) > 1:
            if inner[0] not in WRAPPERS:
                raise DataError(
                    f"{path} holds the weights of several networks, {names}: save those of one, "
                    f"torch.save(torch.load({path.name!r})[{inner[0]!r}], 'weights.pth')"
                )
            remarks.append(
                f"{path} holds several weights, {names}: {inner[0]!r} are taken; for others, "
                f"torch.save(torch.load({path.name!r})[{inner[1]!r}], 'weights.pth')"
            )
        loaded = loaded[inner[0]]
    keys = ", ".join(map(str, list(loaded)[:5])) if isinstance(loaded, Mapping) else ""
    raise DataError(
        f"{path} holds no state dict, but a {type(loaded).__name__}{keys and ' with '}{keys}: "
        f"save one with {SAVE_WEIGHTS}"
    )


def _class_names(saved: Mapping[Any, Any]) -> list[str]:
    """Class names beside the weights, or one level below, in the order of the outputs."""
    for part in (saved, *saved.values()):
        for key in CLASS_NAMES if isinstance(part, Mapping) else ():
            names = part.get(key)
            if isinstance(names, Mapping):
                if all(type(index) is int for index in names.values()):
                    names = {index: name for name, index in names.items()}
                if all(type(index) is int for index in names):
                    names = [names[index] for index in sorted(names)]
            if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names):
                return [unicodedata.normalize("NFC", name) for name in names]
    return []


def _is_state(part: Any) -> bool:
    """Whether it consists mainly of tensors, as a state dict does."""
    values = list(part.values()) if isinstance(part, Mapping) else []
    return 2 * sum(isinstance(value, Tensor) for value in values) > len(values)
