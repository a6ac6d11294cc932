"""Every setting and its meaning: the sections, how a configuration is put together, its errors."""

import difflib
import re
import reprlib
import types
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WrapValidator,
    model_validator,
)

from sfkt_cli.errors import ConfigError
from sfkt_cli.files import at_home

DatasetName = Literal[
    "synthetic", "rgb-nir", "nyu-depth", "sun-rgbd", "diml-rgbd", "washington-rgbd", "folders"
]
MethodName = Literal["tgkt", "distill", "shot", "socket", "socket+bridge", "aad", "nrc"]
Modality = Literal["depth", "nir", "thermal", "other"]
EncodingKind = Literal[
    "window", "relative", "colormap", "shading", "normals", "hha", "linear", "standardised"
]
LabelFree = Literal[
    "ti_closeness", "ti_rank", "ti_agreement", "ti_kappa", "tr_information", "tr_density",
    "tr_mirror",
]  # fmt: skip
"""Scores that may choose an epoch, larger is better."""
Sensor = Literal["kv1", "kv2", "realsense", "xtion"]


def current_name(value: Any) -> Any:
    """The name that a value of a setting has now; others are left as they are."""
    return "standardised" if value == "percentile" else value


def _not_empty(path: Any) -> Any:
    if path == "":
        raise ValueError("the path is empty: give one, or null")
    return path


ClassName = Annotated[str, AfterValidator(lambda name: unicodedata.normalize("NFC", name))]
"""An umlaut is one letter, as in the names of readers; some systems write two."""
UserPath = Annotated[Path, BeforeValidator(_not_empty), AfterValidator(at_home)]
"""``~`` is the home folder, as in a shell; an empty text is no path."""
Positive = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Epochs = Annotated[int, Field(ge=1, le=100_000)]
USUAL_BATCH_SIZE = 64
PRETRAINED_RATES = 0.01, 0.1
"""Learning rate, and the backbone's share of it, that keep what was learned elsewhere (SHOT)."""
SHARE_WITHOUT_BOTTLENECK = 0.3
"""The backbone's share if there is no bottleneck that learns at the full rate (ours)."""


class Section(BaseModel):
    """Settings that belong together: no unknown ones, none that changes, a meaning under each."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ClassesConfig(Section):
    """Which classes are task-relevant (TR) and which only give pairs (TI); wildcards work."""

    tr: tuple[ClassName, ...] = ()
    """Classes to recognise, in this order; empty: the data set's usual classes."""
    ti: tuple[ClassName, ...] = ()
    """Classes whose pairs are task-irrelevant; empty: all others if classes.tr is given, else the
    data set's usual classes."""


class SplitConfig(Section):
    """How the task-relevant images are divided."""

    protocol: Literal["disjoint", "paper"] = "disjoint"
    """disjoint: source, target and test share no group. paper: source and target are the same
    scenes, and accuracy is measured on the target training images, as in SOCKET and the paper."""
    source: Fraction = 0.4
    """Share of the TR groups whose RGB images train the source model (disjoint)."""
    test: Fraction = 0.2
    """Share of the TR groups that are held out for the test; the rest are the target images."""

    @model_validator(mode="after")
    def _leaves_target_images(self) -> Self:
        if self.source + self.test >= 1:
            raise ValueError("source + test must be below 1: the rest are the target images")
        return self


class PrepareConfig(Section):
    """Where the archive is and how it is read."""

    root: UserPath | None = None
    """Folder, zip file or .mat file of the archive (flag --root)."""
    workers: int = Field(0, ge=0, le=256)
    """Number of processes that decode and resize; 0: one for each core."""
    fit: Literal["crop", "squash"] = "crop"
    """crop: keep the middle square. squash: keep the whole image and change its proportions."""
    max_pixels: int = Field(100_000_000, ge=1)
    """Images of more pixels are refused (decompression bombs)."""


class SyntheticConfig(Section):
    """The rendered data set of simple solids."""

    pairs: int = Field(8000, ge=60, le=100_000)
    """RGB-D pairs in all, TR and TI."""
    ti_share: float = Field(0.4, gt=0, lt=1)
    """Share of the pairs that are task-irrelevant."""


class NyuDepthConfig(Section):
    """NYU Depth v2, the labelled part."""

    depth: Literal["raw", "filled"] = "raw"
    """raw: sensor depth with its holes. filled: in-painted."""
    split: Literal["scene", "official"] = "scene"
    """scene: divided by physical scene. official: the test images of splits.mat are held out."""


class SunRgbdConfig(Section):
    """SUN RGB-D; each sensor is a domain."""

    source_sensor: Sensor = "kv1"
    """Sensor whose RGB images train the source model."""
    target_sensor: Sensor = "kv2"
    """Sensor whose depth images are the target images."""
    depth: Literal["depth", "depth_bfx"] = "depth"
    """depth: as recorded. depth_bfx: holes filled."""
    nyu_overlap: bool = True
    """Keep kv1/NYUdata, which is NYU Depth v2."""


class DimlRgbdConfig(Section):
    """DIML RGB-D."""

    resolution: Literal["HR", "LR"] = "LR"
    """Which size of the sample set is read."""
    depth: Literal["filled", "warped"] = "filled"
    """Depth of the full set: filled (up_png) or warped, with its holes (warp_png)."""


class WashingtonRgbdConfig(Section):
    """Washington RGB-D Object, the crops."""

    background: Literal["keep", "remove"] = "keep"
    """remove: outside of the object's mask, depth becomes missing and RGB black."""


class FoldersConfig(Section):
    """Your own data, in folders or listed in a manifest (CSV)."""

    manifest: UserPath | None = None
    """CSV or JSONL with columns rgb, target, label, role, group; relative to the root."""
    modality: Modality = "depth"
    """What the target sensor measures; it selects unit, valid range and default encoding."""
    unit: Literal["auto", "mm", "m", "raw"] = "auto"
    """Unit of stored depth values; auto: integers are millimetres and floats are metres."""
    scale: Positive | None = None
    """Millimetres that a stored 1 stands for, such as 0.2 for TUM's 1/5000 m."""
    missing: tuple[int | float, ...] = ()
    """Values that stand for no reading, such as [65535]; depth becomes 0, others the median."""
    registered: bool = True
    """false: the images of a pair are not aligned, so no loss compares their pixels."""

    @model_validator(mode="after")
    def _depth_alone(self) -> Self:
        for name, given in (("scale", self.scale is not None), ("unit", self.unit in ("mm", "m"))):
            if given and self.modality != "depth":
                raise ValueError(f"{name} is for modality depth: leave it out")
        if self.unit != "auto" and self.scale is not None:
            raise ValueError("unit and scale exclude each other: set one of them")
        return self


class TrainingConfig(Section):
    """Settings that source, bridge and transfer share."""

    min_steps: int = Field(40, ge=1, le=100_000)
    """Smallest number of steps in an epoch, which passes several times over small data sets."""
    shift: float = Field(0.08, ge=0, le=0.5)
    """Largest random shift of the crop, as a share of the image side; the same for a pair."""
    flip: bool = True
    """Mirror images at random, always both images of a pair."""
    ti_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the TI pairs that training uses; the number of steps stays the same."""
    shuffle_pairs: bool = False
    """A check for sceptics: in training, each TI image gets the partner of another pair."""
    select: Literal["auto", "last", LabelFree] = "auto"
    """Label-free score that chooses the epoch that bridge and transfer keep; auto: ti_closeness for
    the bridge, the last epoch for the student."""
    patience: int = Field(0, ge=0, le=100_000)
    """Epochs without a better label-free score (training.select) after which bridge and transfer
    stop; 0: never."""
    clip_norm: Positive | None = None
    """Largest norm of the gradient; null: no clipping."""
    warm_start: UserPath | None = None
    """Folder of a finished run with fewer images. source takes its source model; bridge and
    transfer start from its translator and its student (flag --warm-start)."""


class SourceConfig(Section):
    """The source model: trained here on source.h5, or your own."""

    backbone: str = "small"
    """small (built in), a torchvision classifier by name, or timm:NAME."""
    width: int = Field(16, ge=4, le=512)
    """Channels of the first stage of the built-in backbone."""
    bottleneck: int = Field(256, ge=2, le=4096)
    """Size D of the features between backbone and head."""
    weights: Literal["none", "imagenet"] = "none"
    """imagenet: start from published weights (downloaded by torchvision or timm; those of
    efficientnet_lite0 come with the extra imagenet)."""
    checkpoint: UserPath | None = None
    """Your own classifier, instead of training one: .safetensors, a .pth state dict, .onnx, a
    folder written by sfkt. Other networks: `sfkt_cli.import_model` in Python."""
    mixture: tuple[UserPath, ...] = ()
    """Several source models instead of one: finished runs or their source folders, all with the
    classes of the data. Students learn a weight for each (SOCKET, DECISION)."""
    classes: tuple[ClassName, ...] = ()
    """Class names of the checkpoint, in the order of its outputs; empty: those of the data."""
    features: str = ""
    """Name of the checkpoint's linear layer that takes the features, such as fc; empty: the last
    linear layer."""
    mean: tuple[float, float, float] | None = None
    """Mean that is subtracted from RGB in [0, 1] for the source model; null: that of the published
    weights of the backbone. For a model that takes 0..255, divide mean and std by 255."""
    std: tuple[Positive, Positive, Positive] | None = None
    """Standard deviation by which RGB is divided after that; null: as for mean."""
    channel_order: Literal["rgb", "bgr"] = "rgb"
    """bgr: the checkpoint was trained on BGR images, as OpenCV reads them."""
    epochs: int = Field(25, ge=0, le=100_000)
    """Passes over the source images; 0 keeps random weights (a check for sceptics)."""
    learning_rate: Positive | None = None
    """Learning rate of bottleneck and head at the start; null: 0.01 for published weights, else
    0.05."""
    backbone_rate: Positive | None = None
    """Backbone's share of the learning rate; null: 0.1 for published weights, else 1."""
    weight_decay: Weight = 1e-3
    """L2 penalty of SGD."""
    label_smoothing: Fraction = 0.1
    """Share of each label that the cross-entropy spreads over all classes."""
    color_jitter: Fraction = 0.3
    """Random brightness, contrast and saturation of the source images."""

    def rates(self, *, pretrained: bool) -> tuple[float, float]:
        """Learning rate, backbone's share of it; null: those that fit where training starts."""
        rate, share = PRETRAINED_RATES if pretrained else (0.05, 1.0)
        return self.learning_rate or rate, self.backbone_rate or share

    @property
    def published(self) -> bool:
        """Whether training starts from published weights."""
        return self.weights != "none"

    @property
    def brought(self) -> bool:
        """Whether the source model is the user's own, so that source.h5 is not used."""
        return self.checkpoint is not None or bool(self.mixture)

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if self.mixture and self.checkpoint is not None:
            raise ValueError("mixture and checkpoint exclude each other: set one of them")
        return self


class BridgeConfig(Section):
    """TGMB: the translator from target images to source-like RGB images."""

    translator: Literal["unet", "pointwise", "vqgan"] = "unet"
    """pointwise: that of the paper. unet: the same plus a U-Net. vqgan: a vector-quantised
    autoencoder (section vqgan)."""
    width: int | None = Field(None, ge=2, le=512)
    """Channels of the translator's first layer; null: 24 if the source model is your own or began
    with published weights, else 16."""
    epochs: Epochs = 8
    """Passes over the TI pairs or the target images, whichever are more."""
    learning_rate: Positive = 2e-3
    """Learning rate of Adam at the start."""
    keep_untouched: bool = True
    """Use the encoded images instead of translated ones if the translator does not clearly help the
    target images of held-out TI pairs to find their RGB partners in the source model's features
    (ours)."""
    alpha_rec: Weight = 1.0
    """Weight of L_rec (paper: 1)."""
    rec_loss: Literal["mse", "l1", "ssim"] = "mse"
    """What L_rec measures (paper: mse)."""
    alpha_d: Weight = 0.0
    """Weight of L_D, the domain-adversarial term."""
    d_on: Literal["feature", "image"] = "feature"
    """What the discriminator of L_D sees: the source model's features, or translated images."""
    alpha_im: Weight = 0.15
    """Weight of L_IM, information maximisation on TR (ours). It is divided by the number of passes
    of an epoch over the target images; otherwise L_IM would spread few images over all classes."""
    alpha_f: Weight = 0.3
    """Weight of the source-feature term on TI pairs (ours)."""
    alpha_p: Weight = 0.3
    """Weight of the perceptual term on TI pairs: the source model's feature maps at each resolution
    from a quarter of the side down (ours)."""

    def channels(self, *, pretrained: bool) -> int:
        """Width; null: that behind a source model whose weights were trained elsewhere, or not."""
        return self.width or (24 if pretrained else 16)


class VqganConfig(Section):
    """The translator vqgan; its terms enter L_TGMB."""

    codes: int = Field(256, ge=2, le=65_536)
    """Entries of the codebook (ours)."""
    alpha_commit: Weight = 0.25
    """Weight of the commitment term (VQ-VAE: 0.25)."""
    alpha_patch: Weight = 0.02
    """Weight of the adversarial term on patches of TI images (ours)."""


class TransferConfig(Section):
    """The student for the target sensor, trained by TGKT or one of its peers."""

    method: MethodName = "tgkt"
    """How the student is trained (flag --method). If a run has several students, evaluate, predict
    and export take this one."""
    epochs: Epochs = 12
    """Passes over the TI pairs or the target images, whichever are more."""
    weight_decay: Weight = 1e-3
    """L2 penalty of SGD."""


class OptimiserConfig(Section):
    """How a method trains its student."""

    learning_rate: Positive | None = 0.01
    """Learning rate of the bottleneck at the start (SHOT, SOCKET: 0.01)."""
    backbone_rate: Positive | None = 0.1
    """Backbone's share of the learning rate (SHOT, SOCKET: 0.1)."""
    schedule: Literal["cosine", "inverse"] = "inverse"
    """inverse: (1 + 10 p)^-0.75, p the progress (SHOT, SOCKET). cosine: warm-up, then down to 0."""

    def rates(self, *, pretrained: bool, bottleneck: bool) -> tuple[float, float]:
        """Learning rate, backbone's share of it; null: those that fit where training starts.

        A student without a bottleneck has no new layer that learns at the full rate.
        """
        rate, share = PRETRAINED_RATES if pretrained else (0.03, 1.0)
        if pretrained and not bottleneck:
            share = SHARE_WITHOUT_BOTTLENECK
        return self.learning_rate or rate, self.backbone_rate or share


class DistillConfig(OptimiserConfig):
    """Distillation from the bridge alone."""

    learning_rate: Positive | None = None
    """Highest learning rate of the bottleneck; null: 0.01 if the source model is your own or
    began with published weights (SHOT, SOCKET), else 0.03 (ours)."""
    backbone_rate: Positive | None = None
    """Backbone's share of the learning rate; null: 0.1 in the same cases (0.3 if your model has no
    bottleneck, ours), else 1."""
    schedule: Literal["cosine", "inverse"] = "cosine"
    """cosine: warm-up, then down to 0 (ours). inverse: (1 + 10 p)^-0.75, p the progress."""


class TgktConfig(DistillConfig):
    """Weights of the terms of TGKT, and how far it trusts the bridge."""

    beta_kl: Weight = 1.0
    """Weight of L_KL (paper: 1)."""
    trust: Literal["measured", "full"] = "measured"
    """measured: L_KL is multiplied by a trust from 0 to 1. The bridge is trusted if target
    images of TI pairs clearly find their RGB partners better behind it than in the student, and
    until the student finds them better. The trust also falls linearly to 0 at the end (ours).
    full: the trust is 1, as in the paper."""
    beta_f: Weight = 3.0
    """Weight of L_f, feature matching on TI pairs (ours)."""
    beta_self: Weight = 0.3
    """Weight of L_self, pseudo-labels (SHOT, SOCKET: 0.3)."""
    self_from: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the training after which pseudo-labels and the measured prior begin (ours)."""
    beta_im: Weight = 1.0
    """Weight of L_IM on the student (ours; SHOT: 1)."""
    prior: Literal["measured", "equal"] = "measured"
    """Class frequencies that L_IM pulls towards. measured: equal until self_from, then halfway
    between equal and what the student predicts before each epoch (ours). equal: as in SHOT."""
    train_head: bool = False
    """Train the head, too. false: it stays that of the source model, as in SHOT (ours)."""
    keep_untouched: bool = True
    """Keep the source model's weights if the verdict without labels is "worse" (ours)."""


class ShotConfig(OptimiserConfig):
    """SHOT (Liang et al., ICML 2020)."""

    beta_self: Weight = 0.3
    """Weight of the pseudo-labels (SHOT, SOCKET: 0.3)."""
    beta_im: Weight = 1.0
    """Weight of information maximisation (SHOT, SOCKET: 1)."""


class SocketConfig(ShotConfig):
    """SOCKET (Ahmed et al., ECCV 2022)."""

    beta_bn: Weight = 0.5
    """Weight of the BatchNorm statistics (SOCKET: 0.5)."""
    beta_f: Weight = 0.5
    """Weight of the TI features (SOCKET: 0.5)."""
    bn_gate: bool = False
    """Multiply the BatchNorm term by sigmoid(w), where w starts at 1 and is learned, as in SOCKET's
    released code: the gate closes by itself. false: as in the paper."""


class SocketBridgeConfig(SocketConfig):
    """SOCKET with a student that sees translated images."""


class AadConfig(OptimiserConfig):
    """AaD (Yang et al., NeurIPS 2022)."""

    neighbours: int = Field(5, ge=1, le=1000)
    """Number of nearest images in the feature bank that attract (AaD on VisDA-C: 5)."""
    weight: Weight = 1.0
    """Weight of the dispersion at the start (AaD: 1)."""
    beta: Weight = 5.0
    """How fast this weight decays: (1 + 10 p)^-beta, p the progress (AaD on VisDA-C: 5)."""


class NrcConfig(OptimiserConfig):
    """NRC (Yang et al., NeurIPS 2021)."""

    neighbours: int = Field(5, ge=1, le=1000)
    """Number of nearest images in the feature bank, k (NRC on VisDA-C: 5)."""
    wider: int = Field(5, ge=1, le=1000)
    """Number of nearest images of each neighbour, m (NRC on VisDA-C: 5)."""
    affinity: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Trust in neighbours that are not reciprocal, r (NRC: 0.1)."""


def _batch_size(value: Any, validate: Callable[[Any], Any]) -> Any:
    """One message in place of one for each kind of value."""
    try:
        return validate(value)
    except ValidationError:
        raise ValueError("must be a number from 2 to 65,536, or auto") from None


class RuntimeConfig(Section):
    """How the machine is used.

    Only the batch size, the number of processes or GPUs and sync_batchnorm change results. The
    others at most change rounding.
    """

    gpus: int | None = Field(None, ge=0)
    """0: CPU; null: every GPU of the machine, or the CPU if there is none (flag --gpus)."""
    processes: int = Field(1, ge=1, le=256)
    """Number of processes on the CPU; with GPUs there is one for each GPU."""
    timeout_seconds: float = Field(60.0, ge=5, le=86_400)
    """Seconds that a process waits for the others before it gives up."""
    batch_size: Annotated[
        Literal["auto"] | Annotated[int, Field(ge=2, le=65_536)], WrapValidator(_batch_size)
    ] = USUAL_BATCH_SIZE
    """Images of each kind in a step, over all processes; auto: the largest power of two that fits
    into memory, found once for each stage (the oracle of evaluate then uses 64)."""
    sync_batchnorm: bool = False
    """Compute batch statistics over all processes instead of in each; GPUs only."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on GPUs that have it and on CPUs with matrix units (AMX), else fp32; on CPUs,
    networks with depthwise convolutions are trained in fp32."""
    threads: int = Field(0, ge=0)
    """CPU threads; 0: torch's choice."""
    deterministic: bool = False
    """Use torch's deterministic algorithms."""
    checkpoint_seconds: float = Field(60.0, ge=0)
    """Least number of seconds between two resumable states."""
    tensorboard: bool = False
    """Also write each epoch for TensorBoard, below the stage's folder (extra tensorboard)."""


class EvaluateConfig(Section):
    """What evaluate measures."""

    oracle: bool = True
    """Train the oracle, an upper bound that sees target labels."""
    pictures: bool = True
    """Draw galleries, confusion, reliability, features and curves. `sfkt benchmark` only draws them
    if its file or --set says so."""


class Config(Section):
    """All settings of a run."""

    seed: int = Field(0, ge=0, le=2**31 - 1)
    """Decides split and order of the data, augmentation and initialisation; for synthetic data also
    the scenes."""
    dataset: DatasetName = "synthetic"
    """Name of the data set, set by `sfkt prepare NAME`."""
    image_size: int = Field(48, ge=16, le=1024)
    """Side of the square stored images in pixels; use 128 to 224 for photographs."""
    encoding: Annotated[Literal["auto", EncodingKind], BeforeValidator(current_name)] = "auto"
    """How target images become model input; auto: the default of the modality."""
    classes: ClassesConfig = ClassesConfig()
    split: SplitConfig = SplitConfig()
    prepare: PrepareConfig = PrepareConfig()
    synthetic: SyntheticConfig = SyntheticConfig()
    nyu_depth: NyuDepthConfig = NyuDepthConfig()
    sun_rgbd: SunRgbdConfig = SunRgbdConfig()
    diml_rgbd: DimlRgbdConfig = DimlRgbdConfig()
    washington_rgbd: WashingtonRgbdConfig = WashingtonRgbdConfig()
    folders: FoldersConfig = FoldersConfig()
    training: TrainingConfig = TrainingConfig()
    source: SourceConfig = SourceConfig()
    bridge: BridgeConfig = BridgeConfig()
    vqgan: VqganConfig = VqganConfig()
    transfer: TransferConfig = TransferConfig()
    tgkt: TgktConfig = TgktConfig()
    distill: DistillConfig = DistillConfig()
    shot: ShotConfig = ShotConfig()
    socket: SocketConfig = SocketConfig()
    socket_bridge: SocketBridgeConfig = SocketBridgeConfig()
    aad: AadConfig = AadConfig()
    nrc: NrcConfig = NrcConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    runtime: RuntimeConfig = RuntimeConfig()


def fixed_batch_size(config: RuntimeConfig) -> int:
    """``runtime.batch_size`` without a trial: 64 stands for auto."""
    return USUAL_BATCH_SIZE if config.batch_size == "auto" else config.batch_size


def section_of(method: str) -> str:
    """The configuration section of a transfer method or data set: its name as an identifier."""
    return method.replace("+", "_").replace("-", "_")


def method_settings(config: Config, method: str) -> OptimiserConfig:
    """The settings of a transfer method."""
    section: OptimiserConfig = getattr(config, section_of(method))
    return section


SECTIONS = {
    name: section
    for name, field in Config.model_fields.items()
    if isinstance(section := field.annotation, type) and issubclass(section, Section)
}


def section_fields() -> dict[str, Any]:
    """Map the name of every setting, such as ``bridge.alpha_f``, to its pydantic field."""
    fields: dict[str, Any] = {}
    for name, field in Config.model_fields.items():
        inner = SECTIONS[name].model_fields if name in SECTIONS else {}
        fields |= {f"{name}.{key}": value for key, value in inner.items()} or {name: field}
    return fields


MAX_YAML_BYTES = 1 << 20
GONE = {"evaluate.bootstrap": "intervals are no longer resampled, so leave it out"}
"""Settings of earlier versions, and what to do with them; in recorded runs they are passed over."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2, where ``no``, ``1:0`` and dates are texts and ``010`` is 10; no key comes twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = set[str]()
        for key, _ in node.value:
            if str(key.value) in keys:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value} is given twice: write it once",
                    problem_mark=key.start_mark,
                )
            keys.add(str(key.value))
        return node


class _Dumper(yaml.SafeDumper):
    """Puts into quotes what YAML 1.1 or 1.2 would read as something else."""


_Loader.yaml_implicit_resolvers = {}  # without those of YAML 1.1
for _kind, _pattern in (
    ("null", "null|Null|NULL|~|"),
    ("bool", "true|True|TRUE|false|False|FALSE"),
    ("int", "[-+]?[0-9]+"),
    ("float", r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
    ("merge", "<<"),
):
    for _side in (_Loader, _Dumper):
        _side.add_implicit_resolver(
            f"tag:yaml.org,2002:{_kind}", re.compile(f"({_pattern})$"), None
        )
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


def read_yaml(path: Path) -> dict[str, Any]:
    """A configuration file as nested dicts; raises ConfigError if it cannot be read."""
    try:
        with path.open("rb") as file:  # may be a pipe, such as `--config <(...)`
            content = file.read(MAX_YAML_BYTES + 1)
        if len(content) > MAX_YAML_BYTES:
            raise ConfigError(
                f"configuration file {path} has more than {MAX_YAML_BYTES:,} bytes: give a YAML "
                "file of settings"
            )
        text = content.decode()
    except FileNotFoundError:
        raise ConfigError(f"configuration file {path} does not exist") from None
    except UnicodeDecodeError:
        raise ConfigError(f"configuration file {path} is not in UTF-8: save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"configuration file {path} cannot be read: {error}") from None
    values = _yaml(text, f"configuration file {path} is")
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"configuration file {path} must hold settings such as 'bridge:', "
            f"not {type(values).__name__}"
        )
    return {str(key): value for key, value in values.items()}


def settings_of_file(path: Path) -> dict[str, Any]:
    """The settings of a configuration file by dotted name; raises ConfigError if it has others."""
    values = read_yaml(path)
    if not {"methods", "datasets", "variants", "sweeps"}.isdisjoint(values):
        raise ConfigError(f"{path} is a benchmark file: use it with `sfkt benchmark {path}`")
    return merge(values)


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """The values of ``section.field=value`` texts by name; a malformed one raises ConfigError."""
    values: list[dict[str, Any]] = []
    kinds = {name: describe_type(field.annotation) for name, field in section_fields().items()}
    texts = {name for name, kind in kinds.items() if kind in ("str", "path", "path | null")}
    for assignment in assignments:
        name, equals, text = (part.strip() for part in assignment.partition("="))
        if not equals or not name:
            raise ConfigError(f"--set {assignment!r}: write it as section.field=value")
        # A path or a text is taken as it is: `` #`` begins no comment in it, and 2024 is a name.
        as_it_is = name in texts and text != "null" and text[:1] not in ("'", '"')
        value = text
        if text and not as_it_is:
            value = _yaml(text, f"--set {assignment!r}: the value is")
        if name in SECTIONS and value is None:
            raise ConfigError(f"--set {assignment!r}: {_name_a_setting(name, section_fields())}")
        values.append({name: value})
    return merge(*values)


def _yaml(text: str, what: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{what} not valid YAML: {error}") from None


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted name, such as ``bridge.epochs``; later layers win, lists are replaced.

    In a layer, settings may be grouped by section, as in a file, or have their dotted names. A
    section whose settings are all left out (null) changes nothing.

    Raises:
        ConfigError: A layer gives a setting both ways.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        settings: dict[str, Any] = {}
        for name, value in layer.items():
            grouped = name in SECTIONS and isinstance(value, Mapping | None)
            new = (
                {f"{name}.{key}": each for key, each in (value or {}).items()}
                if grouped
                else {name: value}
            )
            for twice in settings.keys() & new:
                raise ConfigError(
                    f"{twice} is given twice, alone and in its section: leave one out"
                )
            settings |= new
        merged |= settings
    return merged


def build(*layers: Mapping[str, Any], stage: str = "", places: Iterable[str] = ()) -> Config:
    """Validate layers of settings, see :func:`merge`; raises one ConfigError for all problems.

    ``stage``: the stage whose settings are suggested first for an unknown name. ``places``: where
    each layer came from, for the messages; empty if a message need not say it.
    """
    sections: dict[str, Any] = {}
    for name, value in merge(*layers).items():
        section, dot, field = name.partition(".") if name[:1] != "." else (name, "", "")
        above = sections.get(section)
        inner = {**(above if isinstance(above, Mapping) else {}), field: value}
        sections[section] = inner if dot else value
    try:
        return Config.model_validate(sections)
    except ValidationError as error:
        layered = zip(places, layers, strict=False)
        origins = [(name, place) for place, layer in layered for name in merge(layer)]
        problems = zip(error.errors(), explained(error, stage=stage), strict=True)
        told = [f"{_origin(problem['loc'], origins)}{text}" for problem, text in problems]
        raise ConfigError(*told) from None


def _origin(loc: Sequence[str | int], origins: Iterable[tuple[str, str]]) -> str:
    """The place of a setting, or of the last one of a section, with a colon."""
    where = ".".join(map(str, loc)) + "."
    places = [
        place
        for name, place in origins
        if f"{name}.".startswith(where) or where.startswith(f"{name}.")
    ]
    return f"{places[-1]}: " if places and places[-1] else ""


def values_of(config: Config) -> dict[str, Any]:
    """The value of every setting by its dotted name, plain as for YAML and JSON."""
    return merge(as_dict(config))


def as_dict(config: BaseModel) -> dict[str, Any]:
    """The settings as plain values for YAML and JSON."""
    return config.model_dump(mode="json")


def to_yaml(config: Config) -> str:
    """The resolved settings as YAML."""
    return yaml.dump(as_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def one_line(value: Any) -> str:
    """A value as YAML on one line."""
    text = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, width=10_000, allow_unicode=True
    )
    return text.removesuffix("\n").removesuffix("\n...").strip()


def describe_type(annotation: Any) -> str:
    """A short text for a field's type, such as ``int`` or ``unet | pointwise``."""
    origin = get_origin(annotation)
    if origin is Literal:
        return " | ".join(str(choice) for choice in get_args(annotation))
    if origin is Annotated:
        return describe_type(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return " | ".join(describe_type(option) for option in get_args(annotation))
    if origin is tuple:
        return f"list of {describe_type(get_args(annotation)[0])}"
    if annotation is type(None):
        return "null"
    return "path" if annotation is Path else str(getattr(annotation, "__name__", annotation))


def explained(
    error: ValidationError,
    names: Sequence[str] = (),
    otherwise: str = "`sfkt config show` lists all settings",
    stage: str = "",
) -> list[str]:
    """For each of pydantic's problems, a line that a user can act on.

    For an unknown setting it suggests one of ``names`` (empty: those of Config), preferably of the
    section of ``stage``; ``otherwise`` is the hint if none of them is similar.
    """
    # The last of several whose ends are alike is taken.
    sections = stage.split("/")
    names = sorted(
        names or [*section_fields(), *Config.model_fields],
        key=lambda name: name.partition(".")[0] in sections,
    )
    return [_explain(problem, names, otherwise) for problem in error.errors(include_url=False)]


SHORT = reprlib.Repr()
SHORT.maxlevel, SHORT.maxlist, SHORT.maxstring, SHORT.maxother = 2, 8, 200, 200
"""Shows wrong values in messages, long ones in part."""


def _explain(problem: Any, names: Sequence[str], otherwise: str) -> str:
    where = ".".join(str(part) for part in problem["loc"]) or "settings"
    value = SHORT.repr(problem["input"])
    if problem["type"] == "extra_forbidden":
        last, dotted = where.rpartition(".")[2], any("." in name for name in names)
        near = difflib.get_close_matches(where if dotted else last, names, n=1, cutoff=0.5)
        if not near or "." not in where:
            ends = {name.rpartition(".")[2]: name for name in names}
            alike = difflib.get_close_matches(last, ends, n=1, cutoff=0.6)
            near = [ends[end] for end in alike] or near
        hint = GONE.get(where) or (f"did you mean {near[0]}?" if near else otherwise)
        return f"unknown setting {where} = {value}: {hint}"
    message = problem["msg"].removeprefix("Value error, ")
    why = message[:1].lower() + message[1:]
    if problem["input"] is None:
        why = "null is not allowed here: leave the setting out, or choose another value"
    elif problem["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
        near = difflib.get_close_matches(str(problem["input"]), choices, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        why = f"{hint}choose one of {', '.join(choices)}"
    elif problem["type"] == "missing" and isinstance(problem["loc"][-1], int):
        where, why = where.rpartition(".")[0], f"value {problem['loc'][-1] + 1} is missing"
    elif problem["type"] in ("string_type", "path_type"):
        kind = type(problem["input"]).__name__
        why = f"YAML reads it as {kind}: put it into quotes, as in ['001']"
    elif problem["type"] == "tuple_type":
        why = f"must be a list: write --set '{where}=[{str(problem['input'])[:60]}]'"
    elif problem["type"] == "model_type":
        why = _name_a_setting(where, names)
    return f"setting {where} = {value}: {why}"


def _name_a_setting(section: str, names: Iterable[str]) -> str:
    field = next((name for name in names if name.startswith(f"{section}.")), section)
    return f"{section} is a section: name its setting, such as {field}"
