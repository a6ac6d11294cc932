"""The switches of a sceptic: wrong partners, fewer pairs, a source model that never learned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sfkt_cli.data.images import Encoding, as_rgb, encode
from sfkt_cli.data.store import Store, open_store
from sfkt_cli.methods.label_free import ScoringPairs, epoch_scorer, scoring_pairs
from sfkt_cli.methods.objective import TeacherOutputs, TransferObjective
from sfkt_cli.models.classifier import Classifier, freeze
from sfkt_cli.models.saving import load_model
from sfkt_cli.models.translators import make_translator
from sfkt_cli.settings.config import Config, build
from sfkt_cli.settings.runs import Run
from sfkt_cli.settings.stage import Stage
from sfkt_cli.stages.bridge import compare_with_untouched
from sfkt_cli.stages.source import source
from sfkt_cli.stages.transfer import calibrated
from sfkt_cli.training.batches import TransferBatches, divide_pairs, settle_batches
from sfkt_cli.training.loop import Objective
from sfkt_cli.training.predicting import View
from sfkt_cli.training.runtime import Runtime, make_runtime

CPU = Runtime(torch.device("cpu"), torch.float32)
IMAGES = ("ti_target", "ti_rgb", "tr_target")
STILL = {"shift": 0.0, "flip": False, "min_steps": 1}


def settings(**training: object) -> Config:
    return build({"training": {**STILL, **training}, "runtime": {"gpus": 0, "batch_size": 16}})


def make_batches(config: Config, store: Store, size: int = 16) -> TransferBatches:
    return TransferBatches(config, store, IMAGES, CPU, size)


def settled(
    config: Config, store: Store, folder: Path, *images: str, runtime: Runtime = CPU
) -> TransferBatches:
    stage = Stage("test", folder, config, {})
    return settle_batches(stage, store, images or IMAGES, runtime, Objective())


def test_shuffled_pairs_have_partners_of_other_pairs(untrained_run: Run) -> None:
    store = open_store(untrained_run.transfer_store)
    rgb = store["ti/rgb"]
    for shuffle in (False, True):
        config = settings(shuffle_pairs=shuffle)
        batch = make_batches(config, store)(0, 0)
        targets = [
            int(np.flatnonzero((store["ti/target"] == image).all(axis=(1, 2)))[0])
            for image in batch["ti_target"].numpy()
        ]
        same = [row == own for row, own in zip(batch["ti_rows"].tolist(), targets, strict=True)]
        assert not any(same) if shuffle else all(same)
        np.testing.assert_array_equal(batch["ti_rgb"].numpy(), rgb[batch["ti_rows"].numpy()])


def test_a_share_of_the_pairs_leaves_the_steps_as_they_are(untrained_run: Run) -> None:
    store = open_store(untrained_run.transfer_store)
    whole, part = settings(), settings(ti_fraction=0.25)
    batches = [make_batches(config, store) for config in (whole, part)]
    counts = [each.streams["ti"].count for each in batches]
    assert counts[1] == round(counts[0] / 4)
    for fraction in (1.0, 0.5, 0.1, 0.01, 0.001):
        config = settings(ti_fraction=fraction)
        assert make_batches(config, store, 8).steps == counts[0] // 8


def models_of(run: Run) -> tuple[Classifier, Classifier, Encoding]:
    """The student of tgkt, the source model, and the student's encoding."""
    saved = load_model(run.path("transfer", "tgkt"))
    source = load_model(run.path("source")).module
    assert isinstance(saved.module, Classifier)
    assert isinstance(source, Classifier)
    assert saved.card.encoding is not None
    return saved.module.eval(), source, saved.card.encoding


def test_scores_look_at_both_images_of_a_pair_alike(untrained_run: Run, tmp_path: Path) -> None:
    """Neither over mirror images: the student's features against the partners', by hand."""
    store = open_store(untrained_run.transfer_store)
    student, source, encoding = models_of(untrained_run)
    view, pairs = View(CPU, student, encoding), scoring_pairs(store, View(CPU, freeze(source)))
    _, held = divide_pairs(store)
    scores = epoch_scorer(store, pairs, view, tmp_path)(0)
    with torch.inference_mode():
        rgb = torch.from_numpy(store["ti/rgb"][held]).permute(0, 3, 1, 2) / 255
        partner, said = source(rgb)
        stored = torch.from_numpy(store["ti/target"][held])
        features, own = student(as_rgb(encode(stored, encoding)))
    gap = (features - partner).square().mean() / partner.var(dim=0, correction=0).mean()
    assert scores["ti_closeness"] == pytest.approx(-float(gap), rel=1e-4)
    assert scores["ti_agreement"] == float((said.argmax(1) == own.argmax(1)).float().mean())


def first_pairs(pairs: ScoringPairs | None, count: int, *, unseen: bool = True) -> ScoringPairs:
    assert pairs is not None
    return ScoringPairs(
        pairs.rows[:count], pairs.target[:count], pairs.features[:count], pairs.logits[:count],
        pairs.groups[:count], unseen,
    )  # fmt: skip


def test_a_few_pairs_calibrate_nothing(untrained_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sfkt_cli.training.batches.FEWEST_HELD_OUT", 10_000)  # all pairs score
    store = open_store(untrained_run.transfer_store)
    student, source, encoding = models_of(untrained_run)
    view, pairs = View(CPU, student, encoding), scoring_pairs(store, View(CPU, freeze(source)))
    trained_on = first_pairs(pairs, 20, unseen=False)
    for few in (None, first_pairs(pairs, 1), first_pairs(pairs, 19), trained_on):
        assert calibrated(few, view) == 1.0
    assert calibrated(first_pairs(pairs, 20), view) != 1.0


def test_a_method_without_pairs_shows_no_image_twice_in_a_batch(untrained_run: Run) -> None:
    store, config = open_store(untrained_run.transfer_store), settings(min_steps=1)
    assert store.count("ti") > (count := store.count("target"))
    config = config.model_copy(
        update={"runtime": config.runtime.model_copy(update={"batch_size": 4096})}
    )
    for ti in (False, True):
        pairs = ("ti_target",) if ti else ()
        batches = settled(config, store, untrained_run.folder, "tr_target", *pairs)
        rows = batches(0, 0)["tr_rows"]
        assert (len(rows) == len(set(rows.tolist())) == count) != ti
        assert ("ti" in batches.streams) == ti


@pytest.mark.parametrize("size", [16, "auto"])
def test_a_dry_run_tries_one_of_several_gpus_with_its_share(
    untrained_run: Run, tmp_path: Path, size: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sfkt_cli.training.runtime.use_gpus", lambda config: 2)
    monkeypatch.setattr("sfkt_cli.training.trial._reckon", lambda *tried: 8)
    store, config = open_store(untrained_run.transfer_store), settings()
    runtime = make_runtime(config.runtime, dry=True)
    real = settled(config, store, tmp_path)
    asked = config.runtime.model_copy(update={"batch_size": size})
    config = config.model_copy(update={"runtime": asked})
    tried = settled(config, store, tmp_path, runtime=runtime)
    assert (tried.batch_size, tried.steps) == (16, real.steps)
    assert [len(batches(0, 0)["tr_rows"]) for batches in (real, tried)] == [16, 8]


def test_a_method_may_ask_for_a_second_view(untrained_run: Run) -> None:
    store, config = open_store(untrained_run.transfer_store), settings(shift=0.2)

    class TwoViews(TransferObjective):
        needs_ti = needs_second_view = True

    anything: Any = Objective()
    images = TwoViews(anything, anything, config).needs_images
    batches = settled(config, store, untrained_run.folder, *images)
    assert batches.images_per_step == 3 * batches.batch_size
    batch = batches(0, 0)
    assert batch["tr_target"].shape == batch["tr_target_2"].shape
    assert not torch.equal(batch["tr_target"], batch["tr_target_2"])
    assert "ti_target_2" not in batch


def test_an_epoch_passes_few_target_images_several_times(untrained_run: Run) -> None:
    store = open_store(untrained_run.transfer_store)
    count = store.count("target")
    few, many = settings(min_steps=1), settings(min_steps=100)
    passes = [make_batches(config, store).passes for config in (few, many)]
    assert 1.0 <= passes[0] < passes[1]
    assert passes[1] == 100 * 16 / count


@pytest.mark.parametrize(
    ("sizes", "held"),
    [
        ([10] * 100, 100),  # many small groups: a tenth
        ([1000] * 5, 1000),  # one of five
        ([2000, 700, 600], 600),  # one that is at most a fifth
        ([100] * 12, 200),  # one proves nothing: two, a sixth
        ([1000] * 4, 2000),  # a quarter is too many: all are trained on, and some score
        ([10] * 40, 80),  # 40 are few to score on: a fifth
        ([1] * 50, 10),
        ([60, 59, 1], 120),  # one tells nothing: all are trained on, and score
        ([1] * 45, 45),
    ],
)
def test_pairs_are_held_out_in_whole_groups(sizes: list[int], held: int) -> None:
    groups = np.repeat([f"place {number}" for number in range(len(sizes))], sizes)
    for seed in range(5):
        store: Any = SimpleNamespace(
            strings=lambda name: list(groups), count=lambda name: len(groups), attrs={"seed": seed}
        )
        trained, kept = divide_pairs(store)
        assert len(kept) == held
        if len(trained) < len(groups):
            assert not set(groups[trained]) & set(groups[kept])
            assert len(trained) + len(kept) == len(groups)
        else:
            assert sizes in ([1000] * 4, [60, 59, 1], [1] * 45)
            assert len(set(kept.tolist())) == held


def test_a_stage_with_another_seed_trains_on_the_same_pairs(untrained_run: Run) -> None:
    store = open_store(untrained_run.transfer_store)
    _, held_out = divide_pairs(store)
    for seed in range(3):
        config = settings().model_copy(update={"seed": seed})
        batches = make_batches(config, store)
        seen = [batches(0, step)["ti_rows"].tolist() for step in range(batches.steps)]
        assert not {row for rows in seen for row in rows} & {*held_out.tolist()}


def test_pairs_that_the_bridge_was_trained_on_prove_nothing(
    untrained_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(untrained_run.transfer_store)
    source, translator = (load_model(untrained_run.path(name)) for name in ("source", "bridge"))
    assert isinstance(source.module, Classifier)
    assert translator.card.encoding is not None
    leads = []
    for fewest in (10, 10_000):  # of fewer pairs none are held out
        monkeypatch.setattr("sfkt_cli.training.batches.FEWEST_HELD_OUT", fewest)
        pairs = scoring_pairs(store, View(CPU, freeze(source.module)))
        outputs = TeacherOutputs(
            store, source.module, translator, translator.card.encoding, CPU, pairs, ti=True
        )
        leads.append(outputs.bridge_lead(source.module))
    assert leads[0] != 0.0
    assert leads[1] == 0.0


def test_a_translator_is_compared_with_the_encoded_images(untrained_run: Run) -> None:
    store = open_store(untrained_run.transfer_store)
    source, bridge = (load_model(untrained_run.path(name)) for name in ("source", "bridge"))
    encoding, pairs = bridge.encoding_of("bridge"), scoring_pairs(store, View(CPU, source.module))
    assert pairs is not None
    identity = make_translator("identity", channels=encoding.encoded_channels, width=0)
    same, other = (
        View(CPU, source.module, encoding, module) for module in (identity, bridge.module)
    )
    rank, lead = compare_with_untouched(pairs, same)
    assert lead == 0.0
    rank_beside_another, lead = compare_with_untouched(pairs, other)
    assert rank == rank_beside_another
    assert lead
    recording = replace(pairs, groups=["one recording"] * len(pairs.rows))
    assert compare_with_untouched(recording, other) == (rank, None)


def test_a_source_model_may_stay_random(untrained_run: Run, tmp_path: Path) -> None:
    (tmp_path / "prepare").symlink_to(untrained_run.path("prepare"))
    sizes = {"epochs": 0, "width": 4, "bottleneck": 8}
    source(build({"image_size": 16, "source": sizes, "runtime": {"gpus": 0}}), Run(tmp_path))
    model = load_model(tmp_path / "source").module
    assert Run(tmp_path).finished("source")
    assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())
