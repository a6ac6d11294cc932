"""Source-free cross-modal knowledge transfer (arXiv:2401.05014) as a staged command-line tool."""

__version__ = "0.1.0"
