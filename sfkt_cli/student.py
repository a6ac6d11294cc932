"""The trained student as a module: ``load_student("runs/synthetic").predict("scan.png")``.

The module also runs a student that was exported to ONNX, for ``sfkt predict --model FILE``.
"""

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sfkt_cli.console import warn
from sfkt_cli.data.images import Encoding, as_rgb, encode
from sfkt_cli.data.sensor import Sensor, doubt
from sfkt_cli.errors import DataError, RunError, first_line, need
from sfkt_cli.evaluation.models import evaluated, outdated_student
from sfkt_cli.methods import ENCODED, METHODS
from sfkt_cli.models.onnx_files import open_session, refuse_what_is_elsewhere
from sfkt_cli.models.saving import CARD, Saved, load_model
from sfkt_cli.settings.runs import Run, main_student

BATCH = 64  # images that the model looks at at once


@dataclass(frozen=True)
class Prediction:
    """A prediction for one image."""

    label: str  # name of the most probable class
    probability: float  # its probability
    ranked: tuple[tuple[str, float], ...]  # all classes with theirs, the most probable first
    warning: str = ""  # why the image may not come from the sensor; empty if nothing looks wrong

    @property
    def shown(self) -> str:
        """For people: ``mug 93%``, or ``unknown (mug 40%)`` where that is not taken for true."""
        best, probability = self.ranked[0]
        text = f"{best} {probability:.0%}"
        return text if self.label == best else f"{self.label} ({text})"


class Student(nn.Module):
    """A classifier for the target sensor, ready to use."""

    def __init__(
        self,
        saved: Saved,  # the model; its card has classes, usual images and temperature
        encoding: Encoding,  # the card's
        sensor: Sensor,  # how raw images become stored values
    ) -> None:
        super().__init__()
        self.model = saved.classifier
        self.classes = tuple(saved.card.classes)
        self.encoding = encoding
        self.sensor = sensor
        self.trained_on: Mapping[str, Any] = saved.card.images or {}
        self.temperature = saved.card.temperature
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def forward(self, stored: Tensor) -> Tensor:
        """Logits (B, K) of stored images (B, H, W) or (B, H, W, C), as :meth:`read` gives them."""
        _, logits = self.model(as_rgb(encode(stored.to(self.device), self.encoding)))
        return cast(Tensor, logits)

    def read(self, path: str | Path) -> NDArray[Any]:
        """An image file to the model's size and unit; raises DataError if it is none."""
        return self.sensor.decode(read_image(path), str(path))

    def predict(self, image: str | Path | bytes | NDArray[Any]) -> Prediction:
        """Classify a file, its content, or raw values (H, W) or (H, W, C) at any size.

        Raises DataError if the image is not what the model expects.
        """
        if isinstance(image, (str, Path)):
            stored = self.read(image)
        elif isinstance(image, bytes):
            stored = self.sensor.decode(image, "the image")
        else:
            stored = self.sensor.fit_values(np.asarray(image))
        return self.predict_stored([stored])[0]

    def predict_stored(self, images: Sequence[NDArray[Any]]) -> list[Prediction]:
        """Classify images that :meth:`read` gave, some at once."""
        rows: list[list[float]] = []
        for first in range(0, len(images), BATCH):
            batch = np.stack(images[first : first + BATCH])
            rows += self.probabilities(torch.from_numpy(batch)).tolist()
        return rank(self, images, rows)

    def probabilities(self, stored: Tensor) -> Tensor:
        """(B, K) float32 on the CPU of stored images (B, H, W) or (B, H, W, C)."""
        with torch.inference_mode():
            return torch.softmax(self(stored).float() / self.temperature, dim=1).cpu()


class ExportedStudent:
    """Predicts as :class:`~sfkt_cli.student.Student` does, from an ONNX file of `sfkt export`.

    Raises:
        ConfigError: onnxruntime is not installed.
        DataError: The file is damaged, or was not made by `sfkt export`.
    """

    def __init__(self, path: Path) -> None:
        need(f"--model {path}", "onnx", "onnx", "onnxruntime")
        import onnx

        try:
            content = path.read_bytes()
            refuse_what_is_elsewhere(path, onnx.load_model_from_string(content))
            self._session = open_session(content)
            facts = self._session.get_modelmeta().custom_metadata_map
            self.classes: tuple[str, ...] = tuple(json.loads(facts["classes"]))
            self.sensor = Sensor(**json.loads(facts["sensor"]))
            self.trained_on: Mapping[str, Any] = json.loads(facts["usual"])
            (images,) = self._session.get_inputs()
            self._batch, *self._size = images.shape[:3]
            self._type = np.dtype(facts["input"].split()[0])
        except DataError:
            raise
        except Exception as error:  # onnx and onnxruntime raise errors of many kinds
            raise DataError(
                f"{path} is damaged, or is not a file of this version of `sfkt export` "
                f"({first_line(error)})"
            ) from None

    def read(self, path: str | Path) -> NDArray[Any]:
        """An image file to the file's size; raises DataError if it has another one."""
        stored = self.sensor.decode_unfitted(read_image(path), str(path))
        if self._size == [self.sensor.image_size] * 2:
            return self.sensor.to_size(stored)
        if list(stored.shape[:2]) != self._size:
            height, width = self._size
            raise DataError(
                f"{path} has {stored.shape[0]} x {stored.shape[1]} pixels, the model takes "
                f"{height} x {width}: export it with another --input-size"
            )
        return stored

    def predict_stored(self, images: Sequence[NDArray[Any]]) -> list[Prediction]:
        """Classify images that :meth:`read` gave."""
        if not images:
            return []
        if list(images[0].shape[:2]) != self._size:  # frames of a video come in the prepared size
            raise DataError(
                f"the model does not take images of {' x '.join(map(str, images[0].shape[:2]))} "
                "pixels: for videos export it without --input-size"
            )
        size = self._batch if isinstance(self._batch, int) else min(len(images), BATCH)
        probabilities: list[list[float]] = []
        for first in range(0, len(images), size):
            batch = np.stack(images[first : first + size])
            filled = np.resize(batch, (size, *batch.shape[1:])).astype(self._type)
            (rows,) = self._session.run(["probabilities"], {"images": filled})
            probabilities += rows[: len(batch)].tolist()
        return rank(self, [self.sensor.to_size(image) for image in images], probabilities)


def read_image(path: str | Path) -> bytes:
    """The content of an image file; raises DataError if it cannot be read."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise DataError(f"{path} is a folder, a device or a pipe: give image files")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def rank(
    student: Student | ExportedStudent,
    images: Iterable[NDArray[Any]],
    probabilities: Iterable[Sequence[float]],
) -> list[Prediction]:
    """Predictions for stored images, with what makes an image doubtful."""
    predictions = []
    for image, row in zip(images, probabilities, strict=True):
        ranked = sorted(zip(student.classes, row, strict=True), key=lambda pair: -pair[1])
        warning = doubt(image, student.trained_on, student.sensor.missing)
        predictions.append(Prediction(*ranked[0], tuple(ranked), warning))
    return predictions


def load_student(
    path: str | Path,
    *,
    method: str | None = None,
    default_method: str = "tgkt",
    device: str | torch.device = "cpu",
) -> Student:
    """Load the student of a run, or of a folder with model.json.

    Args:
        path: ``runs/<name>``, ``runs/<name>/transfer/<method>``, or an exported ``student`` folder.
        method: Which student of a run; None: the one that counts, see ``runs.main_student``;
            ``source-encoded``: the source model with the encoding of that student.
        default_method: The method to take if a run has several students.
        device: Such as ``cpu`` or ``cuda``.

    Raises:
        RunError: There is no finished student, or not the one asked for, or no such method.
        DataError: The model is damaged, or is none for a target sensor.
    """
    folder, saved = load_saved(Path(path), method, default_method, torch.device(device))
    sensor = sensor_of(folder, saved)
    return Student(saved, saved.encoding_of("transfer"), sensor)


def load_saved(
    path: Path, method: str | None, default_method: str, device: torch.device | None = None
) -> tuple[Path, Saved]:
    """The folder of a student, and the model to be shipped; as :func:`load_student`."""
    folder = find_student(path, method, default_method)
    saved = load_model(folder, device)
    if method != ENCODED:
        return folder, saved
    source = load_model(Run(path).require("source"), device)
    of_images = {name: getattr(saved.card, name) for name in ("encoding", "sensor", "images")}
    card = source.card.model_copy(update={**of_images, "method": ENCODED})
    return folder, Saved(source.module, card)


def find_student(path: Path, method: str | None = None, default_method: str = "tgkt") -> Path:
    """The folder of a student's model.json; arguments and RunError as of :func:`load_student`."""
    for folder in (path, path / "student"):  # the model's own folder, or that of an export
        if (folder / CARD).is_file():
            if method == ENCODED or folder.name != method:
                refuse_method(folder, method)
            return folder
    if not path.is_dir():
        raise RunError(
            f"{path} {'is a file' if path.exists() else 'does not exist'}: give a run such as "
            "runs/synthetic, or the folder that `sfkt export` wrote (`sfkt predict --model` also "
            "takes the .onnx files in it)"
        )
    run = Run(path)
    done = run.methods()
    if not done:
        raise RunError(
            f"{path} holds no finished student: first run `sfkt transfer`, or, for an export, "
            "`sfkt export --format safetensors`"
        )
    chosen = method if method not in (None, ENCODED) else main_student(done, default_method)
    if chosen not in done:
        if chosen not in METHODS:
            raise RunError(
                f"there is no method {chosen!r}: choose from {', '.join([*METHODS, ENCODED])}"
            )
        raise RunError(
            f"{path} holds no student of method {chosen!r}, but of {', '.join(done)}: "
            f"first run `sfkt transfer --method {chosen}`, or choose another"
        )
    folder = run.require(f"transfer/{chosen}")
    if note := outdated_student(run, chosen):
        warn(f"{folder} was {note}")
    if method == ENCODED:
        return folder
    with contextlib.suppress(DataError, RunError):  # the student works without what is damaged
        told = evaluated(run, chosen)
        if (told.get("main"), told.get("tone")) == (chosen, "worse"):
            warn(
                f"{folder} was judged worse than your RGB model, which --method {ENCODED} takes in "
                f"its place: {told['headline']}"
            )
    return folder


def refuse_method(path: Path, method: str | None) -> None:
    """Raise RunError if somebody chooses the method of a student that lies there alone."""
    if method:
        raise RunError(
            f"{path} is one student, not those of a run: leave --method {method} out, or give the "
            "run"
        )


def sensor_of(folder: Path, saved: Saved) -> Sensor:
    """The sensor that a student was trained for; raises DataError if the model is no student."""
    if saved.card.sensor is None:
        raise DataError(
            f"{folder} holds no student, or one by an earlier version, which did not note its "
            "sensor: train it again with `sfkt transfer --force`"
        )
    return saved.card.sensor
