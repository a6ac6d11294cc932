"""Start-up of the commands that a user waits for, beside that of Python itself."""

from __future__ import annotations

import subprocess
import sys
import tempfile

from tests.benchmarks.measuring import Row, seconds, time_row


def run(quick: bool) -> list[Row]:
    """Python with nothing, `sfkt --help` and `sfkt doctor`, in turn."""
    rounds = 5 if quick else 9
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "sfkt --help": [sys.executable, "-m", "sfkt_cli", "--help"],
        "sfkt doctor": [sys.executable, "-m", "sfkt_cli", "doctor"],
    }
    targets = {"sfkt --help": "< 500"}
    times: dict[str, list[float]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds + 1):
            for name, command in commands.items():
                took = seconds(
                    lambda command=command: subprocess.run(  # type: ignore[misc]
                        command, cwd=folder, check=True, capture_output=True
                    )
                )
                if number:
                    times[name].append(took)
    return [time_row(name, each, targets.get(name, "")) for name, each in times.items()]
