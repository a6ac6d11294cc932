"""Frames of a video file, a camera or a network stream, through OpenCV (extra ``video``)."""

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
from sfkt_cli.data.decode import is_coloured
from sfkt_cli.data.sensor import Sensor
from sfkt_cli.errors import ConfigError, DataError, how_to_install

STOP_S = 35.0  # OpenCV waits 30 s for the frame of a stream
VIDEOS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts")


def is_live(entry: str) -> bool:
    """Whether it is a camera's number or an address: frames without an end."""
    if entry.startswith(("http://", "https://")) and _is_video_name(entry):
        return False
    return "://" in entry or (entry.isdecimal() and not Path(entry).exists())


def is_video(entry: str) -> bool:
    """Whether it is a live stream or a video file."""
    return is_live(entry) or (_is_video_name(entry) and not Path(entry).is_dir())


def _is_video_name(entry: str) -> bool:
    return Path(entry).suffix.lower() in VIDEOS


def without_password(address: str) -> str:
    """The address of a stream for messages and rows, without the user's name and password."""
    address = re.sub(r"//[^/]*@", "//", address)
    return re.sub(r"(?i)\b(user\w*|login|pass\w*|pwd|token)=[^&/]*", r"\1=...", address)


def frames(entry: str, sensor: Sensor) -> Iterator[tuple[str, NDArray[Any]]]:
    """Names and stored images of all frames; of a live stream always the newest one.

    The entry is a video file, a camera's number, or an address such as ``rtsp://...``. A file's
    frames are named ``clip.mp4#12``, from 0; those of a live stream by the time.

    Raises:
        ConfigError: OpenCV is not installed.
        DataError: It cannot be opened, ends too early, or shows no images of this sensor.
    """
    live, address = is_live(entry), without_password(entry)
    try:
        import cv2
    except ImportError:
        raise ConfigError(
            f"{address} is a video, which needs OpenCV: {how_to_install('video')}"
        ) from None
    capture = cv2.VideoCapture(int(entry) if entry.isdecimal() and live else entry)
    if not capture.isOpened():
        raise DataError(
            f"{address} cannot be opened as a video: does it exist, and play elsewhere?"
        )
    # FFmpeg's name of a video's frames, and V4L2's of a camera's. OpenCV would cut them to 8 bit.
    formats = (capture.get(name) for name in (cv2.CAP_PROP_CODEC_PIXEL_FORMAT, cv2.CAP_PROP_FOURCC))
    names = [int(code).to_bytes(8, "little", signed=True)[:4] for code in formats]
    grey_16 = any(name.startswith(b"Y1") or name.endswith(b"1Y") for name in names)  # or 9 to 14
    if grey_16 and sensor.dtype == "uint8":
        raise DataError(
            f"{address} holds values of 16 bit, expected uint8: all target images must be alike"
        )
    # Not for 8 bit: the values of YUV as they are lie between 16 and 235, and holes are not 0.
    if grey_16 or (sensor.dtype or (sensor.missing and "uint16")) == "uint16":
        capture.set(cv2.CAP_PROP_CONVERT_RGB, 0)
    coloured, count, first_ms, last_ms = False, 0, 0.0, 0.0
    for count, frame in enumerate(_newest(capture) if live else _all(capture), 1):
        if live:
            name = f"{address}#{datetime.now().astimezone().isoformat(timespec='milliseconds')}"
        else:
            name, last_ms = f"{address}#{count - 1}", capture.get(cv2.CAP_PROP_POS_MSEC)
            first_ms = last_ms if count == 1 else first_ms
        planes = frame.shape[2] if frame.ndim == 3 else 1
        if planes == 3 and sensor.channels == 1:
            if not coloured and is_coloured(frame):
                warn(f"{name} is coloured, its grey values are used: switch false colours off")
                coloured = True
            frame = cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY)
        elif planes == 3:
            frame = frame[:, :, ::-1]
        yield name, sensor.fit_values(np.squeeze(frame), name)
    expected = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    # Of some files OpenCV knows the duration alone, and there may be pauses in it.
    passed = (last_ms - first_ms) / 1000 * capture.get(cv2.CAP_PROP_FPS)
    if not count or (not live and max(count, passed) < 0.9 * expected):
        raise DataError(f"{address} ends after {count} of {expected} frames: is it damaged?")
    if live:
        raise DataError(f"{address} has ended: is the camera still there?")


def _all(capture: Any) -> Iterator[NDArray[Any]]:
    """Frames up to the end, or to one that OpenCV fails at."""
    import cv2

    with contextlib.suppress(cv2.error):
        while (answer := capture.read())[0]:
            yield answer[1]


def _newest(capture: Any) -> Iterator[NDArray[Any]]:
    """Frames read in a thread; those that come while the last one is looked at are dropped."""
    newest: queue.Queue[NDArray[Any] | Exception | None] = queue.Queue(1)
    stopped = threading.Event()

    def read() -> None:
        end = None
        try:
            for frame in _all(capture):
                with contextlib.suppress(queue.Empty):
                    newest.get_nowait()
                newest.put(frame)
                if stopped.is_set():
                    return
        except Exception as error:  # raised where the frames are looked at
            end = error
        newest.put(end)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        while (frame := newest.get()) is not None:
            if isinstance(frame, Exception):
                raise frame
            yield frame
    finally:  # Python must not end while OpenCV works
        stopped.set()
        with contextlib.suppress(queue.Empty):
            newest.get_nowait()
        thread.join(STOP_S)
