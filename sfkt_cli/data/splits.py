"""Who gets which sample: source, target, test and TI, by group.

``disjoint``: groups (scenes, places, captures, subjects) are dealt out class by class, so that
source, target and test share none and each class is in all three when it has enough groups.
``paper``: source and target are all TR images, nothing is held out, and accuracy is taken on the
target training images, as SOCKET and the paper do.

Archives list their samples class by class. So the parts that go into transfer.h5 are shuffled: the
place of a sample tells nothing of its class.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

from sfkt_cli.data.records import PARTS, TR_PARTS, Record
from sfkt_cli.settings.config import SplitConfig

Parts = dict[str, list[Record]]


def split_records(
    records: Sequence[Record],
    tr: Collection[str],
    ti: Collection[str],
    split: SplitConfig,
    seed: int,
) -> Parts:
    """Deal out the records of an archive.

    Args:
        records: All records of the archive.
        tr: Task-relevant class names.
        ti: Task-irrelevant class names.
        split: Protocol and shares.
        seed: The same seed gives the same parts, whatever the order of the records.

    Returns:
        Records of each part: target and TI in an order drawn from the seed, the others in the
        order given. A record may be in several parts only under the ``paper`` protocol.
    """
    open_to = {record.id: _open_parts(record, tr, ti) for record in records}
    if split.protocol == "paper":
        kept = {"source", "target", "ti"}
        parts = {p: [r for r in records if p in open_to[r.id] and p in kept] for p in PARTS}
        return _shuffled(parts, seed)
    shares = {
        "source": split.source,
        "target": round(1 - split.source - split.test, 9),
        "test": split.test,
    }
    dealt = _deal(records, open_to, shares, seed)
    parts = {
        part: [
            r
            for r in records
            if part in open_to[r.id] and (part == "ti" or dealt.get(r.group, part) == part)
        ]
        for part in PARTS
    }
    return _shuffled(parts, seed)


def _shuffled(parts: Parts, seed: int) -> Parts:
    """The parts of transfer.h5 in an order that depends on the seed and the ids alone."""
    for part in ("ti", "target"):
        parts[part].sort(key=lambda record: record.id)
        random.Random(f"{seed}/rows/{part}").shuffle(parts[part])
    return parts


def left_out(
    records: Iterable[Record],
    tr: Collection[str],
    ti: Collection[str],
    split: SplitConfig,
    parts: Parts,
) -> dict[str, int]:
    """Records that are in no part although their class was chosen or is unknown.

    Args:
        records: All records of the archive.
        tr: Task-relevant class names.
        ti: Task-irrelevant class names.
        split: Protocol and shares.
        parts: How :func:`split_records` dealt them out.

    Returns:
        Number of records by kind and reason, without those that the archive itself keeps out.
    """
    used = {record.id for records_of_part in parts.values() for record in records_of_part}
    unused = (
        "images for the test alone, which split.protocol=paper has not"
        if split.protocol == "paper"
        else "images of groups that went whole to a part which cannot use them"
    )
    reasons: Counter[str] = Counter()
    for record in records:
        chosen = record.label is None or record.label in tr or record.label in ti
        if record.id in used or not chosen:
            continue
        if not any(_fits(record, tr, ti).values()):
            reasons[_misfit(record)] += 1
        elif _open_parts(record, tr, ti):
            reasons[unused] += 1
    return dict(reasons)


def _open_parts(record: Record, tr: Collection[str], ti: Collection[str]) -> tuple[str, ...]:
    """Parts that a record's class, images and archive allow."""
    allowed = record.parts or (PARTS if record.label is not None else ("target", "ti"))
    fits = _fits(record, tr, ti)
    return tuple(part for part in PARTS if part in allowed and fits[part])


def _misfit(record: Record) -> str:
    kind = "RGB" if record.target is None else "target"
    if record.label is not None:
        return f"{kind} images of a TI class without a partner"
    return f"{kind} images without a label"


def _fits(record: Record, tr: Collection[str], ti: Collection[str]) -> dict[str, bool]:
    """Whether each part can use a record of this class and these images."""
    is_tr = record.label in tr or (record.label is None and "ti" not in record.parts)
    is_ti = record.label in ti or (record.label is None and "ti" in record.parts)
    return {
        "source": is_tr and record.rgb is not None and record.label is not None,
        "target": is_tr and record.target is not None,
        "test": is_tr and record.target is not None and record.label is not None,
        "ti": is_ti and record.rgb is not None and record.target is not None,
    }


def _deal(
    records: Sequence[Record],
    open_to: Mapping[str, tuple[str, ...]],
    shares: Mapping[str, float],
    seed: int,
) -> dict[str, str]:
    """The part of each group; groups go class by class, commonest class of the group first."""
    members: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if any(part in TR_PARTS for part in open_to[record.id]):
            members[record.group].append(record)
    strata: dict[tuple[str, tuple[str, ...]], list[str]] = defaultdict(list)
    for group, group_records in members.items():
        label = Counter(record.label or "" for record in group_records).most_common(1)[0][0]
        parts = tuple(p for p in TR_PARTS if any(p in open_to[r.id] for r in group_records))
        strata[label, parts].append(group)
    dealt: dict[str, str] = {}
    for (label, parts), groups in sorted(strata.items()):
        order = sorted(groups)
        random.Random(f"{seed}/{label}/{parts}").shuffle(order)
        sizes = {group: len(members[group]) for group in order}
        dealt |= _deal_class(order, sizes, {part: shares[part] for part in parts})
    return dealt


def _deal_class(
    order: Sequence[str], sizes: Mapping[str, int], shares: Mapping[str, float]
) -> dict[str, str]:
    """Give each group to the part that lacks most; the last ones fill parts that have none."""
    total = sum(sizes.values()) / max(sum(shares.values()), 1e-9)
    lacking = {part: share * total for part, share in shares.items()}
    wanted = [part for part in ("target", "source", "test") if shares.get(part, 0) > 0]
    if not wanted:
        return dict.fromkeys(order, next(iter(shares)))
    dealt: dict[str, str] = {}
    for left, group in zip(range(len(order), 0, -1), order, strict=True):
        empty = [part for part in wanted if part not in dealt.values()]
        choice = empty if empty and left <= len(empty) else wanted
        part = max(choice, key=lambda name: lacking[name])
        dealt[group] = part
        lacking[part] -= sizes[group]
    return dealt
