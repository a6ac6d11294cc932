"""Every reader on a made archive in its official layout, and on genuine files where they are."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sfkt_cli.data.ingest import FILES, Plan
from sfkt_cli.data.readers import READERS, read_archive
from sfkt_cli.data.readers.diml_rgbd import clean_scene
from sfkt_cli.data.records import Archive
from sfkt_cli.data.store import open_store
from sfkt_cli.errors import ConfigError, DataError
from sfkt_cli.evaluation.labelled import read_splits
from sfkt_cli.settings.config import Config, build
from sfkt_cli.settings.runs import Run
from sfkt_cli.stages.prepare import gaps, make_plan, prepare
from tests.data.make_archives import (
    MAKERS,
    depth,
    diml_full,
    manifest,
    nyu_depth,
    nyu_splits,
    save,
    scene,
    settings_of,
    sun_rgbd,
    zipped,
)
from tests.data.make_archives import folders as make_folders
from tests.data.test_splits import shared_groups

SHARED = Path(os.environ.get("SFKT_SHARED_DATA", "../shared/data"))
SIZE = 30


def test_every_reader_but_the_rendered_one_has_a_made_archive() -> None:
    assert set(MAKERS) | {"synthetic"} == set(READERS)


@pytest.mark.parametrize("name", list(MAKERS))
def test_reader_lists_samples_and_loads_each_of_them(name: str, tmp_path: Path) -> None:
    config = settings_of(name, MAKERS[name](tmp_path / "archive"))
    archive = read_archive(config)
    ids = [record.id for record in archive.records]
    assert ids == sorted(set(ids))
    assert all("/" not in identity for identity in ids)
    for record in archive.records[::5]:
        if record.rgb:
            rgb = archive.loader.rgb(record)
            assert rgb.shape == (SIZE, SIZE, 3)
            assert rgb.dtype == np.uint8
            assert rgb[:, -1, 0].mean() > rgb[:, 0, 0].mean() + 80, "mirrored or turned"
            assert rgb[-1, :, 1].mean() > rgb[0, :, 1].mean() + 80, "upside down"
        target = archive.loader.target(record)
        sensor = archive.loader.sensor
        assert target.shape == sensor.stored_shape
        assert target.dtype == np.dtype(sensor.dtype)
        if sensor.stored_unit == "mm":
            assert 2500 < target[-1, 15] < 3200
            assert target[-1, 15] > target[8, 15] > 0
    assert read_archive(config).digest == archive.digest


@pytest.mark.parametrize("name", list(MAKERS))
def test_prepare_writes_three_files_without_labels_for_the_transfer(
    name: str, tmp_path: Path
) -> None:
    config = settings_of(name, MAKERS[name](tmp_path / "archive"))
    run = Run(tmp_path / "run")
    prepare(config, run)
    written = {entry.name for entry in run.path("prepare").iterdir()}
    assert written == {*FILES, "pairs.png", "config.yaml", "done.json", "log.txt"}
    stores = {file: open_store(run.path("prepare", file)) for file in FILES}
    for store in stores.values():
        store.verify()
        assert store.dataset == name
    transfer, source, test = (stores[f] for f in ("transfer.h5", "source.h5", "test.h5"))
    assert not any("label" in column for column in transfer.columns)
    assert {column.partition("/")[0] for column in source.columns} == {"source"}
    assert set(test.strings("labels/id")) == set(transfer.strings("target/id"))
    scenes = {scene for _, scene in test.names().values()}
    if config.split.protocol == "disjoint":
        assert not set(source.strings("source/group")) & scenes
        assert not set(test.strings("test/group")) & scenes
    assert len(scenes) == len(
        {*transfer.strings("target/group"), *transfer.strings("ti/group")}
    )  # groups are numbered, and still groups
    before = run.path("prepare", "done.json").read_bytes()
    prepare(config, run)
    assert run.path("prepare", "done.json").read_bytes() == before


@pytest.mark.parametrize("name", [n for n in MAKERS if n != "nyu-depth"])
def test_zip_files_are_read_without_unpacking(name: str, tmp_path: Path) -> None:
    root = MAKERS[name](tmp_path / "archive")
    path = zipped(root)
    plain, packed = (read_archive(settings_of(name, place)) for place in (root, path))
    assert packed.records == plain.records
    for record in packed.records[::9]:
        np.testing.assert_array_equal(packed.loader.target(record), plain.loader.target(record))
    assert {entry.name for entry in tmp_path.iterdir()} == {"archive", "archive.zip"}


@pytest.mark.parametrize(
    ("name", "official"),
    [
        ("rgb-nir", "nirscene1.zip"),
        ("sun-rgbd", "SUNRGBD.zip"),
        ("washington-rgbd", "rgbd-dataset.zip"),
    ],
)
def test_the_official_zip_file_is_found_in_its_folder(
    name: str, official: str, tmp_path: Path
) -> None:
    root = MAKERS[name](tmp_path / "archive")
    plain = read_archive(settings_of(name, root))
    (tmp_path / "data" / "notes").mkdir(parents=True)
    for note in ("readme.txt", "notes/window.txt"):
        (tmp_path / "data" / note).touch()
    zipped(root).rename(tmp_path / "data" / official)
    assert read_archive(settings_of(name, tmp_path / "data")).records == plain.records


@pytest.mark.parametrize("packed", [False, True])
def test_objects_without_their_folders_are_no_samples(packed: bool, tmp_path: Path) -> None:
    save(tmp_path / "flat" / "apple_1_1_1_crop.png", scene(1))
    root = zipped(tmp_path / "flat") if packed else tmp_path / "flat"
    with pytest.raises(DataError, match=r"holds no samples \(it holds apple_1_1_1_crop\.png\)"):
        read_archive(settings_of("washington-rgbd", root))


@pytest.mark.parametrize("name", [n for n in MAKERS if n != "nyu-depth"])
def test_files_that_no_sample_uses_may_come_and_go(name: str, tmp_path: Path) -> None:
    config = settings_of(name, MAKERS[name](tmp_path))
    run = Run(tmp_path / "runs" / name)
    prepare(config, run)
    (tmp_path / "Thumbs.db").write_bytes(b"")
    prepare(config, run)
    before = read_archive(config)
    used = next(path for path in tmp_path.rglob("*.*") if is_read(path, before))
    os.utime(used, ns=(0, 0))
    assert read_archive(config).digest != before.digest


@pytest.mark.parametrize("name", ["rgb-nir", "sun-rgbd"])
def test_folders_of_an_archive_may_be_in_capitals(name: str, tmp_path: Path) -> None:
    root = MAKERS[name](tmp_path / "archive")
    expected = read_archive(settings_of(name, root))
    top = "SUNRGBD" if name == "sun-rgbd" else ""
    paths = [path for path in (root / top).rglob("*") if path.is_dir()]
    for path in sorted(paths, reverse=True):
        path.rename(path.with_name(path.name.upper()))
    archive = read_archive(settings_of(name, root))
    assert archive.notes == expected.notes

    def described(archive: Archive) -> list[tuple[Any, ...]]:
        """Each record, and which others are in its group."""
        members: dict[str, list[str]] = defaultdict(list)
        for record in archive.records:
            members[record.group].append(record.id.lower())
        return sorted(
            (r.id.lower(), r.label, r.parts, sorted(members[r.group])) for r in archive.records
        )

    assert described(archive) == described(expected)


@pytest.mark.parametrize("make", [MAKERS["folders"], manifest, MAKERS["sun-rgbd"]])
def test_a_copy_of_an_archive_gives_the_same_files(make: Any, tmp_path: Path) -> None:
    make(tmp_path / "archive")
    shutil.copytree(tmp_path / "archive", tmp_path / "copy")
    for path in (tmp_path / "copy").rglob("*"):
        os.utime(path, ns=(0, 0))
    runs = []
    for place in ("archive", "copy"):
        name = "sun-rgbd" if make is MAKERS["sun-rgbd"] else "folders"
        runs.append(Run(tmp_path / f"run of {place}"))
        prepare(settings_of(name, tmp_path / place), runs[-1])
    for file in FILES:
        first, second = (run.path("prepare", file).read_bytes() for run in runs)
        assert first == second


def test_labels_of_other_images_with_the_same_names_are_refused(tmp_path: Path) -> None:
    runs = []
    for place in ("first", "second"):
        root = make_folders(tmp_path / place)
        for path in root.rglob("*.png"):
            np.save(path.with_suffix(".npy"), depth(len(place)))
            path.unlink()
        runs.append(Run(tmp_path / f"run of {place}"))
        prepare(settings_of("folders", root), runs[-1])
    transfer, test = (open_store(runs[0].path("prepare", f"{n}.h5")) for n in ("transfer", "test"))
    assert read_splits(transfer, test)
    with pytest.raises(DataError, match="does not belong"):
        read_splits(transfer, open_store(runs[1].path("prepare", "test.h5")))


def is_read(path: Path, archive: Archive) -> bool:
    return any(str(path).endswith(f"/{record.target}") for record in archive.records)


def test_a_manifest_that_changes_is_another_archive(tmp_path: Path) -> None:
    config = settings_of("folders", manifest(tmp_path / "mine"))
    before = read_archive(config).digest
    (tmp_path / "mine" / "notes.txt").write_text("a window was open", encoding="utf-8")
    assert read_archive(config).digest == before
    rows = (tmp_path / "mine" / "manifest.csv").read_text(encoding="utf-8")
    (tmp_path / "mine" / "manifest.csv").rename(tmp_path / "list.csv")
    elsewhere = settings_of(
        "folders", tmp_path / "mine", folders={"manifest": str(tmp_path / "list.csv")}
    )
    assert read_archive(elsewhere).digest == before
    (tmp_path / "list.csv").write_text(rows.replace("room0", "hall"), encoding="utf-8")
    assert read_archive(elsewhere).digest != before


def test_nyu_images_are_upright_and_depth_is_bit_exact(tmp_path: Path) -> None:
    archive = read_archive(settings_of("nyu-depth", nyu_depth(tmp_path, 12)))
    for number, record in enumerate(archive.records):
        np.testing.assert_array_equal(archive.loader.rgb(record), scene(number)[:, 5:35])
        np.testing.assert_array_equal(archive.loader.target(record), depth(number)[:, 5:35])


def test_a_locked_nyu_file_is_read(tmp_path: Path) -> None:
    root = nyu_depth(tmp_path, 12)
    with (root / "nyu_depth_v2_labeled.mat").open("rb") as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)
        archive = read_archive(settings_of("nyu-depth", root))
        assert archive.loader.rgb(archive.records[0]).any()


def test_nyu_official_split_holds_out_the_listed_images(tmp_path: Path) -> None:
    nyu_splits(nyu_depth(tmp_path, 24), range(13, 25))
    config = settings_of("nyu-depth", tmp_path, nyu_depth={"split": "official"})
    plan = plan_of(config)
    assert {record.id for record in plan.parts["test"]} <= {f"nyu-{n:04d}" for n in range(13, 25)}
    assert len(plan.parts["test"]) == 6
    assert len(plan.parts["ti"]) == 12


@pytest.mark.parametrize("source", ["kv1", "kv2", "realsense", "xtion"])
@pytest.mark.parametrize("target", ["kv1", "kv2", "realsense", "xtion"])
@pytest.mark.parametrize("protocol", ["disjoint", "paper"])
def test_all_sensor_pairs_of_sun_rgbd(
    source: str, target: str, protocol: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = Path(tmp_path_factory.getbasetemp()) / "sun"
    if not root.exists():
        sun_rgbd(root)
    sensors = {"source_sensor": source, "target_sensor": target}
    config = settings_of("sun-rgbd", root, sun_rgbd=sensors, split={"protocol": protocol})
    plan = plan_of(config)
    assert plan.classes == ("bedroom", "lab", "office")
    assert {r.id[:2] for r in plan.parts["source"]} == {source[:2]}
    assert {r.id[:2] for r in plan.parts["target"]} == {target[:2]}
    assert {r.id[:2] for r in plan.parts["ti"]} == {"kv", "re", "xt"}
    assert not {"idk"} & {r.label for part in plan.parts.values() for r in part}
    if protocol == "disjoint":
        assert not shared_groups(plan.parts)


def test_captures_of_sun_rgbd_within_two_minutes_are_one_group(tmp_path: Path) -> None:
    """Of all sensors; without a time, runs of at most ten neighbours of one word are."""
    root = tmp_path / "SUNRGBD"
    rooms = {
        "kv2/align_kv2/2014-12-18_11-31-54_260595134347": "first",
        "xtion/xtion_align_data/2014_12_18_11_31_55": "first",
        "realsense/shr/2014_12_18-11_33_49-1311000073": "first",
        "kv2/kinect2data/000003_2014-12-18_11-36-42_260595134347_rgbf000040-resize": "second",
        "realsense/sa/2014_13_18-11_36_43-1311000073": "no time",
        "xtion/sun3ddata/home/scan1/0000110-000003653244": "home",
        "xtion/sun3ddata/home/scan2/0000110-000003653244": "home",
        **{f"kv1/b3dodata/img_{number:04d}": f"run {number // 10}" for number in range(12)},
        "kv1/NYUdata/NYU0001": "run of NYU",
    }
    for capture in rooms:
        for folder, image in (("image", scene(1)), ("depth", depth(1))):
            save(root / capture / folder / "pic.png", image)
        (root / capture / "scene.txt").write_text("office")
    archive = read_archive(settings_of("sun-rgbd", root))
    groups = {record.target: record.group for record in archive.records}
    pairs = {(room, groups[f"{capture}/depth/pic.png"]) for capture, room in rooms.items()}
    assert len(pairs) == len(set(rooms.values())) == len(set(groups.values()))


def test_sun_rgbd_leaves_out_what_nyu_has(tmp_path: Path) -> None:
    root = sun_rgbd(tmp_path)
    every = read_archive(settings_of("sun-rgbd", root))
    fewer = read_archive(settings_of("sun-rgbd", root, sun_rgbd={"nyu_overlap": False}))
    assert any("NYUdata" in record.id for record in every.records)
    assert not any("NYUdata" in record.id for record in fewer.records)


def test_diml_full_set_and_messy_folder_names(tmp_path: Path) -> None:
    archive = read_archive(settings_of("diml-rgbd", diml_full(tmp_path)))
    assert {r.label for r in archive.records} == {"warehouse", "cafe", "bathroom", "kitchen"}
    assert len({r.group for r in archive.records}) == 12
    assert clean_scene("04. Church") == "church"
    assert clean_scene("03_claseeroom_1") == "classroom"
    assert clean_scene("12_livingroom_2") == "living_room"
    assert clean_scene("Some Place") == "some_place"
    assert clean_scene("16.03.02") is None


def test_images_of_another_resolution_of_diml_are_told(tmp_path: Path) -> None:
    root = MAKERS["diml-rgbd"](tmp_path)
    other = "HR" if list(root.rglob("LR")) else "LR"
    with pytest.raises(DataError, match=f"holds no samples.*diml_rgbd.resolution={other}"):
        read_archive(settings_of("diml-rgbd", root, diml_rgbd={"resolution": other}))


def test_manifest_gives_roles_groups_and_labels(tmp_path: Path) -> None:
    archive = read_archive(settings_of("folders", manifest(tmp_path)))
    labels = [record.label for record in archive.records]
    assert {label: labels.count(label) for label in ("mug", "pot", None)} == {
        "mug": 4,
        "pot": 4,
        None: 4,
    }
    assert {r.parts for r in archive.records if r.label is None} == {("ti",)}
    assert len({r.group for r in archive.records}) == 4
    rows = [
        {"rgb": r.rgb, "target": r.target, "label": r.label, "role": (*r.parts, "tr")[0]}
        for r in archive.records
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    over = {"folders": {"manifest": "list.jsonl"}}
    again = read_archive(settings_of("folders", tmp_path, **over))
    assert [r.id for r in again.records] == [r.id for r in archive.records]


def test_labels_are_only_needed_where_a_stage_learns_from_them(tmp_path: Path) -> None:
    make_folders(tmp_path / "own", labels=())
    for number in range(5):
        save(tmp_path / "own" / "tr" / "target" / f"{number}.png", depth(number))
    run = Run(tmp_path / "run")
    prepare(settings_of("folders", tmp_path / "own"), run)
    assert not run.source_store.exists()
    transfer = open_store(run.transfer_store)
    assert (transfer.count("target"), transfer.count("ti")) == (5, 6)
    assert open_store(run.test_store).count("labels") == 0


@pytest.mark.parametrize(("channels", "dtype"), [(1, "uint8"), (2, "uint16"), (4, "uint16")])
def test_own_targets_may_have_several_channels_and_other_sizes(
    channels: int, dtype: str, tmp_path: Path
) -> None:
    for role in ("ti", "tr/a"):
        for number in range(4):
            save(tmp_path / role / "rgb" / f"{number}.jpg", scene(number, 60, 80))
            values = np.full((30, 40, channels), 7 + number, dtype)
            path = tmp_path / role / "target" / f"{number}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, values)
    over = {"folders": {"modality": "thermal", "registered": False}}
    run = Run(tmp_path / "run")
    prepare(settings_of("folders", tmp_path, **over), run)
    store = open_store(run.transfer_store)
    shape = (4, SIZE, SIZE) if channels == 1 else (4, SIZE, SIZE, channels)
    assert store["ti/target"].shape == shape
    assert store["ti/target"].dtype == np.dtype(dtype)
    assert (store.modality, store.unit, store.registered) == ("thermal", "raw", False)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("ti/depth/0.png", "call it target"),
        ("ti/hall/Color/0.png", "call it rgb"),
        ("ti/hall/0.png", "neither in ti/rgb nor in ti/target"),
        ("ti/0.png", "neither in ti/rgb nor in ti/target"),
        ("tr/mug/Depth/0.png", "call it target"),
        ("tr/mug/RGB/0.png", "call it rgb"),
        ("tr/rgb/0.png", "without a class"),
        ("tr/color/0.png", "without a class"),
        ("tr/thermal/0.png", "call it target"),
        ("tr/Target/hall/0.png", "call it target"),
        ("tr/mug/hall/nir/0.png", "call it target"),
        ("tr/target/hall/rgb/0.png", "lies in two folders, target and rgb"),
        ("ti/rgb/hall/target/0.png", "lies in two folders, rgb and target"),
    ],
)
def test_own_images_in_folders_of_other_names_are_told(
    name: str, told: str, tmp_path: Path
) -> None:
    root = make_folders(tmp_path / "mine")
    assert read_archive(settings_of("folders", root)).records
    save(root / name, depth(0))
    with pytest.raises(DataError, match=rf"{name}.*{told}.*the folders are"):
        read_archive(settings_of("folders", root))
    (root / name).rename(root / name.replace(".png", ".txt"))  # notes lie where they like
    assert read_archive(settings_of("folders", root)).records


def test_images_of_two_views_whose_names_never_match_are_told(tmp_path: Path) -> None:
    root = make_folders(tmp_path / "mine")
    for path in (root / "tr/mug/target").iterdir():
        path.rename(path.with_stem(f"t{path.stem}"))
    archive = read_archive(settings_of("folders", root))
    told = "tr/mug: 6 RGB and 6 target images, none of one name"
    assert [fact for fact in archive.facts if fact.startswith(told)] == list(archive.facts)
    assert len(archive.facts) == 1
    for path in (root / "ti/target").iterdir():
        path.rename(path.with_stem(f"{path.stem}_depth"))
    with pytest.raises(DataError, match=r"no partner .*the same name.*manifest\.csv.*6 such files"):
        read_archive(settings_of("folders", root))


def test_folders_of_recordings_may_hold_both_views(tmp_path: Path) -> None:
    for place in ("tr/mug/day1", "tr/mug/day2/run1", "ti/day1", "ti"):
        for number in range(2):
            save(tmp_path / place / "rgb" / "fog" / f"{number}.jpg", scene(number))
            save(tmp_path / place / "target" / "fog" / f"{number}.png", depth(number))
    records = read_archive(settings_of("folders", tmp_path)).records
    assert all(record.rgb and record.target for record in records)
    assert {(r.group, r.label, r.parts) for r in records} == {
        ("tr/day1/fog", "mug", ()),
        ("tr/day2/run1/fog", "mug", ()),
        ("ti/day1/fog", None, ("ti",)),
        ("ti/fog", None, ("ti",)),
    }


def test_of_two_sets_in_one_folder_none_is_read_alone(tmp_path: Path) -> None:
    for day in ("day1", "day2"):
        make_folders(tmp_path / day)
    with pytest.raises(DataError, match="2 sets of data, in day1/ and day2/"):
        read_archive(settings_of("folders", tmp_path))
    shutil.move(tmp_path / "day2", tmp_path / "day1" / "more")
    notes = read_archive(settings_of("folders", tmp_path)).notes
    assert any("neither in tr nor in ti" in note and "day1/more/t" in note for note in notes)


def test_a_class_may_have_the_name_of_a_sensor(tmp_path: Path) -> None:
    root = make_folders(tmp_path / "mine", labels=("thermal", "mug"))
    labels = {record.label for record in read_archive(settings_of("folders", root)).records}
    assert labels == {"thermal", "mug", None}


def test_folders_in_capitals_few_pairs_and_a_wide_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(6):
        save(tmp_path / f"TI/rgb/{number}.png", scene(number, 30, 40))
        for place in ("TI/target", "TR/cup", "TR/mug"):
            save(tmp_path / place / f"{number}.png", np.full((30, 40), 700 + number, np.uint16))
    run = Run(tmp_path / "run")
    prepare(settings_of("folders", tmp_path), run)
    assert open_store(run.transfer_store).count("ti") == 6
    assert open_store(run.transfer_store).classes == ["cup", "mug"]
    told = capsys.readouterr().err
    assert "has only 6 TI pairs" in told
    assert "only the middle square of 40 x 30 pixels is kept: 25% of the width is cut off" in told
    prepare(settings_of("folders", tmp_path, prepare={"fit": "squash"}), Run(tmp_path / "whole"))
    assert "cut off" not in capsys.readouterr().err


def test_classes_that_a_part_lacks_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, count in (("cup", 9), ("mug", 1)):
        for number in range(count):
            for view in ("rgb", "target"):
                path = tmp_path / f"mine/tr/{name}/{view}/{number}.png"
                save(path, scene(number) if view == "rgb" else depth(number))
    prepare(settings_of("folders", tmp_path / "mine"), Run(tmp_path / "run"))
    told = capsys.readouterr().err
    assert "part source has no image of mug" in told
    assert "part test has no image of mug" in told
    assert "part target" not in told
    (tmp_path / "mine/tr/mug/target").rename(tmp_path / "mug targets")
    assert any(
        "no image of mug" in gap and "there are no target images of them" in gap
        for gap in gaps(plan_of(settings_of("folders", tmp_path / "mine")))
    )
    (tmp_path / "mine/tr/mug").rename(tmp_path / "mug")
    capsys.readouterr()
    prepare(settings_of("folders", tmp_path / "mine"), Run(tmp_path / "all"))
    told = capsys.readouterr().err
    assert "has no image of" not in told
    assert "bring a source model" not in told
    for path in (tmp_path / "mine/tr/cup").rglob("[1-9].png"):
        path.unlink()
    prepare(settings_of("folders", tmp_path / "mine"), Run(tmp_path / "one"))
    told = capsys.readouterr().err
    assert "labelled RGB images are all one group (cup-0)" in " ".join(told.split())
    assert "no target image is held out" in told


@pytest.mark.parametrize("origin", [{"checkpoint": "rgb.pth"}, {"mixture": ["a", "b"]}])
def test_nothing_is_missing_for_a_source_model_that_is_brought(
    origin: dict[str, Any], tmp_path: Path
) -> None:
    make_folders(tmp_path, labels=())
    save(tmp_path / "tr" / "target" / "0.png", depth(0))
    config = settings_of("folders", tmp_path)
    assert any("to train a source model" in gap for gap in gaps(plan_of(config)))
    assert not gaps(plan_of(build(config.model_dump(mode="json"), {"source": origin})))


def test_pairs_that_a_brought_source_model_leaves_unused_are_told(tmp_path: Path) -> None:
    root = make_folders(tmp_path)
    save(root / "tr" / "pan" / "rgb" / "0.jpg", scene(0))  # of use for a source model alone
    own = {"source": {"checkpoint": "rgb.pth"}}
    plan = plan_of(settings_of("folders", root, **own))
    pairs = [record for record in plan.parts["source"] if record.target is not None]
    assert len(pairs) == len(plan.parts["source"]) - 1
    assert f"{len(pairs)} labelled pairs in part source will not be used" in gaps(plan)[0]
    asked = plan_of(settings_of("folders", root, **own, split={"source": 0}))
    assert len(asked.parts["target"]) == len(plan.parts["target"]) + len(pairs)
    for split in ({"source": 0}, {"protocol": "paper"}):
        plan = plan_of(settings_of("folders", root, **own, split=split))
        assert not any("not be used" in gap for gap in gaps(plan))
    assert not any("not be used" in gap for gap in gaps(plan_of(settings_of("folders", root))))


def test_images_that_are_in_no_part_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = manifest(tmp_path)
    plan_of(settings_of("folders", root))
    assert "left out" not in capsys.readouterr().err
    save(root / "img" / "more.jpg", scene(0))
    with (root / "manifest.csv").open("a", encoding="utf-8") as file:
        file.write("img/more.jpg,,,,\n")
    plan_of(settings_of("folders", root))
    told = " ".join(capsys.readouterr().err.split())
    assert "left out of all parts: 1 RGB images without a label" in told


@pytest.mark.parametrize(("width", "told"), [(40, False), (41, False), (54, True), (30, True)])
def test_pairs_of_unlike_proportions_are_told(
    width: int, told: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(8):
        save(tmp_path / f"ti/rgb/{number}.png", scene(number, 60, 2 * width))
        save(tmp_path / f"ti/target/{number}.png", depth(number, 30, 40))
        save(tmp_path / f"tr/cup/{number}.png", depth(number, 30, 40))
    plan_of(settings_of("folders", tmp_path))
    message = f"has {2 * width} x 60 pixels"
    assert (message in " ".join(capsys.readouterr().err.split())) == told
    plan_of(settings_of("folders", tmp_path, folders={"registered": False}))
    assert message not in capsys.readouterr().err


def test_pairs_of_which_some_are_turned_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_folders(tmp_path)
    for number in (2, 4):
        save(root / f"ti/rgb/{number}.jpg", scene(number, 40, 30))
    plan_of(settings_of("folders", root))
    assert "(2 of 6 pairs that were looked at)" in " ".join(capsys.readouterr().err.split())


def test_test_images_without_an_rgb_partner_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_folders(tmp_path)
    plan_of(settings_of("folders", root))
    assert "source-rgb" not in capsys.readouterr().err
    for number in range(3):
        save(root / f"tr/pan/{number}.png", depth(number))
    plan = plan_of(settings_of("folders", root))
    count = len(plan.parts["test"])
    told = " ".join(capsys.readouterr().err.split())
    assert f"without an RGB partner: 1 of {count}, such as tr/pan/" in told


def test_why_there_is_no_source_part_is_told(tmp_path: Path) -> None:
    for name in ("cup", "mug"):
        for number in range(4):
            save(tmp_path / f"tr/{name}/rgb/session1/{number}.png", scene(number))
            save(tmp_path / f"tr/{name}/target/session1/{number}.png", depth(number))
    (gap, *_) = gaps(plan_of(settings_of("folders", tmp_path)))
    assert "labelled RGB images are all one group (tr/session1)" in gap
    assert "divide them" in gap
    for view in ("rgb", "target"):
        (tmp_path / f"tr/mug/{view}/session1").rename(tmp_path / f"tr/mug/{view}/session2")
    (gap, *_) = gaps(plan_of(settings_of("folders", tmp_path)))
    assert "are only 2 groups (tr/session1, tr/session2)" in gap
    (gap, *_) = gaps(plan_of(settings_of("folders", tmp_path, split={"source": 0})))
    assert "split.source = 0 leaves no" in gap
    assert "are only" not in gap


def plan_of(config: Config) -> Plan:
    return make_plan(config, read_archive(config))


def test_paths_that_read_alike_have_ids_of_their_own(tmp_path: Path) -> None:
    for number, place in enumerate(("table/lamp-1", "table-lamp/1", "table/rug-1", "box/a b")):
        save(tmp_path / f"tr/{place}.png", depth(number))
    ids = {r.target: r.id for r in read_archive(settings_of("folders", tmp_path)).records}
    assert ids == {
        "tr/table/lamp-1.png": "table-lamp-1-c3ddc7",
        "tr/table-lamp/1.png": "table-lamp-1-5f6f30",
        "tr/table/rug-1.png": "table-rug-1",
        "tr/box/a b.png": "box-a_b-b9b60e",
    }
    lines = [f",tr/{place}.png,,," for place in ("table/lamp-1", "table-lamp/1", "table/lamp-1")]
    (tmp_path / "manifest.csv").write_text("\n".join(["rgb,target,label,role,group", *lines[:2]]))
    records = read_archive(settings_of("folders", tmp_path)).records
    assert len({r.id for r in records}) == len({r.group for r in records}) == 2
    save(tmp_path / "tr/table/lamp-1.tif", depth(0))
    (tmp_path / "manifest.csv").write_text("\n".join(["rgb,target,label,role,group", *lines]))
    with pytest.raises(DataError, match="is listed twice"):
        read_archive(settings_of("folders", tmp_path))
    lines[2] = ",tr/table/lamp-1.tif,,,"
    (tmp_path / "manifest.csv").write_text("\n".join(["rgb,target,label,role,group", *lines]))
    archive = read_archive(settings_of("folders", tmp_path))
    assert len({record.id for record in archive.records}) == 3
    assert any("in no line of the manifest: 2, as tr/box/a b.png" in n for n in archive.notes)


def test_images_of_two_sensors_beside_one_rgb_image_are_one_group(tmp_path: Path) -> None:
    for number, name in enumerate(("rgb.png", "left.png", "right.png", "other.png")):
        save(tmp_path / name, scene(number) if name == "rgb.png" else depth(number))
    rows = ["rgb,target,label,role,group", "rgb.png,left.png,mug,,", "rgb.png,right.png,mug,,"]
    (tmp_path / "manifest.csv").write_text("\n".join([*rows, ",other.png,mug,,"]))
    records = read_archive(settings_of("folders", tmp_path)).records
    groups = {record.target: record.group for record in records}
    assert groups["left.png"] == groups["right.png"] != groups["other.png"]


@pytest.mark.parametrize(
    "text",
    [
        "RGB;Target ;label;;\n;a.png;mug;;\n;;;;\n;b.png;;;\n",
        "\n\ttarget\tlabel\n\ta.png\tmug\n\tb.png\t\n",
    ],
)
def test_manifests_of_spreadsheets_are_read(text: str, tmp_path: Path) -> None:
    for number, name in enumerate(("a.png", "b.png")):
        save(tmp_path / name, depth(number))
    (tmp_path / "manifest.csv").write_text(text)
    records = read_archive(settings_of("folders", tmp_path)).records
    assert [(r.target, r.label) for r in records] == [("a.png", "mug"), ("b.png", None)]


def test_a_manifest_outside_of_a_zip_file_lists_what_is_in_the_zip_file(tmp_path: Path) -> None:
    root = manifest(tmp_path / "mine")
    path = zipped(root)
    (root / "manifest.csv").rename(tmp_path / "list.csv")
    over = {"folders": {"manifest": str(tmp_path / "list.csv")}}
    plain = read_archive(settings_of("folders", root, **over))
    for name in ("img", "depth"):  # beside the manifest lie others of the same names
        (root / name).rename(tmp_path / name)
    save(tmp_path / str(plain.records[0].target), np.zeros((9, 9), np.uint16))
    packed = read_archive(settings_of("folders", path, **over))
    assert packed.records == plain.records
    assert packed.loader.target(packed.records[0]).any()
    with pytest.raises(DataError, match=r"nowhere does not exist: give the folder"):
        read_archive(settings_of("folders", tmp_path / "nowhere", **over))


def test_wrong_class_is_told_with_a_near_name(tmp_path: Path) -> None:
    config = settings_of("rgb-nir", MAKERS["rgb-nir"](tmp_path), classes={"tr": ["steet"]})
    with pytest.raises(ConfigError, match="'street'"):
        prepare(config, Run(tmp_path / "run"))


def test_missing_archive_says_what_to_do(tmp_path: Path) -> None:
    for name in MAKERS:
        with pytest.raises(DataError, match="--root"):
            read_archive(settings_of(name, tmp_path / "nowhere"))


def genuine(name: str, folder: str, **over: Any) -> Archive:
    if not (SHARED / folder).is_dir():
        pytest.skip(f"no genuine files in {SHARED / folder}")
    return read_archive(settings_of(name, SHARED / folder, **over))


def test_genuine_rgb_nir() -> None:
    archive = genuine("rgb-nir", "rgb-nir-scene")
    assert len(archive.records) == 212
    assert any("class water has 20 samples, published are 51" in n for n in archive.notes)
    record = next(r for r in archive.records if r.id == "country-0000")
    assert archive.loader.rgb(record).std() > 10
    assert archive.loader.target(record).std() > 10


def test_genuine_sun_rgbd() -> None:
    archive = genuine("sun-rgbd", "sun-rgbd", prepare={"fit": "squash"}, image_size=427)
    assert [(r.label, r.id[:3]) for r in archive.records] == [("office", "kv1"), ("office", "kv2")]
    depth_mm = archive.loader.target(archive.records[0])
    assert depth_mm[depth_mm > 0].min() >= 1430
    assert depth_mm.max() <= 2525


@pytest.mark.parametrize("background", ["keep", "remove"])
def test_genuine_washington(background: str) -> None:
    over = {"washington_rgbd": {"background": background}}
    archive = genuine("washington-rgbd", "washington-rgbd", **over)
    assert len(archive.records) == 20
    assert len({record.group for record in archive.records}) == 10
    missing = [float((archive.loader.target(r) == 0).mean()) for r in archive.records]
    assert (np.mean(missing) > 0.15) == (background == "remove")
