"""Shows the program that XLA compiles of the train step for an NVIDIA GPU, on a machine without one.

python -m benchmarks.gpu_program [options]; --help lists them.
"""

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the plugin would say in every process that there is no driver

from benchmarks.gpu_program import command
from jaxgpt import environment
from jaxgpt.commands import cli

if __name__ == "__main__":
    environment.restart_with_allocator()
    sys.exit(cli.run(command.run, sys.argv[1:]))
