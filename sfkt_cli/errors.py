"""How a command ends early: errors that the user can mend, and signals.

There is one class of error for each place where it went wrong. Every message names the file or the
setting, the value that was seen, and what to do. The command line prints it as one message and
exits with code 1; anything else is a bug and shows a traceback.
"""

import contextlib
import errno
import re
import signal
import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from multiprocessing import connection, parent_process
from typing import Any

from sfkt_cli.machine import full_memory

STOPPED = 75
"""Exit code after a signal, EX_TEMPFAIL: the state is saved, and the same command continues."""


class SfktError(Exception):
    """An error that the user can mend."""


class ConfigError(SfktError):
    """Settings are unknown, malformed, out of range or at odds; each argument is one problem."""

    def __str__(self) -> str:
        """One problem as it is; several as a list under their number."""
        if len(self.args) == 1:
            return str(self.args[0])
        return "\n  ".join([f"{len(self.args)} settings are wrong:", *self.args])


class DataError(SfktError):
    """An image, archive, store or label file is missing, damaged or not what it should be."""


class Interrupted(BaseException):
    """A signal asked to stop; the same command continues from what was saved.

    The message is empty if another process prints it.

    Like KeyboardInterrupt it may come anywhere, and no ``except Exception`` takes it for a fault.
    """


class RunError(SfktError):
    """A stage is out of order, already done with other settings, or could not finish."""


def installed(module: str) -> bool:
    """Whether a module can be imported.

    A folder of that name, such as one of logs in the working folder, is found without an origin.
    """
    return getattr(find_spec(module), "origin", None) is not None


def how_to_install(extra: str) -> str:
    """The command that installs an extra: sfkt is installed from its repository."""
    return f"run pip install '.[{extra}]' in the folder of the repository"


def need(user: str, extra: str, *modules: str, instead: str = "") -> None:
    """Raise ConfigError if modules that ``user`` needs, and an extra brings, are not installed."""
    lacking = [name for name in modules if not installed(name)]
    if lacking:
        raise ConfigError(f"{user} needs {', '.join(lacking)}: {how_to_install(extra)}{instead}")


def first_line(error: BaseException) -> str:
    """The cause of an error for a message: its own first line, at most 200 characters.

    Errors of the system come without number and path; an error without a message gives its kind.
    """
    message = str(getattr(error, "strerror", None) or error).strip()
    return (message.splitlines() or [type(error).__name__])[0][:200]


def explain(error: BaseException) -> tuple[str | None, int]:
    """The message and exit code of an error that the user can mend; None: a bug."""
    if isinstance(error, SfktError):
        return str(error), 1
    if isinstance(error, Interrupted):
        return str(error), STOPPED
    if advice := advice_of_torch(type(error).__name__, str(error)):
        return advice, 1
    if isinstance(error, OSError):
        partial = r"[^/]+\.partial/|\.([^/]+)\.\w+\.partial$"  # a folder, and a file
        name = re.sub(partial, r"\1", str(error.filename or "a file"))
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"the disk is full, {name} was not written: make room", 1
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            return f"{name}: {error.strerror}: choose a place that you may read and write", 1
        if error.errno is not None:
            return f"{name}: {error.strerror}", 1
    return None, 1


def advice_of_torch(kind: str, text: str) -> str | None:
    """What to do about an error of torch, by the name of its class and its text; None: a bug."""
    operation, refused, _ = text.partition(" does not have a deterministic implementation")
    if refused:
        return (
            f"runtime.deterministic = true: torch cannot compute {operation} the same way twice: "
            "leave the setting out, or choose another source.backbone"
        )
    return full_memory(kind, text)


def stop_signals() -> list[signal.Signals]:
    """SIGTERM, SIGINT (Ctrl-C) and SIGHUP (a closed terminal), but for those that are ignored.

    ``nohup`` has us ignore SIGHUP, and a script SIGINT in what it starts in the background.
    """
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


@contextlib.contextmanager
def on_stop(handle: Callable[[signal.Signals], None]) -> Iterator[dict[signal.Signals, Any]]:
    """Within the block, call ``handle`` at each signal that asks this process to stop.

    Gives the handlers that come back after the block. Only the main thread may set some; in another
    one nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield {}
        return
    before: dict[signal.Signals, Any] = {n: signal.getsignal(n) for n in stop_signals()}
    try:
        for number in before:
            signal.signal(number, lambda received, frame: handle(signal.Signals(received)))
        yield before
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def follow_parent(end: Callable[[], object]) -> None:
    """Call ``end``, in a thread, once the parent process is gone.

    A killed parent cannot end its children: they would wait for work for ever, or go on with work
    that the next start wants to do itself.
    """

    def wait() -> None:
        parent = parent_process()
        if parent is not None:
            connection.wait([parent.sentinel])
            end()

    threading.Thread(target=wait, daemon=True).start()
