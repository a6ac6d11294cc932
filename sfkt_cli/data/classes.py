"""Which classes are task-relevant (TR) and which task-irrelevant (TI)."""

from __future__ import annotations

import difflib
import fnmatch
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sfkt_cli.data.records import Archive, Record
from sfkt_cli.errors import ConfigError
from sfkt_cli.settings.config import ClassesConfig

NEAR = 0.8
"""Likeness (0 to 1) from which a new name counts as misspelled: bx for box, but not cup for cap."""


def choose_classes(chosen: ClassesConfig, archive: Archive) -> tuple[list[str], list[str]]:
    """The TR classes in the order of their labels, and the TI classes.

    Without a choice they are the data set's usual ones. Where only TR classes are given, all
    others are TI; where only TI classes are, TR are the usual ones, or all, without them.
    Where some target images have no label, ``classes.tr`` may name classes that no label names.

    Raises:
        ConfigError: A pattern matches nothing, or a class would be both.
    """
    names = class_names(archive)
    tr = expand(chosen.tr, names, "classes.tr", new=has_unlabelled(archive))
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


def class_names(archive: Archive) -> list[str]:
    """All class names of an archive, sorted."""
    return sorted({record.label for record in archive.records if record.label is not None})


def has_unlabelled(archive: Archive) -> bool:
    """Whether an archive holds task-relevant target images without a label."""
    return any(r.label is None and "ti" not in r.parts for r in archive.records)


def expand(
    patterns: Sequence[str], known: Iterable[str], setting: str, *, new: bool = False
) -> list[str]:
    """Class names that match patterns such as ``*room``, in the patterns' order, each once.

    Args:
        patterns: Names; wildcards do, where no class is called just so.
        known: Class names of the archive.
        setting: For messages.
        new: A name that is unlike all known ones is taken as it is.

    Raises:
        ConfigError: A pattern matches no class; the message has the nearest names.
    """
    known = list(known)
    expanded: list[str] = []
    for pattern in patterns:
        plain = pattern.casefold()
        matches = [name for name in known if name.casefold() == plain]
        matches = matches or [n for n in known if fnmatch.fnmatchcase(n.casefold(), plain)]
        if not matches:
            near = difflib.get_close_matches(pattern, known, n=1, cutoff=NEAR if new else 0.6)
            if new and not near and not any(sign in pattern for sign in "*?["):
                expanded.append(pattern)
                continue
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known[:40])}"
            raise ConfigError(f"{setting} has {pattern!r}, which matches no class: {hint}")
        expanded += [name for name in matches if name not in expanded]
    return expanded


@dataclass(frozen=True)
class ClassRow:
    """A class of an archive.

    Attributes:
        name: As ``classes.tr`` and ``classes.ti`` take it.
        role: TR, TI, or "" where it is not used.
        images: RGB images, target images or pairs.
        pairs: Number of those with both images.
        groups: Scenes, places, captures or subjects among them.
    """

    name: str
    role: str
    images: int
    pairs: int
    groups: int


def list_class_rows(chosen: ClassesConfig, archive: Archive) -> list[ClassRow]:
    """All classes: TR in the order of their labels, then TI, then the others.

    Raises:
        ConfigError: A pattern matches nothing, or a class would be both.
    """
    tr, ti = choose_classes(chosen, archive)
    of_class: dict[str, list[Record]] = defaultdict(list)
    for record in archive.records:
        of_class[record.label or ""].append(record)
    others = sorted(set(of_class) - set(tr) - set(ti))
    roles = [(n, "TR") for n in tr] + [(n, "TI") for n in ti] + [(n, "") for n in others]
    return [
        ClassRow(
            name=name or "(no label)",
            role=role,
            images=len(of_class[name]),
            pairs=sum(r.rgb is not None and r.target is not None for r in of_class[name]),
            groups=len({r.group for r in of_class[name]}),
        )
        for name, role in roles
    ]
