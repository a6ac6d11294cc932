"""What the user can mend: one class for each place where it went wrong.

Every message names the file or the setting, the value that was seen, and what to do. The command
line prints it as one message and exits with code 1; anything else is a bug and shows a traceback.
"""

STOPPED = 75
"""Exit code after a signal, EX_TEMPFAIL: the state is saved, and the same command goes on."""


class SfktError(Exception):
    """An error that the user can mend."""


class ConfigError(SfktError):
    """A setting is unknown, malformed, out of range or at odds with another one."""


class DataError(SfktError):
    """An image, archive, store or label file is missing, damaged or not what it should be."""


class Interrupted(BaseException):
    """A signal asked to stop; the same command goes on from what was saved.

    The message is empty where another process tells it.

    Like KeyboardInterrupt it may come anywhere, and no ``except Exception`` takes it for a fault.
    """


class RunError(SfktError):
    """A stage is out of order, already done with other settings, or could not finish."""
