"""Predictions of new images: the same as those of the prepared ones, and never cut short."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import math
import os
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

import sfkt_cli
from sfkt_cli.console import outlets
from sfkt_cli.data.sensor import Sensor, describe_images, doubt
from sfkt_cli.data.store import open_store
from sfkt_cli.data.video import _newest, frames
from sfkt_cli.errors import ConfigError, DataError, Interrupted, RunError
from sfkt_cli.files import write_record
from sfkt_cli.models.saving import load_model, save_model
from sfkt_cli.rows import RowWriter, to_csv
from sfkt_cli.settings.config import Config
from sfkt_cli.settings.runs import Run
from sfkt_cli.settings.stage import Stage
from sfkt_cli.stages.export import export
from sfkt_cli.stages.predict import expand, judged, predict, save
from sfkt_cli.stages.prepare import prepare
from sfkt_cli.student import BATCH, Prediction, read_image


@pytest.fixture(scope="module")
def depth_files(untrained_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("depth")
    images = open_store(untrained_run.transfer_store)["target/target"]
    for number in range(BATCH + 6):
        depth_mm = np.array(images[number % len(images)])
        Image.fromarray(depth_mm).save(folder / f"{number:03d}.png")
    return folder


def test_a_file_is_classified_like_its_row_in_the_store(
    untrained_run: Run, depth_files: Path
) -> None:
    student = sfkt_cli.load_student(untrained_run.folder)
    row = np.array(open_store(untrained_run.transfer_store)["target/target"][3])
    expected = student.predict_stored([row])[0]
    assert student.predict(depth_files / "003.png") == expected
    assert student.predict(row) == expected
    logits = student(torch.from_numpy(row[None]))
    assert torch.softmax(logits, dim=1).max().item() == pytest.approx(expected.probability)
    assert isinstance(student, nn.Module)
    assert not student.training
    enlarged = row.repeat(3, axis=0).repeat(3, axis=1)
    padded = np.pad(enlarged, ((0, 0), (10, 10)))  # the middle square is kept
    assert student.predict(padded) == expected
    assert expected.label == expected.ranked[0][0]
    assert sum(probability for _, probability in expected.ranked) == pytest.approx(1)


def read_depth(path: Path) -> NDArray[np.uint16]:
    return np.asarray(Image.open(path), np.uint16)


def test_every_image_gets_a_row_in_order(
    untrained_run: Run, untrained_config: Config, depth_files: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    output = tmp_path / "predictions.csv"
    predict(untrained_config, untrained_run, [str(depth_files)], output=output, top_k=2)
    rows = list(csv.DictReader(io.StringIO(output.read_text())))
    assert [row["path"] for row in rows] == sorted(map(str, depth_files.glob("*.png")))
    assert len(rows) == BATCH + 6
    (share,) = Counter(row["class"] for row in rows).values()
    assert share == len(rows)
    assert "the student calls 100 % of the images" in capsys.readouterr().err
    student = sfkt_cli.load_student(untrained_run.folder)
    for row in (rows[0], rows[-1]):
        found = student.predict(row["path"])
        assert (row["class"], row["class_2"]) == (found.ranked[0][0], found.ranked[1][0])
        assert float(row["probability"]) == pytest.approx(found.probability, abs=1e-5)


def test_broken_files_do_not_stop_the_others(
    untrained_run: Run, untrained_config: Config, depth_files: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    good = depth_files / "000.png"
    cut = tmp_path / "cut.png"
    cut.write_bytes(good.read_bytes()[:100])
    rgb = tmp_path / "rgb.png"
    Image.new("RGB", (20, 20)).save(rgb)
    output = tmp_path / "out.jsonl"
    long = tmp_path / f"{300 * 'a'}.png"
    paths = [str(path) for path in (cut, good, rgb, tmp_path / "absent.png", long)]
    with pytest.raises(DataError, match="4 of 5 images") as caught:
        predict(untrained_config, untrained_run, paths, output=output, top_k=2)
    (line,) = output.read_text().splitlines()
    row = json.loads(line)
    assert row["path"] == str(good)
    assert [set(entry) for entry in row["top"]] == [{"class", "probability"}] * 2
    assert all(name in str(caught.value) for name in ("cut.png", "rgb.png", "absent.png"))
    assert "warning" not in capsys.readouterr().err  # one message tells all
    before = output.read_text()
    with pytest.raises(DataError, match="1 of 1 images"):
        predict(untrained_config, untrained_run, [str(cut)], output=output)
    assert output.read_text() == before  # where there is nothing to say, nothing is overwritten


def test_files_in_a_folder_that_cannot_be_read_are_broken(
    depth_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user of the tests may read everything, so the system call is made to fail."""
    closed, stat = depth_files / "000.png", os.stat

    def refuse(path: Any, *more: Any, **options: Any) -> os.stat_result:
        if str(path) == str(closed):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, *more, **options)

    monkeypatch.setattr(os, "stat", refuse)
    for entry in (str(closed), str(depth_files / "00[0].png")):
        assert expand([entry]) == [closed]
        with pytest.raises(DataError, match=r"000\.png cannot be read: Permission denied"):
            read_image(closed)


def test_pictures_are_not_saved_among_the_images(
    untrained_run: Run, untrained_config: Config, depth_files: Path, tmp_path: Path
) -> None:
    for follow in (False, True):
        with pytest.raises(
            ConfigError, match=r"--save-images .*shots lies among the images.* outside"
        ):
            predict(
                untrained_config, untrained_run, [str(depth_files)], output=tmp_path / "p.csv",
                save_images=depth_files / "sub" / ".." / "shots", follow=follow,
            )  # fmt: skip
    assert not (depth_files / "shots").exists()
    for images in ([str(depth_files / "00*.png")], [str(depth_files / "000.png")]):
        with pytest.raises(ConfigError, match=r"--save-images .* lies among the images"):
            predict(
                untrained_config, untrained_run, images, output=tmp_path / "p.csv",
                save_images=depth_files,
            )  # fmt: skip
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "shots"):
        with pytest.raises(ConfigError, match=r"--save-images .*file.* cannot be written"):
            predict(
                untrained_config, untrained_run, [str(depth_files)], output=tmp_path / "p.csv",
                save_images=folder,
            )  # fmt: skip


def test_an_image_without_a_probability_is_unknown() -> None:
    lost = Prediction("cone", math.nan, (("cone", math.nan), ("box", math.nan)))
    assert judged(lost, 0.5).label == "unknown"
    assert judged(lost, 0.0).label == "cone"


def test_people_see_what_an_unknown_image_would_have_been_called() -> None:
    ranked = (("cone", 0.67), ("box", 0.33))
    unsure = Prediction("cone", 0.67, ranked)
    assert judged(unsure, 0.5).shown == "cone 67%"
    assert judged(unsure, 0.7).shown == "unknown (cone 67%)"
    own = Prediction("unknown", 0.67, (("unknown", 0.67), ("box", 0.33)))  # a class of that name
    assert judged(own, 0.5).shown == "unknown 67%"


def test_files_folders_patterns_and_a_list(
    depth_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = depth_files / "000.png", depth_files / "001.png"
    assert list(expand([str(second), str(depth_files / "00[01].png")])) == [second, first]
    for listed in (f"{second}\n\n{first}\n", f"{second}\0{first}\0"):  # as find -print0 lists
        monkeypatch.setattr("sys.stdin", io.StringIO(listed))
        assert list(expand(["-", str(first)])) == [second, first]
    monkeypatch.setattr("sys.stdin", io.StringIO("a\u2028b.png\nc\x0cd.png\n"))
    assert list(expand(["-"])) == [Path("a\u2028b.png"), Path("c\x0cd.png")]
    monkeypatch.chdir(depth_files)
    assert list(expand(["00[01].png"])) == [Path("000.png"), Path("001.png")]
    with pytest.raises(ConfigError, match=r"none\*\.png matches no image"):
        list(expand(["none*.png"]))


def test_what_cannot_be_done_is_said_first(
    untrained_run: Run, untrained_config: Config, tmp_path: Path
) -> None:
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "file").touch()
    for name, why in (
        ("out.xls", r"\.csv or \.jsonl"), ("folder.csv", "name a file"),
        ("file/out.csv", "cannot be written"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=why):
            predict(untrained_config, untrained_run, ["x.png"], output=tmp_path / name)
    for threshold in (math.nan, 1.5):
        with pytest.raises(ConfigError, match=f"--threshold {threshold}: choose"):
            predict(untrained_config, untrained_run, ["x.png"], threshold=threshold)
    with pytest.raises(RunError, match="first run `sfkt transfer`"):
        sfkt_cli.load_student(tmp_path)
    with pytest.raises(RunError, match="sfkt transfer --method shot"):
        sfkt_cli.load_student(untrained_run.folder, method="shot")
    shutil.copytree(untrained_run.path("transfer/tgkt"), tmp_path / "export" / "student")
    assert sfkt_cli.load_student(tmp_path / "export").classes
    (tmp_path / "export" / "student.onnx").write_bytes(b"")
    with pytest.raises(RunError, match=r"student\.onnx is a file: give a run.* folder.* \.onnx"):
        sfkt_cli.load_student(tmp_path / "export" / "student.onnx")
    many = [str(tmp_path / f"{number}.png") for number in range(13)]
    with pytest.raises(DataError, match=r"(?s)13 of 13 images.*9\.png.*\n  and 3 more") as caught:
        predict(untrained_config, untrained_run, many, output=tmp_path / "out.csv")
    assert "10.png" not in str(caught.value)
    with pytest.raises(DataError, match="holds no student"):
        sfkt_cli.load_student(untrained_run.path("source"))


def test_a_student_reads_images_as_those_it_was_trained_on(
    untrained_run: Run, untrained_config: Config, depth_files: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = Run(Path(shutil.copytree(untrained_run.folder, tmp_path / "run")), force=True)
    folder, before = run.path("transfer/tgkt"), open_store(run.transfer_store).digest
    write_record(
        folder / "done.json",
        {"stage": "transfer/tgkt", "settings": {}, "inputs": {"transfer.h5": before}},
    )
    wide = tmp_path / "wide.npy"
    np.save(wide, np.pad(read_depth(depth_files / "003.png").repeat(3, 1), ((0, 0), (5, 0))))
    expected = sfkt_cli.load_student(run.folder).predict(wide)
    assert "earlier" not in capsys.readouterr().err
    config = untrained_config.model_copy(update={"image_size": 32})
    squashed = config.model_copy(
        update={"prepare": config.prepare.model_copy(update={"fit": "squash"})}
    )
    prepare(squashed, run)
    assert sfkt_cli.load_student(run.folder).predict(wide) == expected
    assert "was made from an earlier transfer.h5" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(RunError, match=r"image_size 16 \(now 32\), fit 'crop' \(now 'squash'\)"):
        export(squashed, run, formats=["safetensors"])
    (folder / "config.yaml").unlink()
    alone = shutil.copytree(folder, tmp_path / "alone")
    assert sfkt_cli.load_student(alone).predict(wide) == expected


def test_a_student_that_does_not_tell_its_sensor_is_to_be_trained_again(
    untrained_run: Run, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(untrained_run.path("transfer/tgkt"), tmp_path / "tgkt"))
    card = {n: value for n, value in load_model(folder).card.as_json().items() if n != "sensor"}
    write_record(folder / "model.json", card)
    for path in (folder, untrained_run.path("source"), untrained_run.path("bridge")):
        with pytest.raises(DataError, match=rf"{path} .*sfkt transfer --force"):
            sfkt_cli.load_student(path)


def test_cells_that_spreadsheets_would_run_are_quoted() -> None:
    rows = [(Path("@new/u.png"), Prediction("-x", 1.0, (("-x", 1.0),)))]
    expected = ["path,class,probability,warning", "@new/u.png,'-x,1.000000,"]
    assert to_csv(rows, 1).splitlines() == expected


FLAT = np.full((16, 16), 1500, np.uint16)
SLOPE = FLAT + np.arange(0, 800, 50, dtype=np.uint16)
NOISE = np.random.default_rng(0).integers(0, 300, (16, 16), dtype=np.uint16)


@pytest.mark.parametrize(
    ("image", "why"),
    [
        (SLOPE, ""),
        (SLOPE * (np.arange(16) > 0).astype(np.uint16), ""),
        (0 * FLAT, "no reading in 100% of the pixels"),
        (FLAT, "values differ by only 0"),
        (30_000 + NOISE, "values around 30,"),
        (NOISE, "values around 1"),
    ],
)
def test_images_that_cannot_be_of_this_sensor_are_doubted(
    image: NDArray[Any], why: str, untrained_run: Run
) -> None:
    usual = describe_images(open_store(untrained_run.transfer_store)["target/target"], True)
    found = doubt(image, usual, True)
    assert found.startswith(why)
    assert bool(found) is bool(why)


def test_a_doubted_image_has_a_warning_in_its_row(
    untrained_run: Run, untrained_config: Config, depth_files: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model = tmp_path / "student"
    shutil.copytree(untrained_run.path("transfer/tgkt"), model)
    images = open_store(untrained_run.transfer_store)["target/target"]
    saved = load_model(model)
    save_model(
        Stage("transfer/tgkt", model, Config(), {}), saved.module, kind="classifier",
        architecture=saved.card.architecture, classes=saved.card.classes,
        encoding=saved.card.encoding, sensor=saved.card.sensor,
        images=describe_images(images, True),
    )  # fmt: skip
    Image.fromarray(0 * FLAT).save(tmp_path / "black.png")
    output = tmp_path / "out.csv"
    paths = [str(tmp_path / "black.png"), str(depth_files / "000.png")]
    shots = tmp_path / "shots"
    predict(
        untrained_config, untrained_run, paths, output=output, model=model, threshold=0.01,
        save_images=shots,
    )  # fmt: skip
    black, good = csv.DictReader(io.StringIO(output.read_text()))
    assert black["warning"].startswith("no reading in 100%")
    assert black["class"] == "unknown"
    assert not good["warning"]
    assert good["class"] != "unknown"
    assert "1 of 2 images do not look like" in capsys.readouterr().err
    assert sorted(path.name for path in shots.iterdir()) == ["000000-black.png", "000001-000.png"]
    predict(untrained_config, untrained_run, paths[1:], output=output, threshold=0.999)
    (unsure,) = csv.DictReader(io.StringIO(output.read_text()))
    assert (unsure["class"], unsure["probability"]) == ("unknown", good["probability"])


def test_pictures_keep_their_proportions_and_have_short_names(
    untrained_run: Run, depth_files: Path, tmp_path: Path
) -> None:
    student = sfkt_cli.load_student(untrained_run.folder)
    answer = student.predict(depth_files / "000.png")
    for width, size in ((32, (256, 156)), (4, (256, 284)), (600, (600, 44))):
        long = Path(f"{width}{'ä' * 120}.png")
        save(tmp_path, 0, student, [np.ones((16, width), np.uint16)], [(long, answer)])
        (file,) = tmp_path.glob(f"000000-{width}*.png")
        with Image.open(file) as picture:
            assert picture.size == size


def test_an_empty_list_has_no_predictions(untrained_run: Run) -> None:
    assert sfkt_cli.load_student(untrained_run.folder).predict_stored([]) == []


def write_video(path: Path, images: Sequence[NDArray[np.uint16]]) -> None:
    cv2 = pytest.importorskip("cv2")
    writer = cv2.VideoWriter(
        str(path), cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*"FFV1"), 10, images[0].shape[::-1],
        [cv2.VIDEOWRITER_PROP_DEPTH, cv2.CV_16U, cv2.VIDEOWRITER_PROP_IS_COLOR, 0],
    )  # fmt: skip
    for image in images:
        writer.write(image)
    writer.release()


def test_frames_of_a_video_are_classified_like_images(
    untrained_run: Run, untrained_config: Config, tmp_path: Path
) -> None:
    images = list(open_store(untrained_run.transfer_store)["target/target"])
    video, output = tmp_path / "depth.mkv", tmp_path / "rows.csv"
    write_video(video, [image.repeat(2, axis=0).repeat(2, axis=1) for image in images])
    predict(untrained_config, untrained_run, [str(video)], output=output)
    rows = list(csv.DictReader(io.StringIO(output.read_text())))
    student = sfkt_cli.load_student(untrained_run.folder)
    assert [row["path"] for row in rows] == [f"{video}#{number}" for number in range(len(images))]
    assert [row["class"] for row in rows] == [student.predict(image).label for image in images]

    video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    with pytest.raises(DataError, match=r"ends after .* of \d+ frames") as caught:
        predict(untrained_config, untrained_run, [str(video)], output=output)
    kept = list(csv.DictReader(io.StringIO(output.read_text())))
    assert kept == rows[: len(kept)]
    assert f"ends after {len(kept)} of" in str(caught.value)
    address = "rtsp://me:sec@ret@127.0.0.1:9/1"
    with pytest.raises(DataError, match=r"rtsp://127\.0\.0\.1:9/1 cannot be opened"):
        next(frames(address, student.sensor))
    with pytest.raises(ConfigError, match=r"^rtsp://127\.0\.0\.1:9/1 is a video: give it alone"):
        predict(untrained_config, untrained_run, [address, "x.png"], output=output)


def test_holes_in_a_video_of_8_bit_stay_0(untrained_run: Run, tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    video = tmp_path / "depth.mp4"  # its values lie between 16 and 235
    image = np.full((48, 64), 120, np.uint8)
    image[8:24, 16:32] = 0
    writer = cv2.VideoWriter(
        str(video), cv2.VideoWriter_fourcc(*"mp4v"), 10, image.shape[::-1], isColor=False
    )
    for _ in range(3):
        writer.write(image)
    writer.release()
    sensor = replace(
        sfkt_cli.load_student(untrained_run.folder).sensor, unit="raw", dtype="uint8", image_size=48
    )
    _, stored = next(frames(str(video), sensor))
    assert (stored == 0).sum() == 16 * 16
    assert stored.max() == pytest.approx(120, abs=2)


def test_a_video_of_16_bit_is_refused_by_a_student_of_8(untrained_run: Run, tmp_path: Path) -> None:
    video = tmp_path / "depth.mkv"
    write_video(video, [np.full((48, 64), 1500, np.uint16)] * 3)
    sensor = replace(sfkt_cli.load_student(untrained_run.folder).sensor, unit="raw", dtype="uint8")
    with pytest.raises(DataError, match=r"depth\.mkv holds values of 16 bit, expected uint8"):
        next(frames(str(video), sensor))


def test_a_video_of_16_bit_keeps_its_values_where_a_student_takes_any(tmp_path: Path) -> None:
    video = tmp_path / "warm.mkv"
    write_video(video, [np.full((48, 64), 1500, np.uint16)] * 3)
    _, stored = next(frames(str(video), Sensor("thermal", "auto", "", 1, 48, "crop")))
    assert stored.dtype == np.uint16
    assert stored.min() == stored.max() == 1500


@pytest.fixture
def camera(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A camera as V4L2's: OpenCV tells the name of its frames as the fourcc, no pixel format."""
    cv2 = pytest.importorskip("cv2")

    class Camera:
        fourcc = "YUYV"
        images = [np.full((48, 64), 1500, np.uint16)]  # noqa: RUF012
        tells: dict[int, float] = {}  # noqa: RUF012
        times_ms = [-1.0]  # noqa: RUF012

        def __init__(self, number: int | str) -> None:
            self.left = list(self.images)

        def isOpened(self) -> bool:  # noqa: N802
            return True

        def get(self, property: int) -> float:
            name = int.from_bytes(self.fourcc.encode("latin-1"), "little")
            known = {cv2.CAP_PROP_FOURCC: name, cv2.CAP_PROP_FRAME_COUNT: 9}
            if property == cv2.CAP_PROP_POS_MSEC:
                return self.times_ms[len(self.images) - len(self.left) - 1]
            return float((known | self.tells).get(property, -1))

        def set(self, property: int, value: float) -> None:
            assert property == cv2.CAP_PROP_CONVERT_RGB

        def read(self) -> tuple[bool, NDArray[np.uint16]]:
            if not self.left:
                raise cv2.error("imdecode: !buf.empty()")
            return True, self.left.pop()

    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    return Camera


@pytest.mark.parametrize("name", ["Y16 ", "Y16\xa0", "Y12 "])
def test_a_camera_of_16_bit_is_refused_by_a_student_of_8(
    name: str, untrained_run: Run, camera: Any
) -> None:
    camera.fourcc = name
    sensor = replace(sfkt_cli.load_student(untrained_run.folder).sensor, unit="raw", dtype="uint8")
    with pytest.raises(DataError, match=r"0 holds values of 16 bit, expected uint8"):
        next(frames("0", sensor))


def test_a_camera_that_fails_otherwise_is_not_waited_for(
    camera: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(camera, "read", fail)
    with pytest.raises(MemoryError):
        next(frames("0", Sensor("thermal", "auto", "uint16", 1, 48, "crop")))


@pytest.mark.parametrize(
    ("entry", "told"), [("0", "0 has ended"), ("a.avi", r"a\.avi ends after 1 of")]
)
def test_a_frame_that_opencv_fails_at_ends_a_video(
    entry: str, told: str, untrained_run: Run, camera: Any
) -> None:
    seen = frames(entry, sfkt_cli.load_student(untrained_run.folder).sensor)
    name, image = next(seen)
    assert image.max() == 1500
    if entry == "0":
        assert datetime.fromisoformat(name.partition("#")[2]).utcoffset() is not None
    with pytest.raises(DataError, match=told):
        next(seen)


def test_a_video_with_a_pause_is_not_damaged(untrained_run: Run, camera: Any) -> None:
    cv2 = pytest.importorskip("cv2")
    sensor = sfkt_cli.load_student(untrained_run.folder).sensor
    camera.tells, camera.images = {cv2.CAP_PROP_FPS: 10}, camera.images * 2
    for begin_ms in (0, 5000):  # of the recording
        camera.times_ms = [begin_ms, begin_ms + 850]
        assert len(list(frames("a.avi", sensor))) == 2
        camera.times_ms = [begin_ms, begin_ms + 400]
        with pytest.raises(DataError, match="damaged"):
            list(frames("a.avi", sensor))


def test_the_thread_of_a_stream_ends_with_it() -> None:
    """Python must not end while OpenCV works in a thread: it would abort."""

    class Endless:
        def read(self) -> tuple[bool, NDArray[np.uint8]]:
            return True, np.zeros((4, 4), np.uint8)

    before = threading.active_count()
    frames_of_it = _newest(Endless())
    next(frames_of_it)
    assert threading.active_count() == before + 1
    frames_of_it.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_only_files_of_sun_rgbd_have_their_bits_rotated(
    untrained_run: Run, depth_files: Path, tmp_path: Path
) -> None:
    student = sfkt_cli.load_student(untrained_run.folder)
    depth_mm = student.read(depth_files / "000.png")
    student.sensor = replace(student.sensor, rotated=True)
    Image.fromarray((depth_mm << 3) | (depth_mm >> 13)).save(tmp_path / "rotated.png")
    np.testing.assert_array_equal(student.read(tmp_path / "rotated.png"), depth_mm)
    np.testing.assert_array_equal(student.sensor.fit_values(depth_mm), depth_mm)
    np.testing.assert_array_equal(student.sensor.fit_values(depth_mm / 1000.0), depth_mm)
    far = student.sensor.fit_values(np.full((16, 16), 9000, np.uint16))
    assert (far.dtype.name, far.max()) == ("uint16", 8000)  # as prepared files have it


@pytest.fixture
def shots(tmp_path: Path, depth_files: Path) -> Path:
    """A folder with an image."""
    (folder := tmp_path / "shots").mkdir()
    shutil.copy(depth_files / "000.png", folder / "a.png")
    return folder


@pytest.fixture
def follow(
    untrained_run: Run, untrained_config: Config, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[str]]:
    """Watches a folder while things happen between its looks; the names in its rows."""

    def follow(
        folder: Path | str, output: Path | None, *looks: Callable[[], object], **options: Any
    ) -> list[str]:
        left = [NOTHING, *looks]

        def wait(seconds: float) -> None:
            clock_of_files()
            if not left:
                raise Interrupted
            left.pop(0)()

        monkeypatch.setattr("time.sleep", wait)
        predict(
            untrained_config, untrained_run, [str(folder)], output=output, follow=True, **options
        )
        return [Path(row["path"]).name for row in rows_of(output or Path("stream.csv"))]

    return follow


def clock_of_files(sleep: Callable[[float], None] = time.sleep) -> None:
    """Wait for the clock of the file system, which is some milliseconds behind."""
    sleep(0.02)


def NOTHING() -> None:  # noqa: N802
    pass


def rows_of(output: Path) -> list[Any]:
    if not output.is_file():
        return []
    with output.open(newline="") as file:
        return [*(map(json.loads, file) if output.suffix == ".jsonl" else csv.DictReader(file))]


def test_a_watched_folder_gives_each_file_once_it_is_whole(
    depth_files: Path, tmp_path: Path, follow: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    whole = (depth_files / "000.png").read_bytes()
    seen = follow(
        tmp_path,
        tmp_path / "rows.csv",
        lambda: (tmp_path / "a.png").write_bytes(whole),
        lambda: (tmp_path / "b.png").write_bytes(whole[:90]),
        NOTHING,
        lambda: (tmp_path / "b.png").write_bytes(whole),
        NOTHING,
        lambda: (tmp_path / "a.png").unlink(),
    )
    assert seen == ["a.png", "b.png"]
    assert "b.png is damaged" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="watches folders"):
        follow(depth_files / "000.png", tmp_path / "rows.csv")


def test_a_watched_folder_may_change_while_it_is_listed(
    shots: Path, depth_files: Path, tmp_path: Path, follow: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    away = tmp_path / "away"
    seen = follow(
        shots,
        tmp_path / "rows.csv",
        lambda: (shots / "latest.png").symlink_to("latest.png"),
        lambda: (shots / "loop").symlink_to(shots),
        lambda: shots.rename(away),
        NOTHING,
        lambda: away.rename(shots),
        lambda: shutil.copy(depth_files / "000.png", shots / "b.png"),
        NOTHING,
    )
    assert seen == ["a.png", "b.png"]
    assert capsys.readouterr().err.count("shots cannot be read") == 1


def test_a_watched_image_that_cannot_be_read_is_tried_again(
    shots: Path, tmp_path: Path, follow: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    failures, read_bytes = [OSError("not connected")], Path.read_bytes

    def read_if_there(path: Path) -> bytes:
        if path.name == "a.png" and failures:
            raise failures[0]
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", read_if_there)
    assert follow(shots, tmp_path / "rows.csv", NOTHING, failures.pop, NOTHING) == ["a.png"]
    assert capsys.readouterr().err.count("a.png cannot be read") == 1


@pytest.mark.parametrize("folder", ["", "cam", "cam/day"])
def test_images_of_a_drive_that_comes_and_goes_have_one_row(
    folder: str, shots: Path, depth_files: Path, tmp_path: Path,
    follow: Callable[..., list[str]],
) -> None:  # fmt: skip
    output, mount, away = tmp_path / "rows.csv", shots / folder[:3], tmp_path / "away"
    (shots / folder).mkdir(parents=True, exist_ok=True)
    shutil.copy(depth_files / "001.png", shots / folder / "b.png")

    def unmount() -> None:
        mount.rename(away)
        mount.mkdir()

    def mount_again() -> None:
        mount.rmdir()
        away.rename(mount)

    expected = follow(shots, output, unmount, NOTHING, mount_again, NOTHING, NOTHING)
    assert sorted(expected) == ["a.png", "b.png"]
    unmount()
    assert follow(shots, output, NOTHING, mount_again, NOTHING, NOTHING) == expected


def test_the_rows_of_an_earlier_start_hold_under_another_name_of_the_folder(
    shots: Path, tmp_path: Path, follow: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "rows.csv"
    (tmp_path / "link").symlink_to(shots)
    monkeypatch.chdir(tmp_path)
    for folder in (shots, "shots", "../" + tmp_path.name + "/shots", "link"):
        assert follow(folder, output, NOTHING) == ["a.png"]


def test_an_image_that_changes_while_it_is_classified_gets_another_row(
    shots: Path, depth_files: Path, tmp_path: Path, follow: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    output, read_bytes, changed = tmp_path / "rows.csv", Path.read_bytes, list[object]()

    def read_before_a_change(path: Path) -> bytes:
        content = read_bytes(path)
        if path.name == "a.png" and not changed:
            changed.append(shutil.copy(depth_files / "001.png", path))
        return content

    monkeypatch.setattr(Path, "read_bytes", read_before_a_change)
    assert follow(shots, output) == ["a.png"]
    assert changed
    assert follow(shots, output, NOTHING) == ["a.png", "a.png"]


def test_one_doubted_image_hides_no_collapse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = RowWriter(tmp_path / "rows.csv", ("mug", "pot"), 1, at_once=False, endless=False)
    sure = Prediction("mug", 1.0, (("mug", 1.0), ("pot", 0.0)))
    black = replace(sure, warning="no reading")
    rows.add([(f"{number}.png", sure) for number in range(30)], "")
    rows.add([("black.png", black)], "")
    rows.finish()
    told = " ".join(capsys.readouterr().err.split())
    assert "1 of 31 images do not look like" in told
    assert "calls 100 % of the images 'mug'" in told


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_a_watched_folder_keeps_the_rows_of_an_earlier_start(
    name: str, shots: Path, depth_files: Path, tmp_path: Path, follow: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    output, odd = tmp_path / name, os.fsdecode(b"caf\xe9.png")
    (shots / "a.png").unlink()
    assert follow(shots, output) == []
    assert not output.exists()
    for file in ("a.png", odd):
        shutil.copy(depth_files / "000.png", shots / file)
        follow(shots, output)
    shutil.copy2(depth_files / "001.png", shots / "a.png")  # overwritten while nobody watched
    follow(shots, output)
    shutil.copy(depth_files / "000.png", shots / "c.png")
    capsys.readouterr()
    odd = "caf\\udce9.png" if output.suffix == ".csv" else odd
    assert follow(shots, output) == ["a.png", odd, "a.png", "c.png"]
    assert "3 rows of an earlier start" in capsys.readouterr().err
    rows = rows_of(output)
    assert list(rows[0])[-1] == "time"
    assert all(datetime.fromisoformat(row["time"]).utcoffset() is not None for row in rows)
    if output.suffix == ".csv":
        with pytest.raises(ConfigError, match=r"rows\.csv holds other columns.*--top-k"):
            follow(shots, output, top_k=2)


@pytest.mark.parametrize("damage", ["cut", "cut_time", "touched", "no_line_end"])
@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_an_image_that_was_overwritten_while_nobody_watched_gets_a_row(
    name: str, damage: str, shots: Path, depth_files: Path, tmp_path: Path,
    follow: Callable[..., list[str]],
) -> None:  # fmt: skip
    output = tmp_path / name
    shutil.copy(depth_files / "000.png", shots / "b.png")
    assert follow(shots, output) == ["a.png", "b.png"]
    shutil.copy(depth_files / "001.png", shots / "a.png")
    clock_of_files()
    if damage == "touched":  # as a spreadsheet's save does
        os.utime(output)
    else:  # a kill in the middle of a row
        end = {"cut": 60, "cut_time": 5, "no_line_end": 1}[damage]
        output.write_bytes(output.read_bytes()[:-end])
    whole = ["b.png"] * (damage in ("touched", "no_line_end"))
    again = ["a.png"] + ["b.png"] * (not whole)
    assert follow(shots, output) == ["a.png", *whole, *again]


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_a_stream_that_was_cut_in_its_first_line_goes_on(
    name: str, shots: Path, tmp_path: Path, follow: Callable[..., list[str]]
) -> None:
    follow(shots, output := tmp_path / name)
    written = output.read_bytes()
    for left in (5, 12, written.index(b"\n") - 1):
        output.write_bytes(written[:left])
        assert follow(shots, output) == ["a.png"]


def test_a_signal_while_rows_are_written_doubles_none(
    shots: Path, tmp_path: Path, follow: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    open_file = Path.open

    @contextlib.contextmanager
    def opened(path: Path, mode: str = "r", *more: Any, **named: Any) -> Iterator[IO[Any]]:
        with open_file(path, mode, *more, **named) as file:
            yield file
        if mode == "a+b":
            raise Interrupted

    monkeypatch.setattr(Path, "open", opened)
    assert follow(shots, tmp_path / "rows.csv", NOTHING) == ["a.png"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("labels.jsonl", '{"path": "a.png", "label": "dog", "by": "Anna"}'),
        ("labels.jsonl", '["path", 3]\n'),
        ("labels.csv", "path,label\na.png,dog"),
    ],
)
def test_files_of_others_are_not_appended_to(
    name: str, content: str, shots: Path, tmp_path: Path, follow: Callable[..., list[str]]
) -> None:
    (shots / "a.png").unlink()
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=r"labels.* holds other columns than path,class"):
        follow(shots, tmp_path / name)
    assert (tmp_path / name).read_text() == content


@pytest.mark.parametrize("name", ["stream.csv", "stream.jsonl"])
def test_rows_of_a_watched_folder_are_not_replaced(
    name: str, shots: Path, tmp_path: Path, follow: Callable[..., list[str]],
    untrained_run: Run, untrained_config: Config, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    predict(untrained_config, untrained_run, [str(shots)])  # into another file
    output = Path(name)
    follow(shots, output if output.suffix == ".jsonl" else None)
    before = output.read_text()
    with pytest.raises(ConfigError, match=r"stream.* holds rows of a watched folder or camera"):
        predict(untrained_config, untrained_run, [str(shots)], output=output)
    assert output.read_text() == before
    assert Path("predictions.csv").is_file()


def test_rows_of_a_stream_may_be_rotated(
    shots: Path, depth_files: Path, tmp_path: Path, follow: Callable[..., list[str]]
) -> None:
    output, rotated = tmp_path / "rows.csv", tmp_path / "rows.csv.1"

    def rotate() -> None:
        output.rename(rotated)
        shutil.copy(depth_files / "001.png", shots / "b.png")

    def truncate() -> None:
        output.write_text("")
        shutil.copy(depth_files / "001.png", shots / "c.png")

    assert follow(shots, output, rotate, NOTHING) == ["b.png"]
    assert [Path(row["path"]).name for row in rows_of(rotated)] == ["a.png"]
    assert follow(shots, output, truncate, NOTHING) == ["c.png"]


def test_a_stream_ends_where_its_rows_are_lost(
    shots: Path, depth_files: Path, tmp_path: Path, follow: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    output, unreached = tmp_path / "rows.csv", AssertionError("it went on")

    def go_on() -> None:
        raise unreached

    def fill_the_disk() -> None:
        output.rename(tmp_path / "earlier.csv")
        output.symlink_to("/dev/full")
        shutil.copy(depth_files / "001.png", shots / "b.png")

    for name in ("left", "lost"):
        monkeypatch.setattr(outlets, name, getattr(outlets, name))  # they are set for good
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        follow(shots, Path("-"), go_on)
    monkeypatch.setattr(outlets, "json", True)
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(OSError, match="No space left on device: 'standard output'"):
            follow(shots, Path("-"), go_on)
    monkeypatch.setattr(outlets, "json", False)
    with pytest.raises(OSError, match=r"No space left on device: .*rows\.csv"):
        follow(shots, output, fill_the_disk, NOTHING, go_on)


def test_the_place_that_a_link_leads_to_is_checked_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").symlink_to(tmp_path / "table" / "rows.csv")
    (tmp_path / "table").touch()
    with pytest.raises(ConfigError, match=r"rows\.csv cannot be written"):
        RowWriter(tmp_path / "rows.csv", ("mug", "pot"), 1, at_once=False, endless=False)


def test_scripts_are_told_of_each_file_that_cannot_be_read(
    shots: Path, tmp_path: Path, untrained_run: Run, untrained_config: Config,
    follow: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(outlets, "json", True)
    (bad := shots / "bad.png").touch()
    with pytest.raises(DataError, match="1 of 2 images"):
        predict(untrained_config, untrained_run, [str(shots)], output=tmp_path / "rows.csv")
    follow(shots, tmp_path / "stream.csv", NOTHING)
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    unread = [event for event in events if event["event"] == "unread"]
    assert [event["path"] for event in unread] == [str(bad)] * 2
    assert all("is empty" in event["reason"] for event in unread)


def test_a_link_that_leads_nowhere_does_not_stop_the_others(
    shots: Path, tmp_path: Path, untrained_run: Run, untrained_config: Config
) -> None:
    (shots / "latest.png").symlink_to("gone.png")
    output = tmp_path / "rows.csv"
    assert predict(untrained_config, untrained_run, [str(shots)], output=output)["images"] == 1


def test_a_video_that_is_stopped_says_whose_rows_are_there(
    untrained_run: Run, untrained_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    video, output = tmp_path / "depth.mkv", tmp_path / "rows.csv"
    write_video(video, [np.full((48, 64), 1500, np.uint16)] * (BATCH + 2))
    output.write_text("of an earlier command")
    softmax, left = torch.softmax, [1]

    def stop_after_a_batch(*given: Any, **more: Any) -> torch.Tensor:
        if not left:
            raise Interrupted
        left.pop()
        return softmax(*given, **more)

    monkeypatch.setattr(torch, "softmax", stop_after_a_batch)
    with pytest.raises(Interrupted, match=f"after {BATCH} images; .* has the rows until then"):
        predict(untrained_config, untrained_run, [str(video)], output=output)
    kept = output.read_text()
    with pytest.raises(Interrupted, match="after 0 images; nothing was written"):
        predict(untrained_config, untrained_run, [str(video)], output=output)
    assert output.read_text() == kept


def test_a_student_takes_the_content_of_a_file_and_cuts_batches(
    untrained_run: Run, depth_files: Path
) -> None:
    student = sfkt_cli.load_student(untrained_run.folder)
    path, sizes = depth_files / "003.png", list[int]()
    assert student.predict(path.read_bytes()) == student.predict(path)
    with pytest.raises(DataError, match="the image cannot be read as an image"):
        student.predict(b"no image")
    student.model.register_forward_hook(lambda model, given, _: sizes.append(len(given[0])))
    answers = student.predict_stored([student.read(path)] * (BATCH + 3))
    assert sizes == [BATCH, 3]
    assert len(answers) == BATCH + 3


def test_one_student_is_of_no_other_method(
    untrained_run: Run, untrained_config: Config, tmp_path: Path
) -> None:
    folder = untrained_run.path("transfer/tgkt")
    assert sfkt_cli.load_student(folder, method="tgkt").classes
    (tmp_path / "student.onnx").touch()
    for model in (folder, tmp_path, tmp_path / "student.onnx"):
        with pytest.raises(RunError, match=r"is one student.*leave --method shot out"):
            predict(
                untrained_config, untrained_run, ["x.png"], output=tmp_path / "rows.csv",
                model=model, method="shot",
            )  # fmt: skip


def test_a_student_of_an_earlier_source_model_is_told(
    untrained_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(Path(shutil.copytree(untrained_run.folder, tmp_path / "run")))
    done = run.path("transfer", "tgkt", "done.json")
    for inputs, told in (({}, False), ({"source": "earlier"}, True)):
        write_record(done, {"stage": "transfer/tgkt", "settings": {}, "inputs": inputs})
        sfkt_cli.load_student(run.folder)
        err = capsys.readouterr().err
        assert (
            "was made from an earlier source: run `sfkt transfer" in " ".join(err.split())
        ) == told
    run.path("source", "model.json").write_text("damaged")
    sfkt_cli.load_student(run.folder)  # which does without the source model
