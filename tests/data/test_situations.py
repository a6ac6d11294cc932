"""Files as people have them: read right, or refused by name; nothing goes wrong in silence."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from sfkt_cli.console import event, outlets, stage_log, warn
from sfkt_cli.data.archive import Container, list_files
from sfkt_cli.data.decode import decode_rgb, decode_target
from sfkt_cli.data.readers import read_archive
from sfkt_cli.data.readers.folders import find_manifest
from sfkt_cli.data.sensor import Sensor
from sfkt_cli.data.splits import choose_classes
from sfkt_cli.errors import ConfigError, DataError
from sfkt_cli.files import write_text
from sfkt_cli.rows import to_csv, to_jsonl
from sfkt_cli.stages.predict import expand
from sfkt_cli.student import Prediction
from tests.data.make_archives import (
    depth,
    encoded,
    folders,
    manifest,
    npy,
    save,
    scene,
    settings_of,
    tiff,
    zipped,
)

Pixels = NDArray[Any]
COMPRESSIONS = (None, "lzw", "zlib", "packbits", "lzma", "zstd", "png", "jpeg2000", "jpegxl")


def pixels_of(seed: int, shape: tuple[int, ...], dtype: str, high: int = 1 << 16) -> Pixels:
    top = min(high, np.iinfo(dtype).max + 1 if np.dtype(dtype).kind in "iu" else high)
    return np.random.default_rng(seed).integers(0, top, shape).astype(dtype)


def pnm(pixels: Pixels, maxval: int, *, raw: bool) -> bytes:
    height, width = pixels.shape[:2]
    kind = (6 if raw else 3) if pixels.ndim == 3 else (5 if raw else 2)
    header = f"P{kind}\n# made\n{width} {height}\n{maxval}\n".encode()
    if raw:
        return header + pixels.astype(np.uint8 if maxval < 256 else ">u2").tobytes()
    return header + b"\n".join(b"%d" % sample for sample in pixels.ravel())


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 999), st.integers(1, 40), st.integers(1, 40), st.integers(1, 4),
    st.sampled_from(["uint8", "uint16", "int32", "float32"]), st.data(),
)  # fmt: skip
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_tiff_files_have_the_same_pixels_whatever_their_compression(
    compression: str | None, seed: int, height: int, width: int, channels: int, dtype: str,
    data: st.DataObject,
) -> None:  # fmt: skip
    orders = "<>"
    if compression in ("png", "jpegxl", "jpeg2000"):
        orders, dtype = "<", data.draw(st.sampled_from(["uint8", "uint16"]))
    pixels = pixels_of(seed, (height, width, channels)[: 3 if channels > 1 else 2], dtype)
    how: dict[str, Any] = {"compression": compression}
    if channels == 3:
        how["photometric"] = "rgb"
    if data.draw(st.booleans()) and compression in ("lzw", "zlib", "zstd"):
        how["predictor"] = True
    if data.draw(st.booleans()) and compression != "png":
        how["tile"] = (16, 32)
    if channels > 1:
        how["planarconfig"] = data.draw(st.sampled_from(["contig", "separate"]))
        if how["planarconfig"] == "separate":
            pixels = np.ascontiguousarray(np.moveaxis(pixels, 2, 0))
    content = tiff(pixels, byteorder=data.draw(st.sampled_from(orders)), **how)
    if how.get("planarconfig") == "separate":
        pixels = np.moveaxis(pixels, 0, 2)
    np.testing.assert_array_equal(decode_target(content, "a.tiff"), pixels)
    if dtype == "uint8" and channels in (3, 4):
        np.testing.assert_array_equal(decode_rgb(content, "a.tiff"), pixels[:, :, :3])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 999), st.integers(1, 40), st.integers(1, 40),
    st.sampled_from(["PNG", "BMP", "WEBP", "NPY", "PNM"]), st.data(),
)  # fmt: skip
def test_other_files_have_the_pixels_that_were_written(
    seed: int, height: int, width: int, kind: str, data: st.DataObject
) -> None:
    kinds = {
        "PNG": ("uint8 1", "uint8 2", "uint8 3", "uint8 4", "uint16 1"),
        "BMP": ("uint8 1", "uint8 3"),
        "WEBP": ("uint8 3", "uint8 4"),
        "NPY": ("uint8 1", "uint8 3", "uint16 4", ">i4 2", "float32 3", "float64 1"),
        "PNM": ("uint16 1", "uint8 3"),
    }
    dtype, _, channels = data.draw(st.sampled_from(kinds[kind])).partition(" ")
    shape = (height, width, int(channels))[: 3 if channels > "1" else 2]
    maxval = 255 if channels == "3" else data.draw(st.integers(1, 65535))
    pixels = pixels_of(seed, shape, dtype, maxval + 1 if kind == "PNM" else 1 << 16)
    if kind == "NPY":
        file = io.BytesIO()
        np.save(file, np.asfortranarray(pixels) if seed % 2 else pixels)
        content = file.getvalue()
    elif kind == "PNM":
        content = pnm(pixels, maxval, raw=data.draw(st.booleans()))
    else:
        content = encoded(
            pixels, kind, **{"lossless": True, "exact": True} if kind == "WEBP" else {}
        )
    np.testing.assert_array_equal(decode_target(content, f"a.{kind.lower()}"), pixels)
    if dtype == "uint8" and channels in ("3", "4"):
        np.testing.assert_array_equal(decode_rgb(content, "a"), pixels[:, :, :3])


@pytest.mark.parametrize("maxval", [15, 255, 1023, 4095, 16383, 65535])
def test_grey_pnm_samples_are_not_stretched(maxval: int) -> None:
    stored = decode_target(pnm(np.array([[1, maxval]]), maxval, raw=True), "a.pgm")
    assert stored.tolist() == [[1, maxval]]
    assert stored.dtype == (np.uint8 if maxval < 256 else np.uint16)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (pnm(np.zeros((2, 2, 3), int), 31, raw=True), "maxval 31, expected 8-bit colour"),
        (pnm(np.zeros((2, 2), int), 255, raw=True) + b"P5 1 1 255 x", "more than one picture"),
        (pnm(np.zeros((2, 2), int), 255, raw=True)[:-1], "cut off"),
        (pnm(np.zeros((2, 2), int), 4095, raw=True)[:-1], "cut off"),
        (pnm(np.zeros((2, 2), int), 255, raw=False)[:-1], "cut off"),
        (pnm(np.full((2, 2), 9), 8, raw=False), "samples up to 9, maxval is 8"),
        (pnm(np.full((2, 2), -1), 8, raw=False), "damaged"),
        (b"P5 2 2", "cut off"),
        (b"P5 2 2 70000 \0\0\0\0\0\0\0\0", "maxval 70000"),
    ],
)
def test_pnm_files_that_mean_something_else_are_refused(content: bytes, told: str) -> None:
    with pytest.raises(DataError, match=rf"a\.ppm .*{told}"):
        decode_target(content, "a.ppm")


def test_tiff_files_of_several_pages() -> None:
    bands = pixels_of(0, (4, 5, 6), "uint16")
    np.testing.assert_array_equal(decode_target(tiff(bands), "a.tif"), np.moveaxis(bands, 0, 2))
    thumbnail = io.BytesIO()
    with tifffile.TiffWriter(thumbnail) as writer:
        writer.write(bands[0, :2, :2], photometric="minisblack", metadata=None)
        writer.write(bands[0], photometric="minisblack", metadata=None)
    behind = io.BytesIO()
    with tifffile.TiffWriter(behind) as writer:
        writer.write(bands[0, :2, :2], photometric="minisblack", metadata=None, subifds=1)
        writer.write(bands[0], photometric="minisblack", metadata=None)
    stack = io.BytesIO()
    tifffile.imwrite(stack, pixels_of(0, (9, 5, 6), "uint16"), imagej=True)
    channels_last = io.BytesIO()
    tifffile.imwrite(channels_last, bands.reshape(6, 10, 2), photometric="minisblack")
    for content, told in (
        (thumbnail.getvalue(), "2 pages"),
        (behind.getvalue(), "2 pages"),
        (tiff(pixels_of(0, (7, 5, 6), "uint16")), "7 pages"),
        (stack.getvalue(), "9"),
        (channels_last.getvalue(), "6 pages"),
        (tiff(pixels_of(0, (2, 5, 6, 3), "uint8"), photometric="rgb"), "2 pages"),
    ):
        for decode in (decode_target, decode_rgb):
            with pytest.raises(DataError, match=rf"a\.tif .*{told}"):
                decode(content, "a.tif")


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_animated_images_are_refused(kind: str) -> None:
    file, frames = io.BytesIO(), [Image.fromarray(pixels_of(n, (9, 9, 3), "uint8")) for n in (1, 2)]
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match="holds 2 pictures"):
        decode_rgb(file.getvalue(), "a.png")


@pytest.mark.parametrize("mode", ["P", "CMYK", "LAB", "YCbCr", "1"])
def test_tiff_files_of_other_colours_are_refused(mode: str) -> None:
    file = io.BytesIO()
    Image.fromarray(pixels_of(0, (9, 9, 3), "uint8")).convert(mode).save(file, "TIFF")
    for decode in (decode_target, decode_rgb):
        with pytest.raises(DataError, match=r"a\.tif has .*expected"):
            decode(file.getvalue(), "a.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiff_files_are_turned_as_other_images_are(orientation: int) -> None:
    pixels, exif = pixels_of(0, (6, 9, 3), "uint8"), Image.Exif()
    exif[0x0112] = orientation
    turned = decode_rgb(encoded(pixels, "PNG", exif=exif), "a.png")
    content = tiff(pixels, photometric="rgb", extratags=[(274, 3, 1, orientation, True)])
    for decode in (decode_target, decode_rgb):
        np.testing.assert_array_equal(decode(content, "a.tif"), turned)


def test_photographs_in_tiff_files_have_their_colours() -> None:
    coarse = Image.fromarray(pixels_of(0, (4, 5, 3), "uint8"))
    content = encoded(np.asarray(coarse.resize((80, 60))), "TIFF", compression="jpeg")
    shown = Image.open(io.BytesIO(content)).convert("RGB")
    np.testing.assert_allclose(np.asarray(decode_rgb(content, "a.tif")), np.asarray(shown), atol=2)


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (lambda pixels: tiff(pixels, compression="zlib"), "a.tif"),
        (lambda pixels: tiff(pixels[None].repeat(4, 0), compression="zlib"), "a.tif"),
        (lambda pixels: encoded(pixels, "PNG"), "a.png"),
        (lambda pixels: pnm(pixels, 9, raw=True), "a.pgm"),
        (npy, "a.npy"),
    ],
)
def test_no_file_is_larger_than_the_largest_allowed(
    write: Callable[[Pixels], bytes], name: str
) -> None:
    content = write(np.zeros((10, 20), np.uint8))
    assert decode_target(content, name, 200).shape[:2] == (10, 20)
    sensor = Sensor("nir", "raw", "", 0, 8, "crop", max_pixels=199)
    told = rf"{name} has 20 x 10 pixels.*max_pixels = 199"
    with pytest.raises(DataError, match=told):
        decode_target(content, name, 199)
    with pytest.raises(DataError, match=told):
        sensor.decode(content, name)


@pytest.mark.parametrize("dtype", ["int16", "int32", "int64", "uint32"])
def test_arrays_of_other_integers_do_not_wrap_around(dtype: str) -> None:
    sensor = Sensor("depth", "auto", "uint16", 1, 30, "crop")
    millimetres = depth(0)
    stored = sensor.fit_values(millimetres.astype(dtype))
    np.testing.assert_array_equal(stored, sensor.fit_values(millimetres))
    for wrong in (-1, 65536):
        if np.iinfo(dtype).min <= wrong <= np.iinfo(dtype).max:
            with pytest.raises(DataError, match=f"{wrong}.*expected 0..65535"):
                sensor.fit_values(np.full((30, 30), wrong, dtype))


@pytest.mark.parametrize("top", ["", "mine/"])
@pytest.mark.parametrize("name", ["manifest.csv", "Manifest.CSV", "lists/own.csv"])
def test_a_manifest_in_a_zip_file(name: str, top: str, tmp_path: Path) -> None:
    root = manifest(tmp_path / "mine")
    expected = read_archive(settings_of("folders", root)).records
    (root / name).parent.mkdir(exist_ok=True)
    (root / "manifest.csv").rename(root / name)
    chosen = {"manifest": name} if "/" in name else {}
    place = zipped(root, top)
    shutil.rmtree(root)
    archive = read_archive(settings_of("folders", place, folders=chosen))
    assert [r.parts for r in archive.records] == [r.parts for r in expected]
    assert [(r.id, r.label, r.group) for r in archive.records] == [
        (r.id, r.label, r.group) for r in expected
    ]
    assert archive.loader.target(archive.records[0]).any()


def test_a_manifest_with_semicolons(tmp_path: Path) -> None:
    root = manifest(tmp_path / "mine")
    expected = read_archive(settings_of("folders", root)).records
    commas = (root / "manifest.csv").read_text(encoding="utf-8")
    for first in ("", "sep=;\n"):
        text = first + commas.replace(",", ";")
        (root / "manifest.csv").write_text(text, encoding="utf-8-sig")
        assert read_archive(settings_of("folders", root)).records == expected
    (root / "manifest.csv").write_text(f"{text}depth/0.png;mug\n", encoding="utf-8")
    with pytest.raises(DataError, match="line 15: 2 columns, the first line has 5"):
        read_archive(settings_of("folders", root))


def test_what_keeps_a_path_of_a_manifest_from_being_found_is_told(tmp_path: Path) -> None:
    root = manifest(tmp_path / "mine")
    (root / ".depth").mkdir()
    for name, told in (
        ("Depth/0.PNG", "did you mean depth/0.png"), (".depth/0.png", "hidden"), ("none.png", ""),
        ("../depth/0.png", "or below$"),
    ):  # fmt: skip
        text = f"target,label\n{name},mug\n"
        (root / "manifest.csv").write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=f"is not in .*relative to it.*{told}"):
            read_archive(settings_of("folders", root))


def test_classes_whose_names_differ_in_case_are_told(tmp_path: Path) -> None:
    root = folders(tmp_path / "mine", ("mug", "pot", "Mug"))
    (note,) = read_archive(settings_of("folders", root)).notes
    assert "Mug and mug" in note
    assert "pot" not in note


def test_cells_of_json_lines_are_those_of_csv(tmp_path: Path) -> None:
    root = manifest(tmp_path / "mine")
    expected = read_archive(settings_of("folders", root)).records
    with (root / "manifest.csv").open(encoding="utf-8") as file:
        lines = [json.dumps({k: f" {v} " for k, v in row.items()}) for row in csv.DictReader(file)]
    (root / "manifest.csv").unlink()
    (root / "manifest.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert read_archive(settings_of("folders", root)).records == expected


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("manifest.csv", "target,label, target\ndepth/0.png,mug,depth/1.png\n"),
        ("manifest.jsonl", '{"target": "depth/0.png", "target": "depth/1.png"}\n'),
        ("manifest.csv", "target,label\ndepth/0.png,mug\ndepth/0.png,pot\n"),
    ],
)
def test_a_manifest_that_says_a_thing_twice_is_refused(
    name: str, text: str, tmp_path: Path
) -> None:
    root = manifest(tmp_path / "mine")
    (root / "manifest.csv").unlink()
    (root / name).write_text(text, encoding="utf-8")
    told = rf"{name}, line 1.*'target' is given twice|mine: depth/0.png is listed twice"
    with pytest.raises(DataError, match=told):
        read_archive(settings_of("folders", root))


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        *(({"label": value}, "line 1.*(as a text|write null)")
          for value in (1.0, float("nan"), True, ["mug"], {"name": "mug"})),
        *(({"group": group}, "line 1: group .* is not a single line")
          for group in ("hall\n2", "\ud83d", "\0")),
    ],
)  # fmt: skip
def test_a_cell_of_json_lines_that_is_neither_a_text_nor_a_number_is_refused(
    entry: dict[str, object], told: str, tmp_path: Path
) -> None:
    root = manifest(tmp_path / "mine")
    (root / "manifest.csv").unlink()
    line = json.dumps({"target": "depth/0.png", **entry})
    (root / "manifest.jsonl").write_text(line, encoding="utf-8")
    with pytest.raises(DataError, match=rf"manifest\.jsonl, {told}"):
        read_archive(settings_of("folders", root))


def test_a_cell_of_csv_with_a_line_break_is_refused(tmp_path: Path) -> None:
    root = manifest(tmp_path / "mine")
    (root / "manifest.csv").write_text('target,label\ndepth/0.png,"mu\ng"\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"line 3: label 'mu\\ng' is not a single line of text"):
        read_archive(settings_of("folders", root))


def test_a_manifest_is_found_among_many_files_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    views = ("ti/rgb", "ti/target")
    names = sorted(f"{view}/{number:06d}.png" for view in views for number in range(10_000))
    monkeypatch.setattr(Container, "names", lambda _: names)
    (tmp_path / "a.png").touch()
    start = time.perf_counter()
    assert find_manifest(tmp_path, None) is None
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", r"manifest\.csv holds no target images"),
        ("rgb,target,label,role,group\n", r"manifest\.csv holds no target images"),
        ("depth,class\ndepth/0.png,mug\n", r"manifest\.csv: column 'class', expected rgb"),
        ("rgb,target\ndepth/0.png,depth/0.png\n", r"line 2: rgb and target are both depth/0"),
    ],
)
def test_a_manifest_that_lists_no_images_or_one_for_two_is_refused(
    text: str, told: str, tmp_path: Path
) -> None:
    root = manifest(tmp_path)
    (root / "manifest.csv").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=told):
        read_archive(settings_of("folders", root))


def test_of_two_manifests_in_one_folder_none_is_taken(tmp_path: Path) -> None:
    root = manifest(tmp_path)
    (root / "manifest.jsonl").write_text('{"target": "depth/0.png"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"manifest\.csv and manifest\.jsonl: choose one"):
        read_archive(settings_of("folders", root))
    chosen = settings_of("folders", root, folders={"manifest": "manifest.jsonl"})
    assert len(read_archive(chosen).records) == 1


def test_of_two_manifests_that_differ_in_case_the_one_of_the_chosen_name_is_taken(
    tmp_path: Path,
) -> None:
    root, archive = manifest(tmp_path / "mine"), tmp_path / "mine.zip"  # folders may ignore case
    with zipfile.ZipFile(archive, "w") as file:
        for path in root.rglob("*.*"):
            file.write(path, path.relative_to(root))
        file.writestr("Manifest.csv", "target\ndepth/0.png\n")
    with pytest.raises(DataError, match="choose one with"):
        read_archive(settings_of("folders", archive))
    every = read_archive(settings_of("folders", root)).records
    for name, count in (("manifest.csv", len(every)), ("Manifest.csv", 1)):
        chosen = settings_of("folders", archive, folders={"manifest": name})
        assert len(read_archive(chosen).records) == count


def test_folders_within_a_class_are_told_to_be_groups(tmp_path: Path) -> None:
    root = folders(tmp_path)
    assert not read_archive(settings_of("folders", root)).facts
    for animal in ("cat", "dog"):
        save(root / f"tr/animals/{animal}/0.png", depth(0))
    (fact,) = read_archive(settings_of("folders", root)).facts
    assert "groups, not classes: tr/animals/cat" in fact


def test_a_manifest_deep_in_an_archive_is_a_note(tmp_path: Path) -> None:
    root = folders(tmp_path / "mine")
    (root / "tr/mug/manifest.csv").write_text("rgb,target\n")
    assert {r.label for r in read_archive(settings_of("folders", root)).records} == {
        "mug",
        "pot",
        None,
    }


@pytest.mark.parametrize("beside", ["README.txt", "runs/folders/log.txt", "pictures/0.png"])
def test_a_manifest_is_read_whatever_lies_beside_its_folder(beside: str, tmp_path: Path) -> None:
    root = manifest(tmp_path / "data/mine")
    folders(root)
    expected = read_archive(settings_of("folders", root))
    (tmp_path / "data" / beside).parent.mkdir(parents=True, exist_ok=True)
    save(tmp_path / "0.png", depth(0))
    (tmp_path / "0.png").rename(tmp_path / "data" / beside)
    archive = read_archive(settings_of("folders", tmp_path / "data"))
    assert archive.records == expected.records
    assert any("mine/manifest.csv" in fact for fact in archive.facts)
    assert any("in no line" in note for note in archive.notes)


def test_a_manifest_outside_of_the_tree_is_not_read(tmp_path: Path) -> None:
    expected = read_archive(settings_of("folders", folders(tmp_path))).records
    manifest(tmp_path / "earlier")
    assert read_archive(settings_of("folders", tmp_path)).records == expected
    for place in ("first", "second"):
        manifest(tmp_path / "two" / place)
    with pytest.raises(DataError, match=r"first/manifest\.csv and second/.*: choose one"):
        read_archive(settings_of("folders", tmp_path / "two"))


@pytest.mark.parametrize("top", ["", "mine/"])
@pytest.mark.parametrize("inside", [True, False])
def test_a_chosen_manifest_in_the_archive_comes_before_one_in_the_working_folder(
    inside: bool, top: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = manifest(tmp_path / "mine")
    text = (root / "manifest.csv").read_text(encoding="utf-8")
    (root / "manifest.csv").rename(root / "list.csv" if inside else tmp_path / "aside.csv")
    monkeypatch.chdir(tmp_path)
    Path("list.csv").write_text(text.replace("room0", "another"), encoding="utf-8")
    archive = read_archive(
        settings_of("folders", zipped(root, top), folders={"manifest": "list.csv"})
    )
    assert len(archive.records) == 12
    assert ("another" in {record.group for record in archive.records}) == (not inside)


def test_an_image_in_two_lines_of_a_manifest(tmp_path: Path) -> None:
    root = manifest(tmp_path / "mine")
    lines = [
        "img/0 ä.jpg,depth/0.png,mug,,", "img/1 ä.jpg,depth/0.png,mug,,",
        ",depth/2.png,,target,", "img/2 ä.jpg,depth/2.png,,ti,", ",depth/3.png,,target,",
    ]  # fmt: skip
    text = "\n".join(["rgb,target,label,role,group", *lines])
    (root / "manifest.csv").write_text(text, encoding="utf-8")
    records = read_archive(settings_of("folders", root)).records
    assert len({record.id for record in records}) == 5
    assert {r.target: r.group for r in records}.keys() == {f"depth/{n}.png" for n in (0, 2, 3)}
    assert len({record.group for record in records}) == 3
    chain = ["img/0 ä.jpg,depth/1.png,mug,,", "img/4 ä.jpg,depth/4.png,mug,,kitchen"]
    chain += ["img/5 ä.jpg,depth/4.png,mug,,hall", "img/5 ä.jpg,depth/1.png,mug,,"]
    (root / "manifest.csv").write_text("\n".join([text, *chain]), encoding="utf-8")
    records = read_archive(settings_of("folders", root)).records
    linked = {r.group for r in records if r.target in [f"depth/{n}.png" for n in (0, 1, 4)]}
    assert len(linked) == 1
    (root / "manifest.csv").write_text(f"{text}\n{lines[0]}", encoding="utf-8")
    with pytest.raises(DataError, match="listed twice"):
        read_archive(settings_of("folders", root))


def test_links_that_lead_nowhere_or_in_a_circle_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folders(tmp_path / "mine")
    expected = read_archive(settings_of("folders", root)).records
    (root / "latest").symlink_to(".")
    (root / "tr/notes").symlink_to("nowhere")
    assert read_archive(settings_of("folders", root)).records == expected
    assert "lead nowhere" not in capsys.readouterr().err
    for name, end in (("8", "nowhere"), ("9", "9")):
        (root / f"tr/mug/target/{name}.png").symlink_to(f"{end}.png")
    assert read_archive(settings_of("folders", root)).records == expected
    assert list(expand([str(root / "tr/mug/target")]))
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("2 links that lead nowhere, such as") == 2


HIDDEN = [
    "tr/.ipynb_checkpoints/0.png", "tr/mug/rgb/.ipynb_checkpoints/0-checkpoint.jpg",
    "tr/mug/target/@eaDir/0.png", "tr/mug/target/._0.png", "tr/__MACOSX/mug/0.png",
    "ti/rgb/Thumbs.db", "tr/mug/.DS_Store", "tr/#recycle/0.png",
]  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
def test_hidden_and_system_folders_hold_no_images(packed: bool, tmp_path: Path) -> None:
    root = folders(tmp_path / "mine")
    expected = read_archive(settings_of("folders", root)).records
    for name in HIDDEN:
        save(root / "new.png", depth(0))
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "new.png").rename(root / name)
    archive = read_archive(settings_of("folders", zipped(root) if packed else root))
    assert archive.records == expected
    assert not archive.notes
    assert not {path.relative_to(root).as_posix() for path in expand([str(root)])} & set(HIDDEN)
    assert len(list(expand([f"{root}/tr/mug/target/*"]))) == 6


def test_images_that_are_not_read_are_counted_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folders(tmp_path / "mine")
    shutil.copy(root / "ti/rgb/0.jpg", root / "ti/rgb/9.JFIF")
    shutil.copy(root / "ti/target/0.png", root / "ti/target/9.png")
    shutil.copy(root / "tr/mug/rgb/0.jpg", root / "tr/mug/rgb/5.jpe")
    (root / "tr/mug/rgb/5.jpg").unlink()
    for name in ("tr/mug/rgb/7.heic", "tr/mug/rgb/8.heic", "ti/rgb/7.exr", "tr/notes.txt"):
        (root / name).write_bytes(b"")
    save(root / "more/0.png", depth(0))
    save(root / "cover.png", depth(0))
    archive = read_archive(settings_of("folders", root))
    assert len(archive.records) == 19
    unread, elsewhere = archive.notes
    assert "2 .heic, such as tr/mug/rgb/7.heic" in unread
    assert "1 .exr, such as ti/rgb/7.exr" in unread
    assert ".txt" not in unread
    assert "neither in tr nor in ti: 2, as cover.png" in elsewhere
    list(expand([str(root)]))
    assert "2 .heic, such as tr/mug/rgb/7.heic" in " ".join(capsys.readouterr().err.split())
    (root / "ti/rgb/5.jpg").rename(root / "ti/rgb/5.heic")
    with pytest.raises(DataError, match=r"no partner 5\.\*.*convert ti/rgb/5\.heic"):
        read_archive(settings_of("folders", root))
    with pytest.raises(DataError, match=r"7\.heic cannot be read.*convert it: PNG, JPEG"):
        decode_rgb(b"\0\0\0 ftypheic", "7.heic")


def test_a_folder_that_goes_while_it_is_listed_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    (tmp_path / "a.png").touch()
    scan = os.scandir

    def scan_and_remove(folder: Path) -> list[os.DirEntry[str]]:
        entries = list(scan(folder))
        (tmp_path / "gone").rmdir()
        return entries

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", scan_and_remove)
        files = list_files(tmp_path)
    assert list(files) == ["a.png"]
    with pytest.raises(DataError, match="gone cannot be read: No such file"):
        list_files(tmp_path / "gone")


def test_depth_in_units_of_its_own_with_values_that_mean_no_reading(tmp_path: Path) -> None:
    root = folders(tmp_path / "mine")
    for path in root.rglob("target/*.png"):
        steps = depth(0)[:, :30] * 5  # a fifth of a millimetre, as in TUM's files
        steps[steps == 0] = 65535
        save(path, steps)
    (warning,) = read_archive(settings_of("folders", root)).notes
    assert "% of the pixels of 6 depth images are 65535" in warning
    assert "folders.missing=[65535]" in warning
    own = {"scale": 0.2, "missing": [-1, 65535]}
    archive = read_archive(settings_of("folders", root, folders=own))
    assert not archive.notes
    np.testing.assert_array_equal(archive.loader.target(archive.records[0]), depth(0)[:, :30])
    sensor = Sensor("depth", "auto", "", 1, 30, "crop", scale=0.2, no_reading=(-1, 65535))
    for wanting in (-1, 65535):
        steps = np.where(depth(0) == 0, wanting, depth(0).astype(np.int32) * 5)[:, :30]
        np.testing.assert_array_equal(sensor.fit_values(steps), depth(0)[:, :30])
    metres = np.where(depth(0) == 0, np.finfo("f4").max, depth(0) / 1000)[:, :30]
    for no_reading in ((), (3.4028235e38,)):  # no Python warning either
        sensor = Sensor("depth", "auto", "", 1, 30, "crop", no_reading=no_reading)
        np.testing.assert_array_equal(sensor.fit_values(metres), depth(0)[:, :30])


@pytest.mark.parametrize(
    "own",
    [
        {"modality": "nir", "scale": 0.2},
        {"modality": "nir", "unit": "mm"},
        {"unit": "mm", "scale": 2.0},
        {"scale": 0.0},
    ],
)
def test_scales_and_missing_values_that_mean_nothing_are_refused(own: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="folders"):
        settings_of("folders", Path("mine"), folders=own)


LATIN = os.fsdecode(b"caf\xe9.png")


def test_file_names_that_are_not_utf_8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folders(tmp_path / "mine")
    save(root / "tr/mug/target" / LATIN, depth(0))
    save(root / "tr/mug/rgb" / LATIN, scene(0))
    with pytest.raises(DataError, match=r"caf\\udce9\.png' is not UTF-8: rename it"):
        read_archive(settings_of("folders", root))
    prediction = Prediction("mug", 1.0, (("mug", 1.0),))
    for text in (to_csv([(Path(LATIN), prediction)], 1), to_jsonl([(Path(LATIN), prediction)], 1)):
        write_text(tmp_path / "predictions", text)
    assert json.loads((tmp_path / "predictions").read_text())["path"] == LATIN
    monkeypatch.setattr("sys.stdin", io.StringIO(f"\ufeff{LATIN}\n"))
    assert list(expand(["-"])) == [Path(LATIN)]
    with stage_log("prepare", tmp_path / "log.txt"):
        warn(f"{LATIN} is left out")
    assert r"caf\udce9.png" in (tmp_path / "log.txt").read_text()
    outlets.json = True
    event("prediction", path=LATIN, classes=["Schüssel"])
    outlets.json = False
    line = capsys.readouterr().out
    assert line.isascii()
    assert json.loads(line)["path"] == LATIN


def test_a_terminal_that_knows_ascii_alone(tmp_path: Path) -> None:
    root = folders(tmp_path / "mine", ["Schüssel"])
    command = [sys.executable, "-m", "sfkt_cli", "config", "show", "--set"]
    done = subprocess.run(
        [*command, f"prepare.root={root}", "--set", "classes.tr=[Schüssel]"],
        env=os.environ | {"PYTHONIOENCODING": "ascii"}, cwd=tmp_path, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0
    assert rb"Sch\xfcssel" in done.stdout


def test_ids_of_long_names_fit_into_file_names(tmp_path: Path) -> None:
    for letter in ("急", "é", "x"):
        for number in range(2):
            place = "/".join([letter * (120 // len(letter.encode()))] * 2)
            save(tmp_path / f"mine/tr/{place}{number}.png", depth(0))
    ids = [record.id for record in read_archive(settings_of("folders", tmp_path / "mine")).records]
    assert len(set(ids)) == 6
    assert max(len(name.encode()) for name in ids) <= 103


def test_class_names_with_signs_of_patterns_and_two_spellings_of_an_umlaut(tmp_path: Path) -> None:
    root = folders(tmp_path / "mine", ["mug [red]", "mug r", "Schu\u0308ssel"])
    (root / "tr/Schüssel").mkdir()
    (root / "tr/Schu\u0308ssel/rgb").rename(root / "tr/Schüssel/rgb")
    (root / "tr/mug r/rgb/0.jpg").rename(root / "tr/mug r/rgb/o\u0308.jpg")
    (root / "tr/mug r/target/0.png").rename(root / "tr/mug r/target/ö.png")
    archive = read_archive(settings_of("folders", root))
    assert len(archive.records) == 24
    for names, classes in (
        (["mug [red]"], ["mug [red]"]),
        (["MUG [red]", "mug [a-z]"], ["mug [red]", "mug r"]),
        (["Schu\u0308ssel"], ["Schüssel"]),
        (["Schüssel"], ["Schüssel"]),
    ):
        config = settings_of("folders", root, classes={"tr": names})
        assert choose_classes(config.classes, archive)[0] == classes


def test_names_that_yaml_takes_for_something_else() -> None:
    for value, kind in ((1, "int"), (True, "bool")):
        with pytest.raises(ConfigError, match=f"{value}: YAML reads it as {kind}: put it into quo"):
            settings_of("folders", Path("mine"), classes={"tr": [value]})


def test_paths_in_a_manifest_that_are_absolute_or_untidy(tmp_path: Path) -> None:
    root = manifest(tmp_path / "mine")
    text = (root / "manifest.csv").read_text(encoding="utf-8")
    expected = read_archive(settings_of("folders", root)).records
    for there in (f"{root}/depth/", ".//depth/./", ".\\depth\\"):
        (root / "manifest.csv").write_text(text.replace("depth/", there), encoding="utf-8-sig")
        assert read_archive(settings_of("folders", root)).records == expected
    (tmp_path / "link").symlink_to(root)
    for top in (root, tmp_path / "link"):
        (root / "manifest.csv").write_text(text.replace("depth/", f"{top}/depth/"), "utf-8")
        for place in (root, tmp_path / "link"):
            assert read_archive(settings_of("folders", place)).records == expected
    (root / "manifest.csv").write_text(text.replace("depth/", "/elsewhere/"), encoding="utf-8")
    with pytest.raises(DataError, match=r"is not in .*mine.*: paths are relative to it"):
        read_archive(settings_of("folders", root))


def test_two_files_whose_names_read_alike_are_told(tmp_path: Path) -> None:
    root = manifest(tmp_path / "mine")
    text = (root / "manifest.csv").read_text(encoding="utf-8")
    first = next(path.stem for path in sorted((root / "depth").iterdir()))
    for name in ("o\u0308", "\xf6"):
        shutil.copy(root / f"depth/{first}.png", root / f"depth/{name}.png")
    archive = read_archive(settings_of("folders", root))  # no line names them
    (root / "manifest.csv").write_text(text.replace(f"depth/{first}", "depth/ö"), "utf-8")
    told = r"depth/ö\.png' is the name of 2 files.*'depth/o\\u0308\.png', 'depth/\\xf6\.png'"
    with pytest.raises(DataError, match=told):
        read_archive(settings_of("folders", root))
    (root / "depth/\xf6.png").unlink()
    assert len(read_archive(settings_of("folders", root)).records) == len(archive.records)
    for name in ("o\u0308", "\xf6"):
        save(tmp_path / f"tree/tr/cup/{name}.png", depth(0))
    with pytest.raises(DataError, match=r"xf6\.png' and .*o\\u0308\.png' have the same name"):
        read_archive(settings_of("folders", tmp_path / "tree"))


@pytest.mark.parametrize("sign", ["\u2028", "\x85"])
def test_lines_of_a_manifest_end_where_editors_end_them(sign: str, tmp_path: Path) -> None:
    root = manifest(tmp_path / "mine")
    text = (root / "manifest.csv").read_text(encoding="utf-8").replace("room0", f"a{sign}b")
    rows = list(csv.DictReader(io.StringIO(text)))
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    records = []
    for name, content in (
        ("manifest.csv", "\r\n".join(text.split("\n"))),
        ("manifest.csv", "\r".join(text.split("\n"))),
        ("manifest.jsonl", "\r\n".join(lines)),
    ):
        for path in root.glob("manifest.*"):
            path.unlink()
        (root / name).write_bytes(content.encode())
        records.append(read_archive(settings_of("folders", root)).records)
    assert f"a{sign}b" in {record.group for record in records[0]}
    assert records[0] == records[1] == records[2]


def test_groups_of_a_manifest_in_two_spellings_are_one(tmp_path: Path) -> None:
    root = manifest(tmp_path / "mine")
    text = (root / "manifest.csv").read_text(encoding="utf-8")
    for old, new in (("room0", "Küche"), ("room1", "Ku\u0308che")):
        text = text.replace(old, new)
    (root / "manifest.csv").write_text(text, encoding="utf-8")
    groups = [record.group for record in read_archive(settings_of("folders", root)).records]
    assert groups.count("Küche") == 6


def test_a_zip_file_with_backslashes(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "own.zip", "w") as archive:
        archive.writestr("tr\\mug\\0.png", b"")
    with pytest.raises(DataError, match="has backslashes between its folders: unpack it"):
        read_archive(settings_of("folders", tmp_path / "own.zip"))


def test_a_zip_file_whose_names_begin_with_the_folder_itself(tmp_path: Path) -> None:
    """As `tar -a -cf own.zip .` of macOS and Windows writes them."""
    root = folders(tmp_path / "mine")
    expected = read_archive(settings_of("folders", root)).records
    path = zipped(root, "./")
    with zipfile.ZipFile(path, "a") as packed:
        packed.writestr("./", b"")
        packed.writestr("./tr/.hidden.png", b"")
    archive = read_archive(settings_of("folders", path))
    assert archive.records == expected
    assert archive.loader.target(archive.records[0]).any()


def test_a_zip_file_whose_names_are_in_an_unknown_encoding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = zipped(folders(tmp_path / "mine", ["c__up"]))
    path.write_bytes(path.read_bytes().replace(b"c__up", "чашка".encode("cp866")))
    read_archive(settings_of("folders", path))
    assert "12 names is not known" in " ".join(capsys.readouterr().err.split())


def test_a_zip_file_with_times_in_its_names(tmp_path: Path) -> None:
    path = zipped(manifest(tmp_path / "mine"), "2024-05-01 10:30/")
    assert len(read_archive(settings_of("folders", path)).records) == 12


def test_a_zip_file_of_macos_with_names_that_it_does_not_call_utf_8(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = zipped(folders(tmp_path / "mine", ["Sch__ssel"]))
    path.write_bytes(path.read_bytes().replace(b"Sch__ssel", "Schüssel".encode()))
    archive = read_archive(settings_of("folders", path))
    assert {record.label for record in archive.records} == {"Schüssel", None}
    assert "encoding" not in capsys.readouterr().err
    assert all(archive.loader.target(record).any() for record in archive.records)


@pytest.mark.parametrize("mode", ["L", "LA", "CMYK"])
def test_rgb_images_of_other_colours(mode: str) -> None:
    kind = "JPEG" if mode == "CMYK" else "PNG"
    file = io.BytesIO()
    Image.new(mode, (9, 9)).save(file, kind)
    with pytest.raises(DataError, match=f"mode {mode}, .*convert it to RGB") as caught:
        decode_rgb(file.getvalue(), "a")
    assert ("swapped" in str(caught.value)) == (mode != "CMYK")


def test_damaged_tiff_files_that_a_tolerant_reader_would_fill_or_misread(
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = tiff(pixels_of(0, (24, 32), "uint16"), compression="lzw", rowsperstrip=4)
    with tifffile.TiffFile(io.BytesIO(whole)) as file:
        tags = {
            name: file.pages.first.tags[name].offset for name in ("Compression", "StripOffsets")
        }
    for place in tags.values():
        damaged = bytearray(whole)
        damaged[place + 3] ^= 32  # the tag's type
        with pytest.raises(DataError, match=r"a\.tif is damaged or cut off"):
            decode_target(bytes(damaged), "a.tif")
    assert not capsys.readouterr().err
