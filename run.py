"""The command line's entry: `python run.py --help` tells the rest."""

import sys

from jaxgpt import allocator, terminal

if __name__ == "__main__":
    allocator.restart_with_settings()
    with terminal.ending_at_once():
        from jaxgpt.commands.cli import main

    sys.exit(main())
