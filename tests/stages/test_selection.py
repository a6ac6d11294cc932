from pathlib import Path

import numpy as np
import pytest
import torch

from sfkt_cli.data.store import open_store, spread
from sfkt_cli.errors import DataError
from sfkt_cli.evaluation import figures
from sfkt_cli.evaluation.labelled import read_splits
from sfkt_cli.evaluation.sections import epoch_choice
from sfkt_cli.files import write_record, write_text
from sfkt_cli.methods.label_free import load_epochs, selector, write_epoch
from sfkt_cli.settings.config import build, parse_assignments
from sfkt_cli.training.batches import TransferBatches
from sfkt_cli.training.runtime import Runtime
from tests.stages.evaluation_runs import make_run


def logits_of(classes: list[int]) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(classes), 4).float()


@pytest.mark.parametrize(
    ("setting", "ti", "expected"),
    [
        ("auto", True, "ti_closeness"),
        ("auto", False, None),
        ("last", True, None),
        ("ti_agreement", False, None),
        ("tr_density", False, "tr_density"),
    ],
)
def test_the_score_that_chooses(setting: str, ti: bool, expected: str | None) -> None:
    config = build(parse_assignments([f"training.select={setting}"]))
    assert selector(config, ti=ti, auto="ti_closeness") == expected
    assert setting != "auto" or selector(config, ti=ti) is None


@pytest.mark.parametrize(
    ("settings", "ti", "warning"),
    [
        (["select=ti_rank"], False, "training.select=ti_rank: there are no TI pairs to score on"),
        (["patience=3"], True, "training.patience=3 stops nothing"),
        (["patience=3", "select=last"], True, "training.patience=3 stops nothing"),
        (["patience=3", "select=tr_mirror"], False, ""),
        (["select=ti_rank"], True, ""),
        ([], False, ""),
    ],
)
def test_settings_without_effect_are_warned_of(
    settings: list[str], ti: bool, warning: str, capsys: pytest.CaptureFixture[str]
) -> None:
    selector(build(parse_assignments([f"training.{setting}" for setting in settings])), ti=ti)
    said = capsys.readouterr().err
    assert warning in said
    assert bool(warning) == ("warning: " in said)


@pytest.mark.parametrize("ti", [True, False])
def test_pairs_choose_the_epoch_of_methods_that_are_not_trained_on_them(
    tmp_path: Path, ti: bool
) -> None:
    config = build(parse_assignments(["training.select=ti_rank"]))
    runtime = Runtime(torch.device("cpu"), torch.float32)
    images = ["tr_target", *(["ti_target"] if ti else [])]
    store = open_store(make_run(tmp_path).transfer_store)
    batches = TransferBatches(config, store, images, runtime, 2)
    assert selector(config, ti=batches.paired) == "ti_rank"


def test_epochs_are_overwritten_from_where_a_stage_goes_on(tmp_path: Path) -> None:
    for epoch, said in enumerate([[0, 1], [1, 1], [2, 2]]):
        write_epoch(tmp_path, epoch, logits_of(said))
    write_epoch(tmp_path, 1, logits_of([3, 3]))
    np.testing.assert_array_equal(load_epochs(tmp_path), [[0, 1], [3, 3]])


@pytest.mark.parametrize("place", [8, 60, -40, -1])
def test_a_training_does_not_go_on_with_damaged_epochs(tmp_path: Path, place: int) -> None:
    write_epoch(tmp_path, 0, logits_of([0, 1]))
    content = bytearray((tmp_path / "epochs.npy").read_bytes())
    content[place] ^= 1
    (tmp_path / "epochs.npy").write_bytes(content)
    with pytest.raises(DataError, match=r"epochs\.npy is damaged: delete it"):
        write_epoch(tmp_path, 1, logits_of([1, 1]))


def test_of_another_number_of_images_nothing_is_kept(tmp_path: Path) -> None:
    write_epoch(tmp_path, 0, logits_of([0, 1, 2]))
    write_epoch(tmp_path, 1, logits_of([0, 1]))
    np.testing.assert_array_equal(load_epochs(tmp_path), [[0, 1]])


def test_the_kept_epoch_is_held_against_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(figures.TERMS, "tr_density")  # a score may have no other name
    run = make_run(tmp_path)
    store = open_store(run.transfer_store)
    target = read_splits(store, open_store(run.test_store))[0]
    rows = spread(store.count("target"))
    truth = np.zeros(len(rows), np.int64)
    truth[np.isin(rows, target.rows)] = target.labels
    folder = run.path("transfer", "tgkt")
    folder.mkdir(parents=True)
    lines = ""
    count = len(truth)
    for epoch, right in enumerate([0.25, 0.5, 1.0, 0.75]):
        said = np.where(np.arange(count) < right * count, truth, (truth + 1) % 3)
        write_epoch(folder, epoch, torch.nn.functional.one_hot(torch.from_numpy(said)).float())
        lines += f'{{"epoch": {epoch + 1}, "ti_closeness": {right}, "tr_density": {-right}}}\n'
    write_text(folder / "metrics.jsonl", lines)
    write_record(folder / "done.json", {"stage": "transfer/tgkt", "best_epoch": 4})
    section = epoch_choice(run, target, ["transfer/tgkt"])
    assert section is not None
    (line,) = section.lines
    stage, kept, accuracy, best, lost, *correlations = line.values()
    assert (stage, kept) == ("transfer/tgkt", "4 of 4")
    assert float(best) == 100.0
    assert float(lost) == pytest.approx(100 - float(accuracy), abs=0.11)
    assert correlations == ["+1.00", "-", "-", "-", "-", "-1.00", "-"]


def test_without_labels_nothing_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path, labelled=False)
    store = open_store(run.transfer_store)
    target = read_splits(store, open_store(run.test_store))[0]
    run.path("transfer", "tgkt").mkdir(parents=True)
    write_record(
        run.path("transfer", "tgkt", "done.json"), {"stage": "transfer/tgkt", "best_epoch": 1}
    )
    write_epoch(run.path("transfer", "tgkt"), 0, torch.zeros(store.count("target"), 3))
    assert epoch_choice(run, target, ["transfer/tgkt"]) is None
