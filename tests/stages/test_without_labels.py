"""No label at all, as with a camera just mounted: the classes are those of the model brought."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sfkt_cli.data.readers import read_archive
from sfkt_cli.data.splits import choose_classes
from sfkt_cli.data.store import open_store
from sfkt_cli.errors import ConfigError, DataError
from sfkt_cli.evaluation.labelled import list_to_label
from sfkt_cli.pipeline import run_all, train
from sfkt_cli.settings.config import Config, build
from sfkt_cli.settings.options import Options
from sfkt_cli.settings.runs import Run
from sfkt_cli.stages.evaluate import inputs_of, open_stores
from sfkt_cli.student import load_student
from tests.data.make_archives import depth, folders, save
from tests.stages.evaluation_runs import save_weights

CLASSES = ["desk", "lamp", "mug"]
SMALL = (
    "dataset=folders", "image_size=16", "training.min_steps=2", "source.width=4",
    "source.checkpoint=mine.pth", "bridge.epochs=1", "bridge.width=4", "transfer.epochs=1",
    "runtime.batch_size=8", "runtime.gpus=0", "prepare.workers=1", "prepare.root=data",
)  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with TI pairs, unlabelled target images and a model of three classes."""
    monkeypatch.chdir(tmp_path)
    folders(tmp_path / "data", labels=())
    for number in range(12):
        save(tmp_path / f"data/tr/target/{number}.png", depth(number))
    save_weights(tmp_path / "mine.pth", classes=3)
    return tmp_path


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("source.classes=[desk, lamp, mug]",),
        ("classes.tr=[mug, desk, lamp]", "source.classes=[desk, lamp, mug]"),
    ],
)
def test_all_stages_run_without_a_label(
    place: Path, more: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(place / "run")
    run_all(Options(run=run.folder, assignments=[*SMALL, *more]))
    told = " ".join(capsys.readouterr().err.split())
    listed = run.record("evaluate")["to_label"] is not None
    assert listed == ("it lists up to 50 images to label" in told), "`transfer` says so before"
    assert listed == ("lists images on which the student tgkt and your RGB model differ" in told)
    assert listed == ("Run `sfkt evaluate --method tgkt`" in told)
    names = {"desk", "lamp", "mug"} if more else {"class-0", "class-1", "class-2"}
    student = load_student(run.folder)
    assert set(student.classes) == names
    assert student.predict(place / "data/tr/target/3.png").label in names
    results = json.loads(run.path("evaluate/results.json").read_text())
    assert results["rows"] == []
    assert results["classes"] == list(student.classes)
    given = ["mug", "desk", "lamp"] if len(more) == 2 else []
    assert open_store(run.transfer_store).classes == given
    if given:
        assert list(student.classes) == given  # the order of classes.tr
    assert "test.h5 holds no labels" in run.path("evaluate/report.md").read_text()
    own = list_to_label(run, *run.methods())
    own.write_text(f"name,label\n0,{student.classes[0]}\n")
    assert own.name in inputs_of(Config(), run, *open_stores(run))


def test_other_classes_than_the_models_are_refused(place: Path) -> None:
    told = [*SMALL, "classes.tr=[desk, lamp, cup]", "source.classes=[desk, lamp, mug]"]
    with pytest.raises((ConfigError, DataError), match="only in the data: cup"):
        run_all(Options(run=place / "run", assignments=told))
    with pytest.raises((ConfigError, DataError), match="only in the model: mug"):
        train("bridge", Options(run=place / "run"))


def test_names_like_known_ones_are_taken_for_slips(place: Path) -> None:
    save(place / "data/tr/lamp/1.png", depth(1))
    settings = {"dataset": "folders", "prepare": {"root": str(place / "data")}}
    for tr, told in (("lam", "did you mean 'lamp'"), ("m*", "matches no class")):
        config = build(settings, {"classes": {"tr": [tr]}})
        with pytest.raises(ConfigError, match=told):
            choose_classes(config.classes, read_archive(config))
    config = build(settings, {"classes": {"tr": ["desk", "lamp"]}})
    assert choose_classes(config.classes, read_archive(config)) == (["desk", "lamp"], [])
