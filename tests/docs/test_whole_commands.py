"""The lines of README and docs/ that need processes of their own, run: several that train together, others' programs.

Each is as it is typed but for its sizes: options behind the line's own make it small. The rest of the lines is run by
`test_commands.py`, and what none of both runs is named here, with the reason.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxgpt.commands import cli
from jaxgpt.options import settings
from tests.docs import world
from tests.docs.commands import EXAMPLES, ROOT, Command, Line, commands, lines, words
from tests.parallel.several import free_port

SECONDS = 240  # for any of them; on an idle machine it takes a tenth
SMALL_MODEL = """
[model]
layers = 1
heads = 2
width = 8
context = 64
vocabulary_size = 256
[data]
tokenizer = "bytes"
"""
# Behind a module's own words, or in the place of its sizes.
MODULES = {
    "benchmarks.scaling": [],
    "benchmarks.reproducible": ["--config", "small.toml", "--length", "8", "--steps", "1"],
    "benchmarks.starts": [
        "--config",
        "small.toml",
        "--count",
        "1",
        "--data.text",
        "book.txt",
        "--training.batch-size",
        "8",
    ],
    "benchmarks.prepare": ["--megabytes", "1", "--rounds", "1"],
    "benchmarks.llmc_state": ["--config", "small.toml", "--batch", "1", "--length", "8"],
    "benchmarks.fuzz": ["--inputs", "300", "--engine", "mutations"],
    "benchmarks.generation": ["--rounds", "1"],
    "benchmarks.fit": ["--only", "0"],
    "benchmarks.assistant.grpo": ["--shrink", "1000", "--seeds", "0", "--folder", "sums", "--output", "."],
}
GRADCHECKS = ["--dtype bfloat16", "--config shakespeare_char", "--chart gradcheck.png"]
# In the place of a config's sizes; an empty list for a run, which has its own.
AS_RUN = {
    "--as-run --config quickstart": world.SMALL,
    "--as-run --config quickstart --compute.dtype bfloat16 --training.batch-size 4": world.SMALL,
    "--as-run runs/gpt2_124m": [],
}
SMALL_GENERATION = """
import pathlib, sys
from benchmarks import generation
from jaxgpt.options.config import Model
generation.GPT2 = Model(layers=1, heads=2, width=16, context=64, vocabulary_size=200)
generation.PROMPT, generation.LENGTH = 4, 16
generation.LEAST_OVER_UNCACHED, generation.MOST_OVER_TRANSFORMERS = 0.0, {"gpt2": float("inf")}
generation.RESULTS = pathlib.Path()
sys.exit(generation.main())
"""
TASK = """
task: animals
dataset_path: json
dataset_kwargs:
  data_files: {{validation: {file}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: choices
metric_list:
  - metric: acc
"""
# What is not run, and why; the words are checked by test_commands.py all the same.
NOT_RUN = {
    "sbatch": "needs Slurm; tests/parallel/test_scripts.py runs the script with a srun of its own",
    "kubectl": "needs a cluster; tests/parallel/test_scripts.py runs the pods' command",
    "ssh": "needs another machine",
    "wandb": "sends to a service",
    "pip": "installs",
    "pre-commit": "needs a package that nothing else does",
    "source": "of the shell",
    "make": "installs and then runs other lines; `make -n` is read, and make help is run",
    "pytest": "they are these tests",
    "benchmarks.serving": "fails where the machine is slow",
    "docs.site.configuration": "writes a page here; tests/docs/test_pages.py compares it",
    "compare_kernels.py": "needs a GPU",
    "benchmarks.gpu_program": "needs JAX's CUDA plugin; tests/test_gpu_program.py runs it",
    "gpu_check.sh": "tests/test_gpu_check.py runs it, small",
    **dict.fromkeys(
        ("chain_of_thought.py", "react.py", "tree_of_thought.py", "retrieval.py"),
        "tests/generation/test_examples.py runs these lines against a server",
    ),
    "benchmarks.assistant.ppo": "tests/test_assistant.py runs its stages, small",
    "benchmarks.search": "takes minutes; tests/generation/test_search.py runs what it times",
    "python3": "makes an environment, or unpacks run.py's copy elsewhere",
    "uv": "installs",
    "docker": "needs a daemon; tests/test_dockerfile.py reads the Dockerfile",
    "sha256sum": "tests/runs/test_checkpoints.py runs it in a checkpoint",
}
# `run.py` with a text in the place of what would be downloaded.
PATCHED = """
import sys
from jaxgpt.data import corpora
corpora.SHAKESPEARE_SHA256 = sys.argv[1]
from jaxgpt.commands import cli
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Texts, a small config and a run; the current folder."""
    path = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        Path("book.txt").write_text(world.TEXT)
        Path("small.toml").write_text(SMALL_MODEL)
        yield path


@pytest.fixture(scope="module")
def trained(folder):
    """The folder with runs/NAME in it, a run whose numbers went to TensorBoard too."""
    pytest.importorskip("tensorboardX", reason="numbers are written by the trackers extra")
    more = ["--data.text=book.txt", "--run.name=NAME", "--run.trackers=tensorboard"]
    assert cli.main(["--config", "gpt2_124m", *world.SMALL, *more]) == 0
    return folder


def typed(kind: str) -> Iterator[tuple[Line, Command]]:
    """The lines' commands of this kind, those in a sentence too, each once."""
    seen = []
    for line in lines():
        for command in commands(line) if not line.message else ():
            if command.kind == kind and command not in seen:
                seen.append(command)
                yield line, command


def environment(devices: int = 1) -> dict[str, str]:
    """Returns the environment: the CPU, quick compilation, and no variables of `make test`."""
    own = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
    return os.environ | own | {"PYTHONPATH": str(ROOT), "COLUMNS": "120", "PYTHON": sys.executable}


def run(*command: object, devices: int = 1, **more: str) -> str:
    """Runs a command, which must succeed, and returns its output."""
    written = [str(word) for word in command]
    done = subprocess.run(
        written, env=environment(devices) | more, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, f"{written}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def small(command: Command, name: str) -> list[str]:
    """A line that trains, on as many devices as it says, in little time."""
    own = [option for option in world.SMALL if not option.startswith("--parallel.")]
    return [*command.words, *own, "--data.text=book.txt", "--data.tokenizer=bytes", f"--run.name={name}"]


# All lines


HERE = {"benchmarks.bench", "jaxgpt.evaluation.lm_eval_adapter", "one_node.sh", "tensorboard"}


def how(command: Command) -> str:
    """Returns where the command is run: in another test file, in one of the tests here, or nowhere."""
    program = command.words[0].rpartition("/")[2] if command.kind in ("module", "script") else command.kind
    if program in NOT_RUN or (command.kind == "script" and "slurm" in program):
        return "not run"
    if program in MODULES or program in HERE:
        return "here"
    return "there" if command.kind in ("run", "curl") else f"{command.kind} {program} is run by no test"


def test_every_line_is_run_or_there_is_a_reason():
    found = {f"{line}": how(command) for line in lines() for command in commands(line)}
    assert {line: what for line, what in found.items() if what not in ("here", "there", "not run")} == {}
    assert {command.words[0] for _, command in typed("module")} >= MODULES.keys()


def test_make_help_is_run():
    (line,) = (line for line in lines() if line.text == "make help")
    printed = run(*words(line.text), f"--directory={ROOT}", "VENV=/nowhere/.venv", MAKEFLAGS="", MAKELEVEL="")
    for _, command in typed("make"):
        for target in command.words:
            assert "=" in target or re.search(rf"make {target} ", printed), target


def test_the_scaling_that_is_told_of_is_printed(folder):
    ((_, command),) = ((line, command) for line, command in typed("module") if command.words == ["benchmarks.scaling"])
    assert "of ideal" in run(sys.executable, "-m", *command.words)


# Several processes


@pytest.mark.slow
def test_processes_that_are_started_by_hand_train_together(folder):
    both = [command for _, command in typed("run") if "--parallel.processes" in command.words]
    assert len(both) == 2
    address = f"127.0.0.1:{free_port()}"
    started = []
    for command in both:
        own = [word.replace("node1:12345", address) for word in small(command, "by_hand")]
        written = [sys.executable, str(ROOT / "run.py"), *own]
        started.append(
            subprocess.Popen(written, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        said = [process.communicate(timeout=SECONDS)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], said
    assert "parallel  2 devices of 2 processes" in said[0]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("mpirun"), reason="Open MPI is not installed")
def test_open_mpi_starts_them(folder):
    (line,) = (line for line in lines() if line.text.startswith("mpirun"))
    (command,) = commands(line)
    before = words(line.text)[: words(line.text).index(".venv/bin/python")]
    before[before.index("-H") + 1] = "localhost:2"  # for two other machines
    more = ["--allow-run-as-root", "--oversubscribe"]
    said = run(*before, *more, sys.executable, ROOT / "run.py", *small(command, "by_mpi"))
    assert "parallel  2 devices of 2 processes" in said


@pytest.mark.slow
def test_the_script_for_one_node_starts_them(folder):
    """The script works in its own folder, which is the clone's."""
    ((_, command),) = (found for found in typed("script") if "one_node" in found[1].words[0])
    script, *own = command.words
    options = small(Command("run", own), "by_script")
    options += [f"--run.folder={folder}/runs", f"--data.text={folder}/book.txt"]
    assert "parallel  2 devices of 2 processes" in run(ROOT / script, *options, PROCESSES="2", PATH="/usr/bin:/bin")


# The proof, and benchmarks


@pytest.mark.slow
@pytest.mark.parametrize("own", GRADCHECKS)
def test_gradcheck_is_run(folder, own):
    """It has a process of its own, as it switches to 64 bits for good."""
    text = ("".join(sorted(set(world.TEXT))) + world.TEXT).encode()
    Path("tinyshakespeare.txt").write_bytes(text)
    before = [sys.executable, "-c", PATCHED, hashlib.sha256(text).hexdigest()]
    said = run(*before, "gradcheck", *own.split(), JAXGPT_DATA=str(folder))
    assert re.search(r"\b(\d+) of \1 gradients agree with jax.grad", said)
    assert "--chart" not in own or Path("gradcheck.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.parametrize("own", AS_RUN)
def test_gradcheck_of_a_step_is_run(folder, own):
    small = settings.read(Path("small.toml"))
    run_of_it = dataclasses.replace(small, data=dataclasses.replace(small.data, text="book.txt"))
    Path("runs/gpt2_124m").mkdir(parents=True, exist_ok=True)
    settings.write(run_of_it, Path("runs/gpt2_124m/config.toml"))
    said = run(sys.executable, str(ROOT / "run.py"), "gradcheck", *own.split(), *AS_RUN[own])
    assert re.search(r"\b(\d+) of \1 are right", said)
    assert "all of the run's step" in said


def test_no_gradcheck_is_left_away():
    known = {" ".join(command.words[1:]) for _, command in typed("run") if command.words[:1] == ["gradcheck"]}
    assert known - {""} == {*GRADCHECKS, *AS_RUN}  # without options it is what --chart draws


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--profile", "trace"], ["--model-family", "llama"]])
def test_bench_is_run(folder, more):
    """Ours and jax.grad, of one small model; PyTorch's part takes longer to start than all of this."""
    known = [command.words[1:] for _, command in typed("module") if command.words[0] == "benchmarks.bench"]
    llama = ["--model-family", "llama"]
    assert sorted(known) == [[], llama, [*llama, "--rounds", "3"], ["--profile"]]
    family = "llama" if "llama" in more else "gpt2"
    Path("measured.toml").write_text(SMALL_MODEL.replace("[model]", f'[model]\nfamily = "{family}"'))
    own = "--config measured.toml --sizes 2x8 --dtypes float32 --who ours jax.grad --steps 1"
    said = run(sys.executable, "-m", "benchmarks.bench", *own.split(), *more)
    assert ("trace: trace" if "--profile" in more else "all agree within") in said


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"benchmarks.scaling", "benchmarks.generation"}))
def test_a_benchmark_is_run(folder, name):
    if name == "benchmarks.llmc_state":
        pytest.importorskip("transformers", reason="transformers, of the parity extra, makes the state")
    for _, command in typed("module"):
        if command.words[0] == name:
            run(sys.executable, "-m", *command.words, *MODULES[name], devices=2)
    if name == "benchmarks.llmc_state":  # and what the page does with it
        made = Path(EXAMPLES["FOLDER"])
        state = made / "model_debug_state.bin"
        assert cli.main(["verify", "--model", str(made / "model.bin"), "--state", str(state)]) == 0


@pytest.mark.slow
def test_the_benchmark_of_generation_is_run(folder):
    """The model is small, and the bars are left out, which it would not meet."""
    pytest.importorskip("transformers", reason="compares with transformers, of the parity extra")
    assert any(command.words == ["benchmarks.generation"] for _, command in typed("module"))
    run(sys.executable, "-c", SMALL_GENERATION, *MODULES["benchmarks.generation"])
    assert json.loads(Path("generation.json").read_text())["same_text"]


# Others' programs


@pytest.mark.slow
def test_lm_eval_is_run(trained):
    """The task is one of our own, as the tasks of the line would be downloaded."""
    for package in ("lm_eval", "torch", "transformers", "accelerate"):
        pytest.importorskip(package, reason=f"{package} comes with the extras lm-eval and parity")
    ((_, command),) = (found for found in typed("module") if "lm_eval" in found[1].words[0])
    own = list(command.words)
    own[own.index("--tasks") + 1] = "animals"
    Path("tasks").mkdir()
    rows = [{"query": "A cat is", "choices": ["an animal", "a stone"], "label": 0}] * 3
    Path("tasks/animals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("tasks/animals.yaml").write_text(TASK.format(file=Path("tasks/animals.jsonl").absolute()))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(trained / "cache")}
    said = run(sys.executable, "-m", *own, "--include_path", "tasks", **offline, PYTHONWARNINGS="ignore")
    assert re.search(r"\|animals *\|.*\|acc *\|", said)


@pytest.mark.slow
def test_tensorboard_shows_the_run(trained):
    program = Path(sys.executable).with_name("tensorboard")
    if not program.exists():
        pytest.skip("tensorboard comes with the trackers extra")
    ((_, command),) = typed("tensorboard")
    port = free_port()
    with Path("tensorboard.log").open("w") as log:
        server = subprocess.Popen([program, *command.words, "--port", str(port)], stdout=log, stderr=log)
    try:
        until = time.monotonic() + SECONDS
        while not (found := runs_of(port)):
            assert time.monotonic() < until, Path("tensorboard.log").read_text()
            assert server.poll() is None, Path("tensorboard.log").read_text()
            time.sleep(0.3)
    finally:
        server.terminate()
        server.wait()
    assert any("NAME" in name for name in found)


def runs_of(port: int) -> list[str]:
    """Returns the names of the runs that TensorBoard has read so far."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/runs", timeout=10) as answer:
            return json.loads(answer.read())
    except OSError:
        return []
