"""Starts the command line; see umt_fast/cli/main.py."""

from umt_fast import interrupts

if __name__ == "__main__":
    interrupts.end_at_once()  # before the other imports

import sys

from umt_fast.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
