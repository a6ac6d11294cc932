"""180 damaged archives: each ends in a message that names the file, and leaves no half store."""

from __future__ import annotations

import functools
import io
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfkt_cli.data.archive import MAX_FILE_BYTES, Container
from sfkt_cli.data.readers import read_archive
from sfkt_cli.errors import DataError, RunError, SfktError
from sfkt_cli.settings.config import Config
from sfkt_cli.settings.runs import Run
from sfkt_cli.stages.prepare import make_plan, prepare
from tests.data.make_archives import MAKERS, folders, manifest, save, settings_of

Damage = Callable[[Path], str]
"""Damages an archive and returns what the message must contain."""
FOLDERS = [name for name in MAKERS if name != "nyu-depth"]


def settings(name: str, root: Path) -> Config:
    sensors = {"source_sensor": "kv1", "target_sensor": "kv1"}
    return settings_of(name, root, image_size=16, sun_rgbd=sensors)


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whole archive for each reader, to be copied."""
    folder = tmp_path_factory.mktemp("archives")
    for name, make in MAKERS.items():
        make(folder / name)
    return folder


@functools.cache
def used(name: str) -> tuple[str, ...]:
    """Names of the images that are read, below the archive's root."""
    with tempfile.TemporaryDirectory() as folder:
        root = MAKERS[name](Path(folder))
        config = settings(name, root)
        plan = make_plan(config, read_archive(config))
        read = {
            record.rgb if view == "rgb" else record.target
            for part, records in plan.parts.items()
            for record in records
            for view in plan.views(part)
        }
        files = [str(path.relative_to(root)) for path in sorted(root.rglob("*"))]
    return tuple(f for f in files if any(f == n or f.endswith(f"/{n}") for n in read))


@pytest.mark.parametrize("name", MAKERS)
def test_no_file_is_larger_than_the_room_that_is_made_for_it(
    name: str, archives: Path, tmp_path: Path
) -> None:
    config, run = settings(name, archives / name), Run(tmp_path)
    prepare(config, run)
    for file, size in make_plan(config, read_archive(config)).file_bytes().items():
        assert run.path("prepare", file).stat().st_size <= size


def test_without_room_what_was_prepared_before_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = settings("folders", MAKERS["folders"](tmp_path / "mine")), Run(tmp_path / "run")
    prepare(config, run)
    before = {path.name: path.read_bytes() for path in run.path("prepare").glob("*.h5")}
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(RunError, match="make room"):
        prepare(config, replace(run, force=True))
    assert run.finished("prepare")
    assert {path.name: path.read_bytes() for path in run.path("prepare").glob("*.h5")} == before


def victim(name: str, which: int) -> str:
    """One of the images that are read, in steps that reach both views."""
    return used(name)[which * 7 % len(used(name))]


def damage_file(root: Path, name: str, which: int, kind: str) -> str:
    """Damage one image."""
    path = root / victim(name, which)
    content = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "few bytes":
        path.write_bytes(content[:5])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_bytes(b"<html>404 not found</html>")
    elif kind == "header flipped":
        path.write_bytes(bytes([content[0] ^ 16]) + content[1:])
    elif kind == "huge":
        file = io.BytesIO()
        Image.new("1", (12_000, 9_000)).save(file, "PNG")
        path.write_bytes(file.getvalue())
    elif kind == "wrong type":
        file = io.BytesIO()
        Image.fromarray(np.zeros((30, 40, 2), np.uint8), "LA").save(file, "PNG")
        path.write_bytes(file.getvalue())
    elif kind == "unreadable folder":
        path.unlink()
        path.mkdir()
    return path.name if kind != "unreadable folder" else str(root)


def missing_partner(root: Path, name: str, which: int) -> str:
    (root / victim(name, which)).unlink()
    return str(root)


def zip_entry(root: Path, name: str, content: bytes) -> str:
    """Turn the archive into a zip file with one entry too many."""
    path = root.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(root.rglob("*")):
            archive.write(file, file.relative_to(root))
        archive.writestr(name, content)
    shutil.rmtree(root)
    path.rename(root)
    return root.name


def zip_bomb(root: Path, name: str, which: int) -> str:
    """Put 32 MB of zeros into the place of an image."""
    (root / victim(name, which)).unlink()
    return zip_entry(root, victim(name, which), bytes(1 << 25))


def zip_flipped(root: Path, name: str, which: int) -> str:
    zip_entry(root, "readme.txt", b"")
    with zipfile.ZipFile(root) as archive:
        entry = archive.getinfo(victim(name, which))
    content = bytearray(root.read_bytes())
    if which % 2:
        content = content[: len(content) // 2]
    else:
        for position in range(entry.header_offset + 60, entry.header_offset + 100):
            content[position] ^= 255
    root.write_bytes(content)
    return root.name


def mat_damage(root: Path, kind: str) -> str:
    path = root / "nyu_depth_v2_labeled.mat"
    content = bytearray(path.read_bytes())
    if kind.startswith("cut"):
        path.write_bytes(content[: int(len(content) * float(kind[4:]))])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("<html>", encoding="utf-8")
    elif kind == "old version":
        path.write_bytes(b"MATLAB 5.0 MAT-file".ljust(1000))
    else:
        h5py = pytest.importorskip("h5py")
        with h5py.File(path, "r+") as file:
            if kind == "external link":
                del file["images"]
                file["images"] = h5py.ExternalLink("/etc/hostname", "/images")
            elif kind == "external storage":
                del file["images"]
                space = [("/etc/hostname", 0, 24 * 3 * 40 * 30)]
                file.create_dataset("images", (24, 3, 40, 30), "u1", external=space)
            elif kind == "external texts":
                codes = file.create_dataset(
                    "codes", (5, 1), "u1", external=[("/etc/hostname", 0, 5)]
                )
                file["sceneTypes"][0, 3] = codes.ref
            elif kind == "linked texts":
                del file["scenes"]
                file["scenes"] = h5py.ExternalLink("/etc/hostname", "/scenes")
            elif kind == "wrong shape":
                shape = file["rawDepths"].shape
                del file["rawDepths"]
                file["rawDepths"] = np.zeros(shape[:2], "f4")
            elif kind == "wrong axes":
                pixels = file["images"][()]
                del file["images"]
                file["images"] = pixels.transpose(0, 3, 2, 1)
            elif kind == "fewer scenes":
                references = file["scenes"][:, :5]
                del file["scenes"]
                file.create_dataset("scenes", data=references, dtype=h5py.ref_dtype)
            else:
                del file[kind]
    return path.name


def manifest_damage(root: Path, line: str) -> str:
    shutil.rmtree(root)
    manifest(root)
    with (root / "manifest.csv").open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")
    return "manifest.csv, line"


def variants() -> Iterator[tuple[str, str, Damage]]:
    kinds = ("truncated", "few bytes", "empty", "text", "header flipped", "huge", "wrong type")
    for name in FOLDERS:
        for which, kind in enumerate((*kinds, *kinds)):
            yield (
                name,
                f"{kind} {which}",
                functools.partial(damage_file, name=name, which=which, kind=kind),
            )
        kind = "unreadable folder"
        yield name, kind, functools.partial(damage_file, name=name, which=3, kind=kind)
        for which in range(4):
            yield name, f"bomb {which}", functools.partial(zip_bomb, name=name, which=which)
            yield (
                name,
                f"zip flipped {which}",
                functools.partial(zip_flipped, name=name, which=which),
            )
        for which in (0, 1, 3):
            yield (
                name,
                f"partner {which}",
                functools.partial(missing_partner, name=name, which=which),
            )
        for entry in ("../b.png", "/etc/b.png", "a/../../b.png", "C:\\b.png", "C:/b.png"):
            yield name, f"entry {entry}", functools.partial(zip_entry, name=entry, content=b"x")
    for kind in (
        *(f"cut {share}" for share in (0.1, 0.3, 0.5, 0.7, 0.9, 0.99)),
        *("empty", "text", "old version", "external link", "external storage", "external texts"),
        *("linked texts", "wrong shape"),
        *("wrong axes", "fewer scenes", "images", "rawDepths", "scenes", "sceneTypes"),
    ):
        yield "nyu-depth", kind, functools.partial(mat_damage, kind=kind)
    for line in (
        "img/none.jpg,depth/0.png,mug,tr,a",
        "../../etc/passwd,depth/0.png,mug,tr,a",
        "/etc/passwd,depth/0.png,mug,tr,a",
        "img/0 ä.jpg,depth/0.png,mug,teacher,a",
        "img/0 ä.jpg,,mug,ti,a",
        ",,mug,tr,a",
        "img/0 ä.jpg",
        "a,b,c,d,e,f",
    ):
        yield "folders", f"line {line}", functools.partial(manifest_damage, line=line)


VARIANTS = list(variants())


def test_there_are_180_variants() -> None:
    assert len(VARIANTS) >= 180


@pytest.mark.parametrize(
    ("name", "damage"),
    [pytest.param(n, d, id=f"{n}: {k}".replace("/", "|")) for n, k, d in VARIANTS],
)
def test_damage_is_told_by_name_and_leaves_no_store(
    name: str, damage: Damage, tmp_path: Path, archives: Path
) -> None:
    root = tmp_path / "archive"
    shutil.copytree(archives / name, root)
    told = damage(root)
    run = Run(tmp_path / "run")
    with pytest.raises(SfktError) as caught:
        prepare(settings(name, root), run)
    assert told in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert not list(run.folder.rglob("*.h5"))
    assert not list(run.folder.rglob("*.partial"))


def test_a_file_that_is_too_large_is_not_called_damaged(tmp_path: Path) -> None:
    with (tmp_path / "scan.png").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(DataError, match=r"scan.png has .* bytes, more than an image can have$"):
        Container(tmp_path).read("scan.png")


@pytest.mark.parametrize(
    ("name", "pattern", "twin"),
    [
        ("rgb-nir", "nirscene1/country/0000_rgb.tiff", "nirscene1/country/0000_rgb.png"),
        ("sun-rgbd", "SUNRGBD/kv1/b3dodata/*/image/*.jpg", "twin.jpg"),
        ("washington-rgbd", "rgbd-dataset/apple/apple_1/apple_1_1_1_crop.png", "copy"),
        ("diml-rgbd", "indoor/test/LR/03*/color/*_000000_c.png", "copy"),
        ("folders", "tr/mug/target/0.png", "0.tiff"),
    ],
)
def test_two_files_of_one_name_are_refused(
    name: str, pattern: str, twin: str, tmp_path: Path
) -> None:
    root = MAKERS[name](tmp_path / "archive")
    path = next(iter(sorted(root.glob(pattern))))
    if twin == "copy":
        other = root / "copy"
        shutil.copytree(root / pattern.partition("/")[0], other / pattern.partition("/")[0])
        assert other.is_dir()
    else:
        with Image.open(path) as image:
            save(path.with_name(Path(twin).name), np.asarray(image))
    config = settings(name, root)
    with pytest.raises(SfktError, match=rf"{path.stem}.* have the same name: remove one of them"):
        prepare(config, Run(tmp_path / "run"))


def test_names_with_spaces_and_other_letters_are_read(tmp_path: Path) -> None:
    root = tmp_path / "Ärchiv mit Leer zeichen 空"
    folders(root, labels=("große tasse", "急須"))
    run = Run(tmp_path / "run")
    prepare(settings("folders", root), run)
    assert os.fspath(run.transfer_store)
    assert run.record("prepare")["classes"] == ["große tasse", "急須"]
