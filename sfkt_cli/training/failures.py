"""From failed processes to one message: which failed first, why, and what to do."""

from __future__ import annotations

from typing import Any

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from sfkt_cli.errors import ConfigError, DataError, RunError, SfktError

MENDABLE: dict[str, type[SfktError]] = {
    "ConfigError": ConfigError,
    "DataError": DataError,
    "RunError": RunError,
}
FULL = "No space left on device"


def explain_failure(error: ChildFailedError, count: int) -> SfktError:
    """The one error to raise for processes that failed.

    A process that was killed takes the others with it, and they fail at their next exchange:
    killed ones are named first, then what the user can mend, then what came first.

    Args:
        error: From the agent.
        count: Number of processes.
    """
    failures = sorted(error.failures.items(), key=lambda item: _order(*_what(item[1]), item[1]))
    rank, failure = failures[0]
    kind, text = _what(failure)
    if not kind:
        name = failure.signal_name()
        why = f"was killed ({name}; out of memory?)" if name == "SIGKILL" else f"crashed ({name})"
        return RunError(
            f"process {rank} of {count} {why}: the same command goes on from the last saved state"
        )
    if kind in MENDABLE:
        return MENDABLE[kind](text)
    if kind == "OutOfMemoryError":
        return RunError("the memory of the GPU is full: set runtime.batch_size lower")
    if FULL in text:
        return RunError(f"the disk is full: make room, and the same command goes on ({text})")
    explained = RunError(f"process {rank} of {count} failed: {kind}: {text}")
    explained.add_note(_stack(failure))
    return explained


def _what(failure: Any) -> tuple[str, str]:
    """Class and text of what a process raised; no class where it was killed."""
    if failure.exitcode < 0:
        return "", ""
    message = failure.message
    text = message["message"] if isinstance(message, dict) else str(message)
    kind, colon, rest = text.partition(": ")
    return (kind.rpartition(".")[2], rest) if colon else ("Error", text)


def _order(kind: str, text: str, failure: Any) -> tuple[int, float]:
    if not kind:  # SIGTERM and SIGINT come from the agent, which ends the rest
        late = failure.signal_name() in ("SIGTERM", "SIGINT")
        return 4 if late else 0, failure.timestamp
    if kind in MENDABLE or kind == "OutOfMemoryError":
        return 1, failure.timestamp
    lost = "gloo" in text or "NCCL" in text or kind.startswith("Dist")
    return 3 if lost else 2, failure.timestamp


def _stack(failure: Any) -> str:
    message = failure.message
    return str(message["extraInfo"]["py_callstack"]) if isinstance(message, dict) else ""
