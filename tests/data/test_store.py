"""The store: what is written is read back, and nothing damaged passes as whole."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray

from sfkt_cli.data import store_writer
from sfkt_cli.data.store import Store, open_store
from sfkt_cli.data.store_writer import text_column, writing
from sfkt_cli.errors import DataError

ROWS = 70
ATTRS = {"dataset": "made", "modality": "depth", "unit": "mm", "classes": ["cup", "jüg"]}


def write(path: Path, first: int = 0) -> Store:
    rgb = (np.arange(ROWS * 48) + first).astype(np.uint8).reshape(ROWS, 4, 4, 3)
    target = np.arange(ROWS * 16, dtype=np.uint16).reshape(ROWS, 4, 4) * 57
    ids = text_column([f"bild-ä-{row}" for row in range(ROWS)])
    labels = np.arange(ROWS) % 2
    columns: dict[str, NDArray[Any]] = {
        "ti/rgb": rgb,
        "ti/target": target,
        "ti/id": ids,
        "test/label": labels,
    }
    with writing(path, ATTRS, columns, {"test/rgb": ((0, 4, 4, 3), "u1")}):
        pass
    return open_store(path)


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    store = write(tmp_path / "a.h5")
    store.verify()
    assert store.classes == ["cup", "jüg"]
    assert (store.dataset, store.modality, store.unit) == ("made", "depth", "mm")
    assert store.strings("ti/id")[69] == "bild-ä-69"
    assert store.count("ti") == ROWS
    assert store.count("nothing") == 0
    assert store["test/rgb"].shape == (0, 4, 4, 3)
    assert store["ti/target"][69, 3, 3] == 1119 * 57 % 65536
    assert not store["ti/rgb"].flags.writeable
    assert store.labels("test").tolist()[:3] == [0, 1, 0]


def test_other_programs_read_the_file_with_h5py_alone(tmp_path: Path) -> None:
    write(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5") as file:
        assert file.attrs["modality"] == "depth"
        assert file["ti/id"].asstr()[0] == "bild-ä-0"
        assert file["ti/rgb"].shape == (ROWS, 4, 4, 3)
        assert file["ti/rgb"].chunks is None


def test_a_locked_file_is_read(tmp_path: Path) -> None:
    digest = write(tmp_path / "a.h5").digest
    with (tmp_path / "a.h5").open("rb") as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)
        assert open_store(tmp_path / "a.h5").digest == digest


def test_digest_names_the_content(tmp_path: Path) -> None:
    first, again = write(tmp_path / "a.h5"), write(tmp_path / "b.h5")
    assert first.digest == again.digest
    assert first.digest != write(tmp_path / "c.h5", first=1).digest


def test_one_flipped_bit_is_found_wherever_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    write(path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(whole), 300):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.h5"):
            open_store(path).verify()


def flip(path: Path, name: str, row: int) -> None:
    column = open_store(path).columns[name]
    content = bytearray(path.read_bytes())
    content[column.offset + row * column.row_bytes] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_in_a_small_column_is_found_when_it_is_used(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    write(path)
    flip(path, "test/label", 69)
    with pytest.raises(DataError, match=r"rows 64\.\.69 of test/label do not match"):
        open_store(path).labels("test")
    flip(path, "ti/id", 3)
    with pytest.raises(DataError, match=r"rows 0\.\.31 of ti/id"):
        open_store(path)


def test_images_are_compared_block_by_block_as_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    write(path)
    flip(path, "ti/rgb", 40)
    images = open_store(path)["ti/rgb"]
    assert images[:32].shape == (32, 4, 4, 3)
    rows = np.array([0, 40])
    for read in (
        lambda: images[63],
        lambda: images[rows],
        lambda: images[30:40, 1],
    ):
        with pytest.raises(DataError, match=r"rows 32\.\.63 of ti/rgb do not match"):
            read()
    flip(path, "ti/rgb", 40)
    assert images[40].shape == (4, 4, 3)
    flip(path, "ti/rgb", 40)
    assert images[40].shape == (4, 4, 3)  # each block once


def test_a_file_is_the_one_that_its_name_says(tmp_path: Path) -> None:
    write(tmp_path / "source.h5")
    shutil.copy(tmp_path / "source.h5", tmp_path / "test.h5")
    with pytest.raises(DataError, match=r"test\.h5 was written under another name"):
        open_store(tmp_path / "test.h5")


def test_a_file_of_an_earlier_version_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as then:
        then.setattr(store_writer, "SCHEMA", "sfkt-1")
        with pytest.raises(DataError, match="schema 'sfkt-1', this version reads 'sfkt-2'"):
            write(tmp_path / "a.h5")


@pytest.mark.parametrize("kept", [0, 10, 500, 5000, -1])
def test_cut_off_files_are_refused(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "a.h5"
    write(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"a\.h5"):
        open_store(path)


def test_a_file_that_the_disk_refuses_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.h5").path

    def refuse(self: Path, mode: str) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(OSError, match=str(path)):
        open_store(path)


def test_file_that_is_no_store_says_so(tmp_path: Path) -> None:
    path = tmp_path / "foreign.h5"
    with h5py.File(path, "w") as file:
        file["ti/rgb"] = np.zeros(3)
    with pytest.raises(DataError, match=r"foreign\.h5 is not a finished file"):
        open_store(path)
    with pytest.raises(DataError, match="sfkt prepare"):
        open_store(tmp_path / "missing.h5")


@pytest.mark.parametrize("wrong", ["../../../up", "", "..", "a/b", ".hidden", "bild-ä-1"])
def test_ids_that_name_no_file_or_two_samples_are_refused(tmp_path: Path, wrong: str) -> None:
    column = text_column(["bild-ä-0", "bild-ä-1", wrong])
    with writing(tmp_path / "a.h5", ATTRS, {"target/id": column}):
        pass
    with pytest.raises(DataError, match="target/id has"):
        open_store(tmp_path / "a.h5")


def test_unknown_column_names_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no source/rgb: it holds"):
        write(tmp_path / "a.h5")["source/rgb"]


def test_failure_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    before = write(path).digest
    with pytest.raises(RuntimeError), writing(path, ATTRS, {}, {"ti/rgb": ((5, 2), "u1")}):
        raise RuntimeError
    assert open_store(path).digest == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.h5"]


def test_full_disk_is_an_error_of_the_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take(*_: int) -> None:
        pytest.fail("the room of all other programs was taken")

    monkeypatch.setattr(os, "posix_fallocate", take)
    free = shutil.disk_usage(tmp_path).free
    with (
        pytest.raises(OSError, match="space"),
        writing(tmp_path / "a.h5", ATTRS, {}, {"ti/rgb": ((free + (1 << 30), 1), "u1")}),
    ):
        pass
    assert not list(tmp_path.iterdir())
