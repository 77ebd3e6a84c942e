"""``python -m fedkd``."""

from fedkd.cli.main import main

main()
