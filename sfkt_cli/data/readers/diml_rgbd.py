"""DIML RGB-D (Cho et al.): indoor pairs of a Kinect v2; the sample set and the full set.

    indoor/{train,test}/{HR,LR}/<NN. Scene>/     sample set: 1609 train, 503 test; HR or LR is read
        color/<stem>_c.png
        depth_filled/<stem>_depth_filled.png     16-bit millimetres, holes filled
    <NN. Scene>/<yy.mm.dd>/<k>/                  full set
        col/<stem>_c.png
        up_png/<stem>_ud.png                     16-bit millimetres, holes filled
        warp_png/<stem>_wd.png                   as measured, on the grid of the colour image
        raw_png/<stem>_rd.png                    on the sensor's own grid: not read

Outdoor images have no classes and are left out. Folder names are messy (``04. Church``,
``03_claseeroom_1``, ``12_livingroom_2``, bare dates): numbers, case and typing errors are cleaned,
and folders without a name are left out with a warning. Which six classes SOCKET recognises is not
known: by default every third class in alphabetical order is TI; ``classes`` changes it.

Groups: in the full set ``<Scene>/<date>/<k>``; in the sample set what a stem has before its last
number, or the image where that would leave a class fewer than three groups. The sample set's test
folder is held out.
"""

import difflib
import functools
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from sfkt_cli.data.archive import open_container, tree_drawn_in
from sfkt_cli.data.records import Archive, Record, archive_of_files, collect, compare_counts
from sfkt_cli.settings.config import Config, DimlRgbdConfig

PUBLISHED = {"train": 1609, "test": 503}
SCENES = (
    "bathroom", "bedroom", "bookstore", "cafe", "church", "classroom", "computer_room", "corridor",
    "hospital", "kitchen", "laboratory", "library", "living_room", "lobby", "lounge",
    "meeting_room", "office", "restaurant", "stairs", "store", "study_room", "warehouse",
)  # fmt: skip
"""Names that messy folder names are compared with; other names are kept as they are."""
_SAMPLE = re.compile(
    r"(?:.*/)?(?P<fold>train|test)/(?P<size>HR|LR)/(?P<scene>[^/]+)/"
    r"(?P<kind>color|depth_filled)/(?P<stem>[^/]+?)_(?:c|depth_filled)\.png",
    re.IGNORECASE,
)
_FULL = re.compile(
    r"(?:.*/)?(?P<scene>[^/]+)/(?P<date>\d\d[._]\d\d[._]\d\d)/(?P<take>\d+)/"
    r"(?P<kind>col|up_png|warp_png)/(?P<stem>[^/]+?)_(?:c|ud|wd)\.png",
    re.IGNORECASE,
)
_KINDS = {"color": "rgb", "col": "rgb", "depth_filled": "filled", "up_png": "filled"}


def read(config: Config, root: Path) -> Archive:
    """List the indoor pairs; raises DataError if there are none or a partner is missing."""
    capture_of = functools.partial(_place, config.diml_rgbd)
    advice = f"diml_rgbd.resolution={config.diml_rgbd.resolution}; {tree_drawn_in(__doc__)}"
    container = open_container(root, (), (), advice, capture_of)
    captures = collect(container, capture_of, ("rgb", "target"))
    nameless: set[str] = set()
    records = []
    for (scene, fold, group, stem), files in captures.items():
        label = clean_scene(scene)
        if label is None:
            nameless.add(scene)
            continue
        parts = {"train": ("source", "target", "ti"), "test": ("test", "ti")}.get(fold, ())
        place = f"{scene}-{fold}" if fold else group
        records.append(
            Record(f"{place}-{stem}", group, label, files["rgb"], files["target"], parts)
        )
    groups: dict[str | None, set[str]] = defaultdict(set)
    for record in records:
        groups[record.label].add(record.group)
    records = [r if len(groups[r.label]) >= 3 else replace(r, group="") for r in records]
    notes = [f"diml-rgbd: folder {name!r} names no scene: left out" for name in sorted(nameless)]
    folds = [fold for record in records for fold in PUBLISHED if f"-{fold}-" in record.id]
    published = {fold: PUBLISHED[fold] for fold in set(folds)}
    return archive_of_files(
        config, container, records,
        usual_ti=tuple(sorted({record.label or "" for record in records})[2::3]),
        notes=(*notes, *compare_counts(folds, published, "diml-rgbd: fold")),
    )  # fmt: skip


def clean_scene(folder: str) -> str | None:
    """The scene that a folder name means; None for bare numbers and dates.

    ``04. Church`` is ``church``, ``03_claseeroom_1`` is ``classroom``.
    """
    words = re.sub(r"[^a-z]+", " ", folder.casefold()).split()
    if not words:
        return None
    joined = "_".join(words)
    plain = {name.replace("_", ""): name for name in SCENES}
    near = difflib.get_close_matches("".join(words), plain, n=1, cutoff=0.8)
    return plain[near[0]] if near else joined


def _place(settings: DimlRgbdConfig, name: str) -> tuple[tuple[str, str, str, str], str] | None:
    """Scene folder, fold, group and stem of a file, and whether it is the RGB or target image."""
    sample, full = _SAMPLE.fullmatch(name), _FULL.fullmatch(name)
    if sample and sample["size"].upper() == settings.resolution:
        stem, scene = sample["stem"], sample["scene"]
        group = f"{scene}/{re.sub('[^0-9]*[0-9]+$', '', stem)}"
        capture, kind = (scene, sample["fold"].lower(), group, stem), sample["kind"].lower()
    elif full:
        group = f"{full['scene']}/{full['date']}/{full['take']}"
        capture, kind = (full["scene"], "", group, full["stem"]), full["kind"].lower()
    else:
        return None
    view = _KINDS.get(kind, "warped")
    if view == "rgb":
        return capture, "rgb"
    is_target = view == settings.depth or (sample and view == "filled")
    return (capture, "target") if is_target else None
