"""Frames of a video file, a camera or a network stream, through OpenCV (extra ``video``)."""

from __future__ import annotations

import contextlib
import queue
import re
import threading
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfkt_cli.console import warn
from sfkt_cli.data.sensor import Sensor
from sfkt_cli.errors import ConfigError, DataError

SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts")
GREY = 8
"""Mean difference of the channels of a picture that has no colours, in 8 bit, at most."""


def is_live(entry: str) -> bool:
    """Whether it is a camera's number or an address: frames without an end."""
    return "://" in entry or (entry.isdecimal() and not Path(entry).exists())


def is_video(entry: str) -> bool:
    """Whether it is a live stream or a video file."""
    return is_live(entry) or Path(entry).suffix.lower() in SUFFIXES


def frames(entry: str, sensor: Sensor) -> Iterator[tuple[str, NDArray[Any]]]:
    """Names and stored images of all frames; of a live stream always the newest one.

    A file's frames are named ``clip.mp4#12``, from 0; those of a live stream by the time.

    Args:
        entry: A video file, a camera's number, or an address such as ``rtsp://...``.
        sensor: What the frames must be; for 16 bit they are read as they are coded.

    Raises:
        ConfigError: OpenCV is not installed.
        DataError: It cannot be opened, ends too early, or shows no images of this sensor.
    """
    try:
        import cv2
    except ImportError:
        raise ConfigError(
            f"{entry} is a video, which needs OpenCV: pip install 'sfkt[video]'"
        ) from None
    live, shown = is_live(entry), re.sub(r"//[^/@]*@", "//", entry)  # without a password
    capture = cv2.VideoCapture(int(entry) if entry.isdecimal() and live else entry)
    if not capture.isOpened():
        raise DataError(f"{shown} cannot be opened as a video: does it exist, and play elsewhere?")
    if sensor.missing or sensor.dtype == "uint16":
        capture.set(cv2.CAP_PROP_CONVERT_RGB, 0)
    coloured, count = False, 0
    for count, frame in enumerate(_newest(capture) if live else _all(capture), 1):
        name = (
            f"{shown}#{datetime.now().isoformat(timespec='milliseconds')}"
            if live
            else f"{shown}#{count - 1}"
        )
        planes = frame.shape[2] if frame.ndim == 3 else 1
        if planes == 3 and sensor.channels == 1:
            spread = float(np.ptp(frame, axis=2).mean())
            if spread > GREY and not coloured:
                warn(f"{name} is coloured, its grey values are used: switch false colours off")
                coloured = True
            frame = cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY)
        elif planes == 3:
            frame = frame[:, :, ::-1]
        yield name, sensor.fit_values(np.squeeze(frame), name)
    expected = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    if not count or (not live and count < 0.9 * expected):
        raise DataError(f"{shown} ends after {count} of {expected} frames: is it damaged?")
    if live:
        raise DataError(f"{shown} has ended: is the camera still there?")


def _all(capture: Any) -> Iterator[NDArray[Any]]:
    while True:
        there, frame = capture.read()
        if not there:
            return
        yield frame


def _newest(capture: Any) -> Iterator[NDArray[Any]]:
    """Frames read in a thread; those that come while the last one is looked at are dropped."""
    newest: queue.Queue[NDArray[Any] | None] = queue.Queue(1)

    def read() -> None:
        for frame in _all(capture):
            with contextlib.suppress(queue.Empty):
                newest.get_nowait()
            newest.put(frame)
        newest.put(None)

    threading.Thread(target=read, daemon=True).start()
    while (frame := newest.get()) is not None:
        yield frame
