"""The command line's entry: `python run.py --help` tells the rest."""

import sys

from jaxgpt.cli import main

if __name__ == "__main__":
    sys.exit(main())
