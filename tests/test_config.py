"""Settings: precedence, what YAML makes of values, and errors that a user can act on."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from sfkt_cli.errors import ConfigError
from sfkt_cli.settings.config import (
    Config,
    as_dict,
    build,
    describe_type,
    merge,
    one_line,
    parse_assignments,
    read_yaml,
    section_fields,
    settings_of_file,
    to_yaml,
)
from sfkt_cli.settings.runs import known_settings


def test_merging_takes_settings_by_section_or_by_name_and_replaces_lists() -> None:
    base = {"classes": {"tr": ["a", "b"], "ti": ["c"]}, "seed": 1, "bridge.epochs": 2}
    over = {"classes.tr": ["d"], "bridge": {"width": 3}, "source": {}, "evaluate": None}
    merged = {
        "classes.tr": ["d"], "classes.ti": ["c"], "seed": 1, "bridge.epochs": 2, "bridge.width": 3,
    }  # fmt: skip
    assert merge(base, over) == merged
    assert merge(merged) == merged
    assert base["classes"] == {"tr": ["a", "b"], "ti": ["c"]}, "neither side is changed"


def test_a_file_may_name_settings_with_a_dot(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("bridge.epochs: 3\nbridge: {width: 12}\ntgkt.beta_f: 0\n", encoding="utf-8")
    config = build(read_yaml(file))
    assert (config.bridge.epochs, config.bridge.width, config.tgkt.beta_f) == (3, 12, 0)


def test_paths_may_begin_at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = build({"source.checkpoint": "~/mine.pth", "prepare.root": "~/data"})
    assert config.source.checkpoint == tmp_path / "mine.pth"
    assert config.prepare.root == tmp_path / "data"
    stranger = Path("~nobody-of-that-name/mine.pth")
    assert build({"source.checkpoint": str(stranger)}).source.checkpoint == stranger


def test_the_last_of_two_assignments_wins() -> None:
    assert parse_assignments(["seed=1", "bridge.epochs=2", "seed=3"]) == {
        "seed": 3,
        "bridge.epochs": 2,
    }
    assignments = ["bridge.epochs=1", "bridge={epochs: 2}", "bridge.epochs=3"]
    assert parse_assignments(assignments) == {"bridge.epochs": 3}


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("bridge.learning_rate=1e-3", 0.001),  # a text in YAML 1.1
        ("bridge.learning_rate=1.0e-3", 0.001),
        ("training.clip_norm=null", None),
        ("training.flip=no", False),
        ("training.flip=false", False),
        ("classes.tr=[desk, '*room']", ("desk", "*room")),
        ("classes.tr=[]", ()),
        ("classes.tr=[no, yes, 2020-01-01]", ("no", "yes", "2020-01-01")),
        ("prepare.root=/data/a b=c", Path("/data/a b=c")),
        ("prepare.root=/data/cam #2", Path("/data/cam #2")),
        ("prepare.root='/data/cam #2'", Path("/data/cam #2")),
        ("prepare.root=2024", Path("2024")),
        ("source.checkpoint=runs/a: b.pth", Path("runs/a: b.pth")),
        ("source.features=1", "1"),
        ("seed=008", 8),
        ("seed=010", 10),
        ("source.mean=[0, 0, 0]", (0, 0, 0)),
        (" bridge.epochs =4", 4),
    ],
)
def test_assigned_values_are_read_as_yaml(assignment: str, expected: Any) -> None:
    found: Any = build(parse_assignments([assignment]))
    for key in assignment.partition("=")[0].strip().split("."):
        found = getattr(found, key)
    assert found == expected


@pytest.mark.parametrize(
    "assignment", ["seed", "=3", "seed=[1", "seed=!!python/name:os.system", "bridge=null"]
)
def test_what_is_no_assignment_is_shown(assignment: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_assignments([assignment])
    assert repr(assignment) in str(caught.value)


@pytest.mark.parametrize(
    "assignment",
    [
        "source.epochs=no",  # YAML 1.1 makes false of it, which would be 0
        "bridge.alpha_d=on",
        "seed=1:0",
        "classes.tr=[1]",
        "seed=1.5",
        "seed=",
        "seed=2020-01-01",
        "bridge.epochs=",
        "bridge=3",
        "bridge.epochs.more=3",
    ],
)
def test_a_value_of_the_wrong_kind_is_named(assignment: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(parse_assignments([assignment]))
    assert assignment.partition("=")[0].removesuffix(".more") in str(caught.value)


@pytest.mark.parametrize("name", ["bridge.alpha_f", "bridge.learning_rate", "training.clip_norm"])
@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "inf", "nan", "1e400"])
def test_infinite_and_undefined_numbers_are_refused(name: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(parse_assignments([f"{name}={value}"]))
    assert name in str(caught.value)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_infinite_numbers_are_refused_in_every_number(value: float) -> None:
    for name, field in section_fields().items():
        if "float" in describe_type(field.annotation):
            with pytest.raises(ConfigError):
                build({name: value})


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("bridge.alpha_g", "bridge.alpha_"),
        ("brigde.epochs", "bridge?"),
        ("epochs", "epochs"),
        ("tgkt.beta_sefl", "tgkt.beta_self"),
        ("imagesize", "image_size"),
        ("batch_size", "runtime.batch_size"),
        ("Seed", "seed"),
    ],
)
def test_an_unknown_setting_brings_the_nearest_right_one(name: str, near: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build({name: 1})
    message = str(caught.value)
    assert "unknown setting" in message
    assert "did you mean" in message
    assert near in message.partition("did you mean")[2]


def test_an_unknown_setting_unlike_all_others_says_where_they_are_listed() -> None:
    with pytest.raises(ConfigError, match="sfkt config show"):
        build({"qqqqqqqqqq": 1})


def test_all_errors_come_at_once() -> None:
    wrong = {
        "seed": -1,
        "image_size": 5,
        "bridge": {"epochs": 0, "alpha_g": 1},
        "tgkt": {"self_from": 2},
        "split": {"source": 0.7, "test": 0.4},
    }
    with pytest.raises(ConfigError) as caught:
        build(wrong)
    lines = str(caught.value).splitlines()
    assert len(lines) == 7
    for name in (
        "seed",
        "image_size",
        "bridge.epochs",
        "bridge.alpha_g",
        "tgkt.self_from",
        "split",
    ):
        assert sum(f"setting {name} =" in line for line in lines) == 1
    for seen in ("-1", "5", "0", "2", "0.7"):
        assert seen in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["bridge: [", "- a\n- b\n", "3", "a: &x [*x]\nb: *y\n", "!!python/object:os.x {}\n"],
)
def test_a_file_that_holds_no_settings_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        build(read_yaml(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["1: 2", ".epochs: 3", "bridge: {1: 2}"])
def test_a_name_that_is_none_is_told_as_it_was_written(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    written = text.partition(":")[0]
    with pytest.raises(ConfigError, match=rf"unknown setting {re.escape(written)}"):
        build(settings_of_file(path))


@pytest.mark.parametrize("name", ["source.backbone", "transfer.method", "bridge.epochs"])
def test_null_is_not_advised_to_be_put_into_quotes(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"setting {name} = None") as caught:
        build({name: None})
    assert "quotes" not in str(caught.value)


def test_a_list_that_is_too_short_and_a_path_that_is_a_number_are_explained() -> None:
    with pytest.raises(
        ConfigError, match=r"setting source\.mean = \[0\.5, 0\.5\]: value 3 is miss"
    ):
        build({"source.mean": [0.5, 0.5]})
    with pytest.raises(ConfigError, match=r"setting prepare\.root = 2024: .* quotes"):
        build({"prepare.root": 2024})


def test_a_section_that_is_written_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("bridge:\n  epochs: 3\nseed: 1\nbridge:\n  alpha_f: 0.5\n")
    with pytest.raises(ConfigError, match=r"(?s)bridge is given twice.*line 4"):
        read_yaml(path)
    path.write_text("a: &a\n  b: &b {x: 1}\n  c: &c {<<: *b, x: 2}\nd: {<<: *c, x: 3}\n")
    assert read_yaml(path)["d"] == {"x": 3}  # what is merged may be replaced


def test_a_setting_that_is_written_in_two_ways_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"bridge\.epochs is given twice"):
        build({"bridge.epochs": 3, "bridge": {"epochs": 4}})
    (path := tmp_path / "config.yaml").write_text("bridge.epochs: 3\nbridge: {epochs: 4}\n")
    with pytest.raises(ConfigError, match=r"bridge\.epochs is given twice"):
        settings_of_file(path)
    config = build({"bridge.epochs": 3}, {"bridge": {"epochs": 4, "alpha_f": 1.0}})
    assert config.bridge.epochs == 4


@pytest.mark.parametrize("name", ["prepare.root", "source.checkpoint", "training.warm_start"])
def test_an_empty_path_is_not_the_working_folder(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}.*the path is empty"):
        build(parse_assignments([f"{name}="]))
    build(parse_assignments([f"{name}=null"]))


def test_a_benchmark_file_is_told_from_one_of_settings(tmp_path: Path) -> None:
    (path := tmp_path / "plan.yaml").write_text("seeds: [0]\nmethods: [shot]\n")
    with pytest.raises(ConfigError, match=r"is a benchmark file: use it with `sfkt benchmark"):
        settings_of_file(path)
    path.write_text("bridge: {epochs: 3}\n")
    assert settings_of_file(path) == {"bridge.epochs": 3}


def test_missing_undecodable_and_empty_files(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for unreadable in (path, tmp_path):
        with pytest.raises(ConfigError) as caught:
            read_yaml(unreadable)
        assert str(unreadable) in str(caught.value)
    with pytest.raises(ConfigError, match="more than 1,048,576 bytes"):
        read_yaml(Path("/dev/zero"))
    path.write_bytes(b"seed: \xff")
    with pytest.raises(ConfigError, match="save it as UTF-8"):
        read_yaml(path)
    path.write_text("# nothing but a comment\n")
    assert build(read_yaml(path)) == Config()


def test_resolved_settings_can_be_read_back(tmp_path: Path) -> None:
    config = build(
        {
            "prepare": {"root": "a/b"},
            "classes": {"tr": ["ä", "no", "09", "1e3", "1:0", "2020-01-01", "null", "<<"]},
            "bridge": {"learning_rate": 1e-7},
            "training": {"clip_norm": 0.5},
        }
    )
    assert build(yaml.safe_load(to_yaml(config))) == config
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert build(read_yaml(tmp_path / "config.yaml")) == config
    tr = as_dict(config)["classes"]["tr"]
    assert parse_assignments([f"classes.tr={one_line(tr)}"]) == {"classes.tr": tr}
    assert build(as_dict(config)) == config


def test_settings_cannot_be_changed_behind_a_runs_back() -> None:
    config = Config()
    with pytest.raises(ValueError, match="frozen"):
        config.bridge.epochs = 3  # type: ignore[misc]


def test_every_setting_says_what_it_means() -> None:
    for name, field in section_fields().items():
        assert field.description, name
        assert describe_type(field.annotation), name


def test_the_translator_is_wider_behind_a_network_that_was_trained_elsewhere() -> None:
    assert [build().bridge.channels(pretrained=each) for each in (False, True)] == [16, 24]
    given = build({"bridge": {"width": 3}})
    assert [given.bridge.channels(pretrained=each) for each in (False, True)] == [3, 3]


def test_a_long_wrong_value_is_not_shown_whole() -> None:
    with pytest.raises(ConfigError) as refused:
        build({"unheard": ["x"] * 100_000})
    assert "unknown setting unheard" in str(refused.value)
    assert len(str(refused.value)) < 600


def test_a_setting_that_is_gone_is_named_in_files_and_passed_over_in_runs() -> None:
    earlier = {"evaluate": {"bootstrap": 500, "oracle": False}}
    with pytest.raises(ConfigError, match=r"evaluate\.bootstrap = 500: .* leave it out"):
        build(earlier)
    assert build(known_settings(earlier)).evaluate.oracle is False
