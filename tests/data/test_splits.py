"""Splits: by group, every class everywhere, the same for the same seed."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sfkt_cli.data.records import TR_PARTS, Archive, Record
from sfkt_cli.data.sensor import Sensor
from sfkt_cli.data.splits import (
    Parts,
    choose_classes,
    expand,
    left_out,
    list_class_rows,
    split_records,
)
from sfkt_cli.errors import ConfigError, DataError
from sfkt_cli.settings.config import ClassesConfig, SplitConfig


def make(groups_per_class: int, images: int = 2, labels: str = "abcd") -> list[Record]:
    return [
        Record(f"{label}{group}-{i}", f"{label}{group}", label, "rgb", "target")
        for label in labels
        for group in range(groups_per_class)
        for i in range(images)
    ]


def shared_groups(parts: Parts) -> set[str]:
    """Groups that lie in more than one of source, target and test."""
    held = [{record.group for record in parts[part]} for part in TR_PARTS]
    return set().union(*(one & other for one, other in itertools.combinations(held, 2)))


@settings(max_examples=40, deadline=None)
@given(groups=st.integers(1, 12), images=st.integers(1, 5), seed=st.integers(0, 99))
def test_disjoint_parts_share_no_group_and_lose_no_image(
    groups: int, images: int, seed: int
) -> None:
    records = make(groups, images)
    parts = split_records(records, "abc", "d", SplitConfig(), seed)
    assert not shared_groups(parts)
    assert Counter(r.id for part in parts.values() for r in part) == Counter(r.id for r in records)
    assert {r.label for r in parts["ti"]} == {"d"}
    if groups >= 3:
        for part in ("source", "target", "test"):
            assert {r.label for r in parts[part]} == {"a", "b", "c"}


def test_seed_decides_and_order_does_not() -> None:
    records = make(12)
    first = split_records(records, "abc", "d", SplitConfig(), 1)
    again = split_records(records[::-1], "abc", "d", SplitConfig(), 1)
    other = split_records(records, "abc", "d", SplitConfig(), 2)
    assert {r.id for r in first["test"]} == {r.id for r in again["test"]}
    assert {r.id for r in first["test"]} != {r.id for r in other["test"]}


def test_shares_are_kept_over_groups_of_all_sizes() -> None:
    records = [
        Record(f"{group}-{i}", f"{group}", "a", "rgb", "target")
        for group in range(60)
        for i in range(1 + group % 7)
    ]
    parts = split_records(records, "a", "", SplitConfig(source=0.5, test=0.2), 0)
    assert len(parts["source"]) / len(records) == pytest.approx(0.5, abs=0.04)
    assert len(parts["test"]) / len(records) == pytest.approx(0.2, abs=0.04)


def test_many_groups_are_dealt_out_at_once() -> None:
    records = make(40_000, images=1, labels="a")
    began = time.process_time()
    parts = split_records(records, "a", "", SplitConfig(), 0)
    assert time.process_time() - began < 3
    assert min(len(parts[part]) for part in TR_PARTS) > 4000


def test_paper_protocol_uses_all_images_twice_and_holds_none_out() -> None:
    parts = split_records(make(5), "abc", "d", SplitConfig(protocol="paper"), 0)
    assert {r.id for r in parts["source"]} == {r.id for r in parts["target"]}
    assert len(parts["source"]) == len(parts["target"]) == 30
    assert [r.label for r in parts["source"]] == sorted("abc" * 10)
    assert [r.label for r in parts["target"]] != sorted("abc" * 10)  # in a drawn order
    assert not parts["test"]


def test_archive_may_fix_the_part() -> None:
    records = [
        Record(f"{part}{n}", f"{part}{n}", "a", "rgb", "target", (part, "ti"))
        for part in ("source", "target", "test")
        for n in range(4)
    ]
    parts = split_records(records, "a", "", SplitConfig(), 0)
    for part in ("source", "target", "test"):
        assert {r.id for r in parts[part]} == {f"{part}{n}" for n in range(4)}


def test_a_fixed_part_takes_its_group_there_and_two_are_refused() -> None:
    def of_group(part: str, number: int, *also: str) -> Record:
        return Record(f"{part}{number}", f"room{number}", "a", "rgb", "target", (part, *also))

    free = [Record(f"free{n}", f"room{n}", "a", "rgb", "target") for n in range(12)]
    for part in ("source", "target", "test"):
        held = [of_group(part, number) for number in range(4)]
        parts = split_records([*free, *held], "a", "", SplitConfig(), 0)
        assert {r.group for r in held} <= {r.group for r in parts[part]}
        assert {r.id for r in held} <= {r.id for r in parts[part]}
        assert not left_out([*free, *held], "a", "", SplitConfig(), parts)
    mixed = [*free, of_group("target", 3), of_group("test", 3), of_group("ti", 3)]
    with pytest.raises(DataError, match=r"room3.*target3.*test3"):
        split_records(mixed, "a", "", SplitConfig(), 0)
    of_the_archive = [*free, of_group("source", 3, "ti"), of_group("test", 3, "ti")]
    assert split_records(of_the_archive, "a", "", SplitConfig(), 0)


def test_images_without_labels_are_only_target_images() -> None:
    records = [Record(f"u{n}", f"u{n}", None, None, "target") for n in range(5)]
    records += [Record(f"p{n}", f"p{n}", None, "rgb", "target", ("ti",)) for n in range(3)]
    parts = split_records(records, (), (), SplitConfig(), 0)
    assert {part: len(held) for part, held in parts.items()} == {
        "source": 0,
        "target": 5,
        "test": 0,
        "ti": 3,
    }


def test_records_that_fit_no_part_are_counted_with_the_reason() -> None:
    records = [Record(f"l{n}", f"room{n}", "a", "rgb", None) for n in range(4)]
    records += [Record(f"t{n}", f"room{n}", None, None, "target") for n in range(4)]
    records += [Record(f"u{n}", f"u{n}", None, "rgb", None) for n in range(3)]
    records += [Record("alone", "alone", "i", None, "target"), Record("other", "o", "x", "r", "t")]
    records += [Record("sensor", "sensor", "a", "rgb", "target", ("ti",))]
    records += [Record("line", "line", "i", "rgb", "target", ("target",))]
    split = SplitConfig()
    parts = split_records(records, ["a"], ["i"], split, 0)
    used = sum(len(held) for held in parts.values())
    assert left_out(records, ["a"], ["i"], split, parts) == {
        "images whose group is in a part that cannot use them": 8 - used,
        "RGB images without a label": 3,
        "target images of a TI class without a partner": 1,
        "images of a TI class that are listed for the part target": 1,
    }
    assert 0 < used < 8
    records = [*make(3), Record("held", "held", "a", "rgb", "target", ("test",))]
    assert not left_out(records, "ab", "c", split, split_records(records, "ab", "c", split, 0))
    split = SplitConfig(protocol="paper")
    assert left_out(records, "ab", "c", split, split_records(records, "ab", "c", split, 0)) == {
        "images for the test alone (split.protocol=paper has no test)": 1
    }


class Nothing:
    """A loader that is never asked."""

    sensor = Sensor("depth", "mm", "uint16", 1, 30, "crop")

    def rgb(self, record: Record) -> NDArray[np.uint8]:
        raise NotImplementedError

    def target(self, record: Record) -> NDArray[Any]:
        raise NotImplementedError


def archive(usual_tr: tuple[str, ...] = (), usual_ti: tuple[str, ...] = ()) -> Archive:
    names = ("bath room", "bed room", "cafe", "office")
    records = tuple(Record(n, n, n, "rgb", "target") for n in names)
    return Archive(records, Nothing(), "", usual_tr=usual_tr, usual_ti=usual_ti)


def test_classes_are_chosen_by_wildcards_in_the_order_given() -> None:
    chosen = ClassesConfig(tr=("office", "*ROOM"))
    tr, ti = choose_classes(chosen, archive())
    assert tr == ["office", "bath room", "bed room"]
    assert ti == ["cafe"]
    assert choose_classes(ClassesConfig(), archive(usual_ti=("cafe",)))[1] == ["cafe"]
    assert choose_classes(ClassesConfig(ti=("office",)), archive(usual_tr=("cafe", "office"))) == (
        ["cafe"],
        ["office"],
    )


def test_classes_of_the_model_may_have_no_image() -> None:
    of_model = ("vault", "office")
    chosen = ClassesConfig(tr=("office", "vault"))
    assert choose_classes(chosen, archive(), of_model)[0] == ["office", "vault"]
    (row,) = [row for row in list_class_rows(chosen, archive(), of_model) if row.name == "vault"]
    assert (row.role, row.images) == ("TR", 0)
    for name in ("vaults", "attic"):
        with pytest.raises(ConfigError, match=r"did you mean 'vault'|must be in source\.classes"):
            choose_classes(ClassesConfig(tr=(name, "vault")), archive(), of_model)


def test_wrong_class_names_are_told_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'office'"):
        expand(("ofice",), ["office", "cafe"], "classes.tr")
    names = ["Mug", "mug", "cup"]
    assert expand(("mug",), names, "classes.tr") == ["mug"]
    assert expand(("MUG",), names, "classes.tr") == ["Mug", "mug"]
    with pytest.raises(ConfigError, match=r"in classes\.tr and in classes\.ti"):
        choose_classes(ClassesConfig(tr=("cafe",), ti=("c*",)), archive())


def test_class_listing_tells_numbers_and_roles() -> None:
    unlabelled = (Record("a", "a", None, None, "t"), Record("b", "b", None, "r", "t", ("ti",)))
    own = archive()
    own = replace(own, records=own.records + unlabelled)
    rows = list_class_rows(ClassesConfig(tr=("office",), ti=("cafe",)), own)
    assert [(row.name, row.role, row.pairs) for row in rows] == [
        ("office", "TR", 1),
        ("cafe", "TI", 1),
        ("(no label)", "TI", 1),
        ("(no label)", "TR", 0),
        ("bath room", "", 1),
        ("bed room", "", 1),
    ]
