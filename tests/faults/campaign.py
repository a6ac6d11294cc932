"""Stages that are killed, or run out of room, and are started again; forked, to be quick.

Run as a program in a process of its own: ``campaign.py FOLDER kill|full TRIALS SEED LAST``. It
makes an undisturbed run up to the stage LAST, then disturbs copies of it, and prints what it found
as JSON on the last line.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch

from sfkt_cli import cli
from sfkt_cli.data.store import open_store
from sfkt_cli.files import sha256_file, sha256_json
from sfkt_cli.stages import bridge, evaluate, prepare, source, transfer
from sfkt_cli.training import launch

SETTINGS = """
image_size: 16
synthetic: {pairs: 100}
prepare: {workers: 1}
training: {min_steps: 3}
source: {epochs: 2, width: 4, bottleneck: 8}
bridge: {epochs: 2, width: 4}
transfer: {epochs: 2}
evaluate: {bootstrap: 20, oracle: false}
runtime: {gpus: 0, batch_size: 8, checkpoint_seconds: 0.0, threads: 1}
"""
STAGES = {
    "prepare": ["prepare", "synthetic"],
    "source": ["source"],
    "bridge": ["bridge"],
    "transfer": ["transfer"],
    "evaluate": ["evaluate"],
}
LOADED = (bridge, evaluate, prepare, source, transfer, launch)
"""Imported here once, not in every fork."""
VARYING = ("seconds", "train_seconds", "peak_memory_mb", "parameters", "images_per_second")


def start(command: list[str], errors: Path, limit: int | None = None) -> int:
    """Fork a process that runs the program; its stderr goes to a file."""
    child = os.fork()
    if child:
        return child
    code = 99
    with contextlib.suppress(BaseException), errors.open("w") as file:
        os.dup2(file.fileno(), 2)
        os.dup2(file.fileno(), 1)
        if limit is not None:
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


def ended(child: int) -> int:
    """Wait; the exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fingerprint(folder: Path) -> dict[str, str]:
    """What a stage wrote, times left out: a digest for each file."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or path.suffix in (".md", ".html"):
            continue
        if path.name in ("begun.json", "log.txt"):
            continue
        if path.suffix == ".h5":
            found[name] = open_store(path).digest
        elif path.suffix in (".json", ".jsonl"):
            lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            found[name] = sha256_json([_steady(json.loads(line)) for line in lines])
        elif path.suffix in (".png", ".yaml") and folder.name in ("evaluate", "prepare"):
            found[name] = "present"
        else:
            found[name] = sha256_file(path)
    return found


def _steady(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _steady(v) for k, v in value.items() if k not in VARYING}
    return [_steady(each) for each in value] if isinstance(value, list) else value


def disturb(kind: str, trials: int, seed: int, last: str) -> dict[str, Any]:
    """Disturb stages of copies of an undisturbed run; what ended how."""
    chance = random.Random(seed)
    Path("tiny.yaml").write_text(SETTINGS)
    whole, run, errors = Path("whole"), Path("run"), Path("errors.txt")
    stages = list(STAGES)[: list(STAGES).index(last) + 1]
    seconds, sizes, right = {}, {}, {}
    for stage in stages:
        command = STAGES[stage]
        began = time.monotonic()
        code = ended(start([*command, "--run", str(run), "--config", "tiny.yaml"], errors))
        if code:
            raise SystemExit(f"{stage}: exit code {code}: {errors.read_text()}")
        seconds[stage] = time.monotonic() - began
        right[stage] = fingerprint(run / stage)
        sizes[stage] = max(p.stat().st_size for p in (run / stage).rglob("*") if p.is_file())
    run.rename(whole)
    outcome: dict[str, Any] = {
        "trials": trials, "seconds": seconds, "hit": 0, "identical": 0, "messages": [], "wrong": []
    }  # fmt: skip
    for number in range(trials):
        stage = stages[number % len(stages)]
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(whole, run)
        for later in stages[stages.index(stage) :]:
            shutil.rmtree(run / later)
        earlier = {name: fingerprint(run / name) for name in stages if (run / name).exists()}
        command = [*STAGES[stage], "--run", str(run), "--config", "tiny.yaml"]
        if kind == "kill":
            child = start(command, errors)
            time.sleep(chance.random() * 0.7 * seconds[stage])  # the first run was the slowest
            os.kill(child, signal.SIGKILL)
            code = ended(child)
            outcome["hit"] += code == -signal.SIGKILL
        else:
            code = ended(start(command, errors, int(chance.random() * sizes[stage])))
            said = errors.read_text().splitlines()
            outcome["hit"] += code == 1
            outcome["messages"] += [line for line in said if line.startswith("sfkt: ")]
            if code not in (0, 1) or any("Traceback" in line for line in said):
                outcome["wrong"].append([stage, code, said[-12:]])
        kept = {name: fingerprint(run / name) for name in earlier}
        code = ended(start(command, errors))
        strays = [str(path) for path in run.rglob("*.partial")]
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
