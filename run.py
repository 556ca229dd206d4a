"""The command line's entry: `python run.py --help` tells the rest."""

import sys

from jaxgpt import allocator

if __name__ == "__main__":
    allocator.restart_with_settings()
    from jaxgpt.commands.cli import main

    sys.exit(main())
