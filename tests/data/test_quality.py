"""What prepare says about the data: table, duplicates, alignment, and the picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from sfkt_cli.data.ingest import Sample, summarise_target
from sfkt_cli.data.pictures import Alignment, check_alignment, compare_edges, fill_holes
from sfkt_cli.data.readers import read_archive
from sfkt_cli.data.splits import list_class_rows
from sfkt_cli.data.store import open_store
from sfkt_cli.data.store_writer import writing
from sfkt_cli.errors import DataError
from sfkt_cli.settings.config import build
from sfkt_cli.settings.runs import Run
from sfkt_cli.stages.inspect import (
    Line,
    blank_images,
    duplicates,
    inspect,
    other_scale,
    repeated,
    samples_of_store,
    table_text,
    tabulate,
)
from sfkt_cli.stages.prepare import prepare
from tests.data.make_archives import save, scene

SIDE = 48


def pictures(count: int = 24) -> NDArray[np.uint8]:
    """Grey pictures (N, SIDE, SIDE) of some rectangles each, without any symmetry."""
    rng = np.random.default_rng(3)
    made = np.full((count, SIDE, SIDE), 90.0)
    for picture in made:
        for _ in range(7):
            left, upper = rng.integers(0, SIDE - 12, 2)
            wide, high = rng.integers(5, 20, 2)
            picture[upper : upper + high, left : left + wide] = rng.integers(20, 250)
    return made.astype(np.uint8)


@pytest.mark.parametrize(("factor", "told"), [(1, False), (3, False), (10, True), (0.1, True)])
@pytest.mark.parametrize("modality", ["depth", "nir"])
def test_ti_and_tr_images_in_different_units_are_told(
    modality: str, factor: float, told: bool, tmp_path: Path
) -> None:
    target = (pictures() * 10.0).astype(np.uint16)
    columns = {"ti/target": (target * factor).astype(np.uint16), "target/target": target}
    for part in ("ti", "target"):
        columns[f"{part}/id"] = np.array([b"%d" % n for n in range(len(target))])
    attrs = {"dataset": "made", "modality": modality, "unit": "raw", "classes": ["a"]}
    with writing(tmp_path / "t.h5", attrs, columns):
        pass
    assert bool(other_scale(open_store(tmp_path / "t.h5"))) == told


def check(tmp_path: Path, target: NDArray[Any]) -> Alignment:
    rgb = np.repeat(pictures(len(target))[:, :, :, None], 3, axis=3)
    ids = np.array([f"p{n}".encode() for n in range(len(rgb))])
    columns = {"ti/rgb": rgb, "ti/target": target, "ti/id": ids}
    attrs = {"dataset": "made", "modality": "nir", "unit": "raw", "classes": ["a"]}
    with writing(tmp_path / "t.h5", attrs, columns):
        pass
    found = check_alignment(open_store(tmp_path / "t.h5"))
    assert found is not None
    return found


def test_registered_pairs_raise_no_warning(tmp_path: Path) -> None:
    found = check(tmp_path, 255 - pictures() // 2)
    assert found.own > 0.8 > 0.3 > found.shifted
    assert found.summary().startswith("pairs look aligned: ")
    assert not found.warnings()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t[:, :, ::-1], "mirrored"),
        (lambda t: t[:, ::-1], "upside down"),
        (lambda t: t[:, ::-1, ::-1], "turned by 180"),
        (lambda t: np.rot90(t, 1, (1, 2)), "turned by"),
        (lambda t: np.roll(t, (4, -7), (1, 2)), "shifted by -7 pixels to the right and 4 down"),
        (lambda t: np.roll(t, 1, 0), "do not look registered"),
        (lambda t: t[[0, 5, 2, 3, 4, 1, *range(6, len(t))]], "p1 and p5 look swapped"),
    ],
)
def test_wrong_pairs_are_told(tmp_path: Path, change: Any, told: str) -> None:
    assert any(told in warning for warning in check(tmp_path, change(pictures())).warnings())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t, False),
        (lambda t: np.concatenate([t[:60], np.roll(t[60:], 1, 0)]), True),
        (lambda t: np.where(np.arange(96)[:, None, None] % 3 > 0, t, np.rot90(t, 1, (1, 2))), True),
    ],
)
def test_wrong_partners_of_some_pairs_are_told(tmp_path: Path, change: Any, told: bool) -> None:
    found = check(tmp_path, change(pictures(96)))
    assert any("hardly an edge in common, such as p" in text for text in found.warnings()) == told
    assert found.summary().startswith("pairs look aligned: ") != told


def test_one_pixel_of_a_small_store_is_no_shift() -> None:
    edges = pictures().astype(np.float32)
    edges -= edges.mean(axis=(1, 2), keepdims=True)
    edges /= np.linalg.norm(edges, axis=(1, 2), keepdims=True)
    ids = [f"p{n}" for n in range(len(edges))]
    lower = np.roll(edges, 2, axis=1)
    assert compare_edges(edges, lower, ids, scale=1.0).shift == (0, 2)
    assert compare_edges(edges, lower, ids, scale=0.5).shift == (0, 0)


def test_holes_are_filled_from_their_rim() -> None:
    depth = np.full((9, 9), 1000, np.uint16)
    depth[:, 5:] = 3000
    depth[2:7, 3:6] = 0
    filled = fill_holes(depth)
    assert filled.min() == 1000
    assert filled.max() == 3000
    assert fill_holes(np.zeros((4, 4), np.uint16)).max() == 0


def test_images_of_one_value_are_told() -> None:
    samples = [
        Sample("target", 0, "target-000000", "g", "", {"target": b"a"}, low=0, high=0, missing=1.0),
        Sample("target", 1, "target-000001", "g", "", {"target": b"b"}, low=7, high=7),
        Sample("target", 2, "target-000002", "g", "", {"target": b"c"}, low=7, high=9),
        Sample("source", 0, "cup-0", "g", "cup", {"rgb": b"d"}),
    ]
    (told,) = blank_images(samples)
    assert told.startswith("2 target images with one value everywhere, such as target-000000 in")
    assert not blank_images(samples[2:])


def test_images_with_two_labels_or_several_partners_are_told() -> None:
    def sample(part: str, number: int, label: str, target: bytes, rgb: bytes = b"") -> Sample:
        hashes = {"target": target} | ({"rgb": rgb} if rgb else {})
        return Sample(part, number, f"{part}{number}", "g", label, hashes, low=1, high=9)

    labelled = [sample("target", 0, "cup", b"1"), sample("target", 1, "cup", b"1")]
    pairs = [sample("ti", n, "", b"frozen", b"%d" % n) for n in range(4)]
    whole = [sample("ti", 4, "", b"2", b"4"), sample("ti", 5, "", b"2", b"4")]
    assert not repeated([*labelled, *pairs[:1], *whole])
    told = repeated([*labelled, sample("target", 2, "mug", b"1"), *pairs, *whole])
    assert [text.split(",")[0] for text in told] == [
        "3 target images in target",
        "4 target images in ti",
    ]
    assert "with different labels" in told[0]
    assert "target2," in told[0], "the one of another label"
    assert "beside different RGB images" in told[1]
    frozen = [*pairs, *(replace(s, label=s.id) for s in labelled)]
    assert len(repeated(frozen)) == 2
    assert not repeated(replace(s, low=0, high=0) for s in frozen)  # told as blank
    assert not repeated([*labelled, sample("target", 2, "", b"1")]), "it has no other label"
    alone = [sample("test", n, "cup", b"1", rgb) for n, rgb in enumerate((b"", b"5", b"5", b"6"))]
    assert not repeated(alone[:3]), "one has no RGB image"
    assert "test3," in repeated(alone)[0]


def test_duplicates_are_told_across_parts_only() -> None:
    samples = [
        Sample("source", 0, "a", "g", "x", {"rgb": b"1"}),
        Sample("source", 1, "b", "g", "x", {"rgb": b"1"}),
        Sample("test", 0, "c", "h", "x", {"rgb": b"1", "target": b"2"}),
        Sample("ti", 0, "d", "i", "", {"rgb": b"3", "target": b"2"}),
    ]
    assert duplicates(samples) == [
        "1 rgb image both in source and in test, such as a and c",
        "1 target image both in test and in ti, such as c and d",
    ]


def test_of_many_classes_the_rarest_are_shown() -> None:
    many = [Line("ti", f"c{i}", 1 + i * 7 % 1000, 1, 5, 9, 0.0) for i in range(1000)]
    lines = [
        Line("source", "a", 3, 3, None, None, 0.0),
        *many,
        Line("ti", "all", 9999, 9, 5, 9, 0.0),
    ]
    shown = table_text(lines, "mm").splitlines()
    assert len(shown) == 24
    assert sorted(int(row.split()[2]) for row in shown[2:22]) == list(range(1, 21))
    assert shown[22].split() == ["ti", "(980", "with", "more)"]
    assert shown[23].split()[:2] == ["ti", "all"]


def test_inspect_tells_the_same_as_prepare(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = build({"dataset": "synthetic", "image_size": 32, "synthetic": {"pairs": 60}})
    run = Run(tmp_path / "run")
    prepare(config, run)
    told = {line["part"]: line for line in run.record("prepare")["table"] if line["label"] == "all"}
    store = open_store(run.test_store)
    lines = {line.part: line for line in tabulate(samples_of_store(store)) if line.label == "all"}
    assert vars(lines["test"]) == told["test"]
    assert "mm" in table_text(list(lines.values()), "mm")
    inspect(run.transfer_store, tmp_path / "sheet.png", verify=True)
    assert "all checksums match" in capsys.readouterr().err
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 600
    damaged = bytearray(run.test_store.read_bytes())
    damaged[store.columns["test/target"].offset + 5] ^= 1
    run.test_store.write_bytes(damaged)
    with pytest.raises(DataError, match=r"rows 0\.\.\d+ of test/target"):
        inspect(run.test_store, verify=True)
    assert [row.role for row in list_class_rows(config.classes, read_archive(config))].count(
        "TR"
    ) == 6


def test_table_has_depth_range_and_missing_share(tmp_path: Path) -> None:
    depth = np.full((40, 40), 1200, np.uint16)
    depth[:10] = 0
    depth[20, 20] = 2500
    for role in ("tr/cup", "ti"):
        for number in range(3):
            save(tmp_path / role / "rgb" / f"{number}.png", scene(number, 40, 40))
            save(tmp_path / role / "target" / f"{number}.png", depth)
    run = Run(tmp_path / "run")
    prepare(
        build({"dataset": "folders", "image_size": 40, "prepare": {"root": str(tmp_path)}}), run
    )
    ti = next(line for line in run.record("prepare")["table"] if line["part"] == "ti")
    assert (ti["low"], ti["high"], ti["missing"]) == (1200, 2500, 0.25)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("missing", [True, False])
@pytest.mark.parametrize("case", ["some missing", "all missing", "none missing", "two channels"])
def test_a_summary_is_that_of_the_readings(kind: type, missing: bool, case: str) -> None:
    shape = (6, 6, 2) if case == "two channels" else (6, 6)
    target: NDArray[Any] = np.random.default_rng(0).integers(1, 200, shape).astype(kind)
    target[::2] *= case not in ("some missing", "all missing")
    target *= case != "all missing"
    readings = [int(v) for v in target.ravel() if v > 0 or not missing]
    expected = (min(readings), max(readings)) if readings else (0, 0)
    low, high, share = summarise_target(target, missing)
    assert (low, high) == expected
    assert share == pytest.approx(1 - len(readings) / target.size)
