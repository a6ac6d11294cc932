"""SUN RGB-D (Song et al., CVPR 2015): 10,335 pairs of indoor scenes from four depth cameras.

    SUNRGBD/                                     or SUNRGBD.zip, or the folder above
        kv1/NYUdata/<id>/                        Kinect v1; these 1,449 are NYU Depth v2
        kv1/b3dodata/<id>/
        kv2/{kinect2data,align_kv2}/<id>/        Kinect v2
        realsense/{lg,sa,sh,shr}/<id>/           RealSense
        xtion/xtion_align_data/<id>/             Xtion
        xtion/sun3ddata/<place>/<scan>/<id>/     Xtion, video frames
            image/<any name>.jpg
            depth/<any name>.png                 16 bit, millimetres rotated by 3 bits
            depth_bfx/<any name>.png             the same with holes filled
            scene.txt                            one word; idk is no class and is dropped

One domain a sensor, as in SOCKET and the paper: the source model sees RGB of ``source_sensor``,
target images are depth of ``target_sensor``. TR are the scene words that all four sensors have, TI
the pairs of all other words, pooled over the sensors.

Groups. sun3ddata: the place. NYUdata and b3dodata, which do not name the physical scene: runs of at
most ten neighbouring frames of one scene word. All others have their time in their id: captures of
any sensor with less than two minutes between them, since most of those show the same room, and
some sensors were recorded side by side.
"""

import contextlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from pathlib import Path

from sfkt_cli.data.archive import Container, open_container
from sfkt_cli.data.records import Archive, Record, archive_of_files, collect, compare_counts
from sfkt_cli.errors import DataError
from sfkt_cli.settings.config import Config

PUBLISHED = {"kv1": 2003, "kv2": 3784, "realsense": 1159, "xtion": 3389}
"""Pairs of each sensor, ``idk`` included."""
NO_CLASS = "idk"
_FILE = re.compile(
    r"(?P<capture>(?:kv1|kv2|realsense|xtion)/.+)/"
    r"(?:(?P<view>image|depth|depth_bfx)/[^/]+\.(?:jpe?g|png)|(?P<scene>scene\.txt))",
    re.IGNORECASE,
)

_TIME = re.compile(r"(?<!\d)(20\d\d)" + r"[_-](\d\d?)" * 5 + r"(?!\d)")
PAUSE = timedelta(minutes=2)  # between captures of one group, at most


def read(config: Config, root: Path) -> Archive:
    """List the captures of all sensors; raises DataError if one lacks an image or its word."""
    container = open_container(root, tuple(PUBLISHED), ("SUNRGBD.zip",))
    depth = config.sun_rgbd.depth

    def place(name: str) -> tuple[str, str] | None:
        match = _FILE.fullmatch(name)
        kind = match and (match["view"] or "scene").lower()
        return (match["capture"], kind) if match and kind in ("image", depth, "scene") else None

    captures = collect(container, place, ("image", depth, "scene"))
    words = {capture: _scene_word(container, files["scene"]) for capture, files in captures.items()}
    sensors = {capture: capture.partition("/")[0].lower() for capture in captures}
    counts = Counter(sensors.values())
    kept = [
        capture
        for capture in captures
        if words[capture] != NO_CLASS
        and (config.sun_rgbd.nyu_overlap or not capture.casefold().startswith("kv1/nyudata/"))
    ]
    words_of: dict[str, set[str]] = defaultdict(set)
    for capture in kept:
        words_of[sensors[capture]].add(words[capture])
    common = sorted(set.intersection(*words_of.values())) if words_of else []
    facts = (
        f"sun-rgbd: scene words common to {', '.join(s for s in PUBLISHED if counts[s])}: "
        f"{len(common)} ({', '.join(common)})",
    )
    parts: dict[str, tuple[str, ...]] = defaultdict(tuple)
    parts[config.sun_rgbd.source_sensor] += ("source",)
    parts[config.sun_rgbd.target_sensor] += ("target", "test")
    groups = _groups(kept, words)
    records = [
        Record(
            id=capture,
            group=groups[capture],
            label=words[capture],
            rgb=captures[capture]["image"],
            target=captures[capture][depth],
            parts=(*parts[sensors[capture]], "ti"),
        )
        for capture in kept
    ]
    return archive_of_files(
        config, container, records,
        more=(files["scene"] for files in captures.values()), usual_tr=tuple(common),
        notes=compare_counts(counts.elements(), PUBLISHED, "sun-rgbd: sensor"), facts=facts,
    )  # fmt: skip


def _scene_word(container: Container, name: str) -> str:
    word = container.read(name).decode("utf-8", "replace").strip()
    if not re.fullmatch(r"[\w .-]{1,64}", word):
        raise DataError(f"{container.describe(name)} holds {word[:40]!r}, expected a scene word")
    return word


def _groups(captures: Iterable[str], words: Mapping[str, str]) -> dict[str, str]:
    """The group of each capture; ``words`` are the scene words."""
    groups: dict[str, str] = {}
    timed: list[tuple[datetime, str]] = []
    run: list[str] = []
    for capture in sorted(captures):
        sensor, kind, *rest = capture.split("/")
        groups[capture] = f"{sensor}/{kind}/{rest[0]}" if rest else capture
        if kind.lower() in ("nyudata", "b3dodata"):
            here = (kind, words[capture])
            goes_on = run and here == (run[0].split("/")[1], words[run[0]]) and len(run) < 10
            run = [*run, capture] if goes_on else [capture]
            groups[capture] = run[0]
        elif kind.lower() != "sun3ddata" and (match := _TIME.search(rest[-1] if rest else "")):
            with contextlib.suppress(ValueError):  # no time, such as month 13
                time = datetime.strptime("-".join(match.groups()), "%Y-%m-%d-%H-%M-%S")
                timed.append((time, capture))
    first, last = "", datetime.min
    for time, capture in sorted(timed):
        first = capture if time - last > PAUSE else first
        groups[capture], last = first, time
    return groups
