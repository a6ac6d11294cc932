"""Stages that are killed, or run out of room, and are started again; forked, to be quick.

Run as a program in a process of its own: ``campaign.py FOLDER KIND TRIALS SEED LAST``. It makes an
undisturbed run up to the stage LAST, then disturbs copies of it, and prints what it found as JSON
on the last line. Kinds: ``kill`` after a random time; ``large``, no file may exceed a random size;
``full``, a file system of a random size, which must be allowed to mount one (``unshare``).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import matplotlib.backends.backend_agg
import torch
import torch._dynamo
from matplotlib.figure import Figure
from torch.optim.optimizer import register_optimizer_step_post_hook

from sfkt_cli import cli, launch
from sfkt_cli.data.store import open_store
from sfkt_cli.files import sha256_file, sha256_json
from sfkt_cli.settings import runs
from sfkt_cli.stages import bridge, evaluate, export, predict, prepare, source, transfer

SETTINGS = """
image_size: 16
synthetic: {pairs: 100}
prepare: {workers: 1}
training: {min_steps: 8}
source: {epochs: 3, width: 4, bottleneck: 8}
bridge: {epochs: 3, width: 4}
transfer: {epochs: 3}
evaluate: {oracle: false}
runtime: {gpus: 0, batch_size: 8, checkpoint_seconds: 0.0, threads: 1}
"""
STAGES = {
    "prepare": ["prepare", "synthetic"],
    "source": ["source"],
    "bridge": ["bridge"],
    "transfer": ["transfer"],
    "evaluate": ["evaluate"],
}
LOADED = (
    bridge, evaluate, export, predict, prepare, source, transfer, launch, runs, torch._dynamo,
    matplotlib.backends.backend_agg, Figure,
)  # fmt: skip
"""Imported here once, not in every fork: what is disturbed is work, not the loading of modules."""
STEPS = Path("steps")
"""A byte for each step that any optimiser made."""
VARYING = (
    "seconds", "train_seconds", "peak_memory_mb", "parameters", "images_per_second", "outputs",
    "record_sha256",
)  # fmt: skip


def start(command: list[str], errors: Path, limit: int | None = None) -> int:
    """Fork a process that runs the program; its stderr goes to a file, its steps are counted."""
    child = os.fork()
    if child:
        return child
    code = 99
    with contextlib.suppress(BaseException), errors.open("w") as file:
        os.dup2(file.fileno(), 2)
        os.dup2(file.fileno(), 1)
        if limit is None:
            count_steps()
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        sys.argv = ["sfkt", *command]
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 98
        finally:
            sys.stderr.flush()
    os._exit(code)


def count_steps() -> None:
    """Add a byte to a file after each step of an optimiser in this process."""
    steps = os.open(STEPS, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)

    def note(*_: Any) -> None:
        os.write(steps, b".")

    register_optimizer_step_post_hook(note)


def ended(child: int) -> int:
    """Wait; the exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def watched(child: int, run: Path) -> tuple[int, int, int]:
    """Wait; the exit code, bytes of the largest file meanwhile, and by how many the run grew."""
    before, largest, most = sum(_sizes(run)), 0, 0
    status = None
    while status is None:
        sizes = _sizes(run)
        largest, most = max([largest, *sizes]), max(most, sum(sizes) - before)
        time.sleep(0.02)
        ended, found = os.waitpid(child, os.WNOHANG)
        status = found if ended else None
    return os.waitstatus_to_exitcode(status), largest, most


def _sizes(folder: Path) -> list[int]:
    sizes = []
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # gone or renamed meanwhile
            sizes.append(path.stat().st_size)
    return sizes


@contextlib.contextmanager
def short_of_room(place: Path, wanted: int) -> Iterator[None]:
    """Fill a file system up, but for some bytes, while the block lasts."""
    filler = place / "filler"
    with filler.open("wb") as file:
        free = os.statvfs(place)
        os.posix_fallocate(file.fileno(), 0, max(free.f_bavail * free.f_frsize - wanted, 1))
    try:
        yield
    finally:
        filler.unlink()


def steps_made() -> int:
    """Steps of the optimisers since the last call."""
    made = STEPS.stat().st_size if STEPS.exists() else 0
    STEPS.unlink(missing_ok=True)
    return made


def fingerprint(folder: Path) -> dict[str, str]:
    """What a stage wrote, times left out: a digest for each file."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or path.suffix in (".md", ".html", ".tex"):
            continue
        if path.name in ("begun.json", "log.txt"):
            continue
        if path.suffix == ".h5":
            found[name] = open_store(path).digest
        elif path.suffix in (".json", ".jsonl"):
            lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            found[name] = sha256_json([steady(json.loads(line)) for line in lines])
        elif path.suffix in (".png", ".yaml") and folder.name in ("evaluate", "prepare"):
            found[name] = "present"
        else:
            found[name] = sha256_file(path)
    return found


def steady(value: Any) -> Any:
    """A record without what varies from run to run."""
    if isinstance(value, dict):
        return {k: steady(v) for k, v in value.items() if k not in VARYING}
    return [steady(each) for each in value] if isinstance(value, list) else value


def disturb(kind: str, trials: int, seed: int, last: str) -> dict[str, Any]:
    """Disturb stages of copies of an undisturbed run; what ended how."""
    chance = random.Random(seed)
    Path("tiny.yaml").write_text(SETTINGS)
    place = Path("place")
    whole, run, errors = Path("whole"), place / "run", Path("errors.txt")
    place.mkdir()
    if kind == "full":
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", place], check=True)
    stages = list(STAGES)[: list(STAGES).index(last) + 1]
    seconds, steps, largest, most, right = {}, {}, {}, {}, {}
    for stage in stages:
        began = time.monotonic()
        child = start([*STAGES[stage], "--run", str(run), "--config", "tiny.yaml"], errors)
        code, largest[stage], most[stage] = watched(child, run)
        if code:
            raise SystemExit(f"{stage}: exit code {code}: {errors.read_text()}")
        seconds[stage] = time.monotonic() - began
        steps[stage] = steps_made()
        right[stage] = fingerprint(run / stage)
    shutil.copytree(run, whole)
    outcome: dict[str, Any] = {
        "trials": trials, "seconds": seconds, "steps": steps, "hit": 0, "begun": 0, "resumed": 0,
        "repeated_steps": 0, "identical": 0, "messages": [], "wrong": [],
    }  # fmt: skip
    number = 0
    while number < trials:
        stage = stages[number % len(stages)]
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(whole, run)
        for later in stages[stages.index(stage) :]:
            shutil.rmtree(run / later)
        earlier = {name: fingerprint(run / name) for name in stages if (run / name).exists()}
        command = [*STAGES[stage], "--run", str(run), "--config", "tiny.yaml"]
        steps_made()
        if kind == "kill":
            child = start(command, errors)
            time.sleep(chance.random() * 0.9 * seconds[stage])
            os.kill(child, signal.SIGKILL)
            if ended(child) != -signal.SIGKILL:  # it was done before: once more, earlier
                seconds[stage] *= 0.8
                continue
            outcome["hit"] += 1
        else:
            share = chance.random()
            if kind == "large":
                code = ended(start(command, errors, int(share * largest[stage])))
            else:
                with short_of_room(place, int(share * most[stage])):
                    code = ended(start(command, errors))
            said = errors.read_text().splitlines()
            outcome["hit"] += code == 1
            outcome["messages"] += [line for line in said if line.startswith("sfkt: ")]
            if code not in (0, 1) or any("Traceback" in line for line in said):
                outcome["wrong"].append([stage, code, said[-12:]])
        number += 1
        kept = {name: fingerprint(run / name) for name in earlier}
        outcome["begun"] += any(run.glob(f"{stage}/**/begun.json"))
        before = steps_made()
        code = ended(start(command, errors))
        repeated = before + steps_made() - steps[stage]
        outcome["resumed"] += "continues at epoch" in errors.read_text()
        outcome["repeated_steps"] = max(outcome["repeated_steps"], repeated)
        expected = {path.relative_to(whole) for path in whole.rglob("*")}
        strays = [str(p) for p in run.rglob("*") if p.relative_to(run) not in expected]
        same = fingerprint(run / stage) == right[stage] if code == 0 else False
        if code == 0 and same and not strays and kept == earlier:
            outcome["identical"] += 1
        else:
            now = fingerprint(run / stage) if code == 0 else {}
            differing = [n for n in {*now, *right[stage]} if now.get(n) != right[stage].get(n)]
            outcome["wrong"].append(
                [stage, code, strays, differing, kept == earlier, errors.read_text()[-800:]]
            )
    return outcome


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.chdir(sys.argv[1])
    kind, trials, seed, last = sys.argv[2:]
    print(json.dumps(disturb(kind, int(trials), int(seed), last)))
