"""The command line's entry: `python run.py --help` tells the rest."""

import sys

from jaxgpt import environment, terminal

if __name__ == "__main__":
    environment.restart_with_allocator()
    with terminal.ending_at_once():
        from jaxgpt.commands.cli import main

    sys.exit(main())
