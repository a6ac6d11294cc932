"""Who gets which sample: which classes are task-relevant, and source, target, test and TI by group.

``disjoint``: groups (scenes, places, captures, subjects) are dealt out class by class, so that
source, target and test share none and each class is in all three when it has enough groups.
``paper``: source and target are all TR images, nothing is held out, and accuracy is taken on the
target training images, as SOCKET and the paper do.

Archives list their samples class by class. So the parts that go into transfer.h5 are shuffled: the
place of a sample does not tell its class.
"""

import difflib
import fnmatch
import random
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from sfkt_cli.data.records import PARTS, TR_PARTS, Archive, Record
from sfkt_cli.errors import ConfigError, DataError
from sfkt_cli.settings.config import ClassesConfig, SplitConfig

NEAR = 0.8  # likeness (0..1) that makes a new name a misspelled one: bx for box, not cup for cap
Parts = dict[str, list[Record]]


def choose_classes(
    chosen: ClassesConfig, archive: Archive, of_model: Collection[str] = ()
) -> tuple[list[str], list[str]]:
    """The TR classes in the order of their labels, and the TI classes.

    Without a choice they are the data set's usual ones. Where only TR classes are given, all
    others are TI; where only TI classes are, TR are the usual ones, or all, without them.
    ``classes.tr`` may also name classes ``of_model``, as ``source.classes`` has them, of which
    there are no images, and, where some target images have no label, any that no label names.

    Raises:
        ConfigError: A pattern matches nothing, or a class would be both.
    """
    names = sorted({record.label for record in archive.records if record.label is not None})
    unlabelled = any(r.label is None and "ti" not in r.parts for r in archive.records)
    unseen = [name for name in of_model if name in chosen.tr and name not in names]
    tr = expand(chosen.tr, [*names, *unseen], "classes.tr", new=unlabelled)
    ti = expand(chosen.ti, names, "classes.ti")
    both = [name for name in tr if name in ti]
    if both:
        raise ConfigError(f"class {both[0]!r} is in classes.tr and in classes.ti: take one out")
    usual_tr = [name for name in archive.usual_tr if name in names]
    usual_ti = [name for name in archive.usual_ti if name in names]
    if not chosen.tr:
        tr = [name for name in usual_tr or names if name not in ti]
        if not usual_tr and not chosen.ti:
            tr = [name for name in tr if name not in usual_ti]
    if not chosen.ti:
        ti = [name for name in (names if chosen.tr else usual_ti or names) if name not in tr]
    return tr, ti


def expand(
    patterns: Sequence[str], names: Sequence[str], setting: str, *, new: bool = False
) -> list[str]:
    """Class names that match patterns such as ``*room``, in the patterns' order, each once.

    A pattern is a wildcard unless a class has just this name. With ``new``, a name that is unlike
    all class names is kept as it is.

    Raises:
        ConfigError: A pattern matches no class; the message has the nearest names.
    """
    expanded: list[str] = []
    for pattern in patterns:
        plain = pattern.casefold()
        matches = [name for name in names if name == pattern]
        matches = matches or [name for name in names if name.casefold() == plain]
        matches = matches or [n for n in names if fnmatch.fnmatchcase(n.casefold(), plain)]
        if not matches:
            near = difflib.get_close_matches(pattern, names, n=1, cutoff=NEAR if new else 0.6)
            if new and not near and not any(sign in pattern for sign in "*?["):
                expanded.append(pattern)
                continue
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names[:40])}"
            if setting == "classes.tr" and not near:
                hint += "; a class of your model without images must be in source.classes, too"
            raise ConfigError(f"{setting} has {pattern!r}, which matches no class: {hint}")
        expanded += [name for name in matches if name not in expanded]
    return expanded


@dataclass(frozen=True)
class ClassRow:
    """A class of an archive."""

    name: str  # as ``classes.tr`` and ``classes.ti`` take it
    role: str  # TR, TI, or "" where it is not used
    images: int  # RGB images, target images or pairs
    pairs: int  # number of those with both images
    groups: int  # scenes, places, captures or subjects among them


def list_class_rows(
    chosen: ClassesConfig, archive: Archive, of_model: Collection[str] = ()
) -> list[ClassRow]:
    """All classes: TR as labelled, then TI, then the others; raises as :func:`choose_classes`."""
    tr, ti = choose_classes(chosen, archive, of_model)
    chosen_rows = [(name, "TR") for name in tr] + [(name, "TI") for name in ti]
    roles = dict(chosen_rows)
    members: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in archive.records:
        unlabelled = "(no label)", "TI" if "ti" in record.parts else "TR"
        name = record.label
        members[unlabelled if name is None else (name, roles.get(name, ""))].append(record)
    return [
        ClassRow(
            name=name,
            role=role,
            images=len(members[name, role]),
            pairs=sum(r.rgb is not None and r.target is not None for r in members[name, role]),
            groups=len({r.group for r in members[name, role]}),
        )
        for name, role in [*chosen_rows, *sorted(members.keys() - set(chosen_rows))]
    ]


def split_records(
    records: Sequence[Record],
    tr: Collection[str],
    ti: Collection[str],
    split: SplitConfig,
    seed: int,
) -> Parts:
    """Deal out the records of an archive; the same seed gives the same parts, whatever their order.

    Target and TI come in an order drawn from the seed, the others in the order given. A record may
    be in several parts only under the ``paper`` protocol. A sample that has a fixed part takes its
    group there.

    Raises:
        DataError: A group has samples with different fixed parts.
    """
    open_to = {record.id: _open_parts(record, tr, ti) for record in records}
    parts = {part: [r for r in records if part in open_to[r.id]] for part in PARTS}
    if split.protocol == "paper":
        parts["test"] = []
    else:
        target = round(1 - split.source - split.test, 9)
        shares = {"source": split.source, "target": target, "test": split.test}
        dealt = _deal(records, open_to, shares, seed)
        for part in TR_PARTS:
            parts[part] = [r for r in parts[part] if dealt[r.group] == part]
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
    """Records in no part although their class was chosen or is unknown: numbers by kind and reason.

    Images of a TR class that the archive lists for other parts alone do not count.
    """
    used = {record.id for records_of_part in parts.values() for record in records_of_part}
    unused = (
        "images for the test alone (split.protocol=paper has no test)"
        if split.protocol == "paper"
        else "images whose group is in a part that cannot use them"
    )
    reasons: Counter[str] = Counter()
    for record in records:
        chosen = record.label is None or record.label in tr or record.label in ti
        if record.id in used or not chosen:
            continue
        if not any(_fits(record, tr, ti).values()):
            kind = "RGB" if record.target is None else "target"
            misfit = (
                "without a label" if record.label is None else "of a TI class without a partner"
            )
            reasons[f"{kind} images {misfit}"] += 1
        elif _open_parts(record, tr, ti):
            reasons[unused] += 1
        elif record.label in ti and "ti" not in record.parts:
            kind = " or ".join(record.parts)
            reasons[f"images of a TI class that are listed for the part {kind}"] += 1
    return dict(reasons)


def _open_parts(record: Record, tr: Collection[str], ti: Collection[str]) -> tuple[str, ...]:
    """Parts that a record's class, images and archive allow."""
    allowed = record.parts or (PARTS if record.label is not None else ("target", "ti"))
    fits = _fits(record, tr, ti)
    return tuple(part for part in PARTS if part in allowed and fits[part])


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
        fixed = {r.parts[0]: r.id for r in group_records if len(r.parts) == 1}
        if len(fixed) > 1:
            (part, first), (other, second), *_ = fixed.items()
            raise DataError(
                f"group {group!r} has samples for {part} ({first}) and for {other} ({second}), and "
                "groups stay whole (lines that share an image are one): give them one role, or two "
                "groups"
            )
        parts = tuple(p for p in TR_PARTS if any(p in open_to[r.id] for r in group_records))
        parts = tuple(fixed) or parts
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
    possible = [part for part in ("target", "source", "test") if shares.get(part, 0) > 0]
    if not possible:
        return dict.fromkeys(order, next(iter(shares)))
    dealt: dict[str, str] = {}
    for left, group in zip(range(len(order), 0, -1), order, strict=True):
        empty = [p for p in possible if p not in dealt.values()] if left <= len(possible) else []
        choice = empty if left <= len(empty) else possible
        part = max(choice, key=lambda name: lacking[name])
        dealt[group] = part
        lacking[part] -= sizes[group]
    return dealt
