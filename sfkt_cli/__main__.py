"""``python -m sfkt_cli`` is ``sfkt``."""

from sfkt_cli.cli import main

main()
