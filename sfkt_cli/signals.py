"""How processes are told to stop: by signals, and by the end of the process that started them."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing import connection, parent_process


def stop_signals() -> list[signal.Signals]:
    """SIGTERM, SIGINT (Ctrl-C) and SIGHUP (a closed terminal), which ``nohup`` has us ignore."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([] if ignored else [signal.SIGHUP])]


@contextlib.contextmanager
def on_stop(handle: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Within the block, call ``handle`` at each signal that asks this process to stop.

    Only the main thread may do so; in another one nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in stop_signals()}
    try:
        for number in before:
            signal.signal(number, lambda received, frame: handle(signal.Signals(received)))
        yield
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
