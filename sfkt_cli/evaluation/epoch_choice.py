"""How well label-free scores chose the epochs, held against labels after the fact."""

from __future__ import annotations

import numpy as np

from sfkt_cli.data.store import Store
from sfkt_cli.evaluation.labelled import Split
from sfkt_cli.evaluation.report import Section, percent
from sfkt_cli.scores import rank_correlation
from sfkt_cli.settings.runs import Run
from sfkt_cli.training.pairs import FILE, SELECTORS, load_epochs, spread


def epoch_choice(run: Run, store: Store, target: Split, stages: list[str]) -> Section | None:
    """How the kept epoch compares with the best one, and each score with accuracy over epochs."""
    rows = spread(store.count("target"))
    places = np.searchsorted(target.rows, rows)
    places = np.minimum(places, max(len(target.rows) - 1, 0))
    labelled = len(target.rows) > 0 and target.rows[places] == rows
    cells = []
    for stage in stages:
        predicted = load_epochs(run.output(stage, FILE).parent)
        kept = run.record(stage).get("best_epoch") or len(predicted) + 1
        whole = len(predicted) >= max(kept, 2) and predicted.shape[1] == len(rows)
        if not np.any(labelled) or not whole:
            continue
        right = predicted[:, labelled] == target.labels[places[labelled]]
        accuracy = right.mean(axis=1)
        metrics = run.metrics(stage)
        correlations = []
        for name in SELECTORS:
            values = [row[name] for row in metrics if name in row]
            comparable = len(values) == len(accuracy) >= 4
            value = rank_correlation(np.array(values), accuracy) if comparable else float("nan")
            correlations.append("-" if np.isnan(value) else f"{value:+.2f}")
        of_kept, best = accuracy[kept - 1], accuracy.max()
        cells.append((stage, f"{kept} of {len(predicted)}", percent(of_kept), percent(best),
                      f"{100 * (best - of_kept):.1f}", *correlations))  # fmt: skip
    if not cells:
        return None
    return Section(
        "Choosing the epoch without labels",
        (
            "Accuracy on the unlabelled target images after the epoch that was kept and after the "
            "best one, and Spearman's correlation of each label-free score with it over the "
            "epochs. Looked at afterwards; nothing was chosen by it.",
        ),
        ("stage", "kept", "its accuracy %", "best %", "lost", *SELECTORS),
        tuple(cells),
    )
