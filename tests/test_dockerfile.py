"""The Dockerfile, which is built where docker is: here it is linted, and what it copies is what the package needs."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
INSTRUCTIONS = {"FROM", "ARG", "WORKDIR", "COPY", "RUN", "ENV", "USER", "ENTRYPOINT"}


def instructions() -> list[tuple[str, str]]:
    """(name, arguments) of each instruction."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = (line for line in text.splitlines() if line.strip() and not line.startswith("#"))
    return [tuple(line.split(maxsplit=1)) for line in lines]  # pyright: ignore[reportReturnType]


def arguments(name: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == name]


def test_it_has_only_instructions_that_there_are():
    assert {name for name, _ in instructions()} <= INSTRUCTIONS
    assert instructions()[0][0] == "FROM"


def test_hadolint_has_nothing_to_say():
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is of the lint extra")
    done = subprocess.run([hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_images_are_named_without_a_registry_and_nothing_is_fetched_from_an_address():
    assert all(re.fullmatch(r"[a-z]+:[\w.-]+", image) for image in arguments("FROM"))
    assert "://" not in (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_the_versions_are_those_of_constraints():
    (install,) = (line for line in arguments("RUN") if "pip install" in line)
    assert "--constraint constraints.txt" in install
    extras = re.search(r"\.\[([\w,]+)", install)
    assert extras is not None
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(extras[1].split(",")) <= set(project["optional-dependencies"])
    version = re.search(r"python:3\.(\d+)", arguments("FROM")[0])
    assert version is not None
    assert int(version[1]) >= int(project["requires-python"].removeprefix(">=3."))


def test_what_is_copied_is_there_and_gets_through_dockerignore():
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for line in arguments("COPY"):
        for name in line.split()[:-1]:
            assert (ROOT / name).exists()
            assert f"!{name}" in ignored


def test_it_does_not_run_as_root():
    assert instructions()[-2:] == [("USER", "1000:1000"), ("ENTRYPOINT", '["jaxgpt"]')]


def test_home_is_a_folder_in_which_compiled_programs_are_kept(tmp_path):
    """Anybody may write to it, which without the sticky bit would refuse the cache."""
    (home,) = (line.removeprefix("HOME=") for line in arguments("ENV"))
    (made,) = (line for line in arguments("RUN") if "chmod" in line)
    mode = re.search(rf"chmod -R (\d+) {home}$", made)
    assert mode is not None
    (tmp_path / "home").mkdir()
    (tmp_path / "home").chmod(int(mode[1], 8))
    assert (tmp_path / "home").stat().st_mode & 0o1777 == 0o1777
