"""Child processes that do not outlive the one that started them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from multiprocessing import connection, parent_process


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
