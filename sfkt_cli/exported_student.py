"""A student that was exported to ONNX, in onnxruntime: what ``sfkt predict --model FILE`` asks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfkt_cli.data.sensor import Sensor
from sfkt_cli.errors import ConfigError, DataError
from sfkt_cli.student import Prediction, rank, read_image


class ExportedStudent:
    """Predicts as :class:`~sfkt_cli.student.Student` does, from an ONNX file of `sfkt export`.

    Raises:
        ConfigError: onnxruntime is not installed.
        DataError: The file is damaged, or was not made by `sfkt export`.
    """

    def __init__(self, path: Path) -> None:
        if any(util.find_spec(name) is None for name in ("onnx", "onnxruntime")):
            raise ConfigError(f"--model {path} needs onnxruntime: pip install 'sfkt[onnx]'")
        import onnx

        from sfkt_cli.models.onnx_files import open_session, refuse_what_is_elsewhere

        try:
            content = path.read_bytes()
            refuse_what_is_elsewhere(path, onnx.load_model_from_string(content))
            self._session = open_session(content)
            facts = self._session.get_modelmeta().custom_metadata_map
            self.classes: tuple[str, ...] = tuple(json.loads(facts["classes"]))
            self.sensor = Sensor(**json.loads(facts["sensor"]))
            self._usual = json.loads(facts["usual"])
            (images,) = self._session.get_inputs()
            self._batch, *self._size = images.shape[:3]
            self._type = np.dtype(facts["input"].split()[0])
        except DataError:
            raise
        except Exception as error:  # onnx and onnxruntime raise errors of many kinds
            first = str(error).partition("\n")[0]
            raise DataError(
                f"{path} is damaged, or is no file of this version of `sfkt export` ({first})"
            ) from None

    def read(self, path: str | Path) -> NDArray[Any]:
        """An image file to the file's size; a DataError: another sensor, another size."""
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
        if list(images[0].shape[:2]) != self._size:  # frames of a video come in the prepared size
            raise DataError(
                f"images of {' x '.join(map(str, images[0].shape[:2]))} pixels come here, and the "
                "model takes other ones: for videos export it without --input-size"
            )
        size = self._batch if isinstance(self._batch, int) else len(images)
        probabilities: list[list[float]] = []
        for first in range(0, len(images), size):
            batch = np.stack(images[first : first + size])
            filled = np.resize(batch, (size, *batch.shape[1:])).astype(self._type)
            (found,) = self._session.run(["probabilities"], {"images": filled})
            probabilities += found[: len(batch)].tolist()
        fitted = [self.sensor.to_size(image) for image in images]
        return rank(probabilities, self.classes, fitted, self._usual, self.sensor.missing)
