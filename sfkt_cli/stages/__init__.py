"""One module for each stage: open the inputs, build, fit, write."""

from importlib import import_module

from sfkt_cli.settings.config import Config
from sfkt_cli.settings.runs import Run


def run_stage(name: str, config: Config, run: Run) -> None:
    """Run a stage, such as ``evaluate`` or ``transfer/tgkt``, in this process."""
    kind = name.partition("/")[0]  # its module and its function
    getattr(import_module(f"{__name__}.{kind}"), kind)(config, run)
