"""Source-free cross-modal knowledge transfer (arXiv:2401.05014) as a staged command-line tool."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sfkt_cli.stages.source import import_model
    from sfkt_cli.student import load_student

__version__ = "0.1.0"
__all__ = ["__version__", "import_model", "load_student"]


def __getattr__(name: str) -> Any:
    """Import what needs torch only when it is asked for (PEP 562)."""
    if name == "import_model":
        from sfkt_cli.stages.source import import_model

        return import_model
    if name == "load_student":
        from sfkt_cli.student import load_student

        return load_student
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
