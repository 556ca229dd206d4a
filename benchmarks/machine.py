"""Description of the machine on which figures were measured."""

import platform
from importlib.metadata import version
from pathlib import Path


def cpu_name() -> str:
    """Returns the processor's name as Linux states it; elsewhere as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def versions(*packages: str) -> dict[str, str]:
    """Returns the versions of Python and of these packages."""
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}
