"""The scripts for clusters, as far as they can be tried without one: what they run, and what its status does."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from jaxgpt.commands import cli
from jaxgpt.errors import UserError
from jaxgpt.parallel import meeting
from tests.parallel.several import ROOT


def program(folder: Path, name: str, lines: str) -> None:
    """A command of the cluster's, to be found before all others."""
    path = folder / name
    path.write_text(f"#!/bin/bash\n{lines}\n")
    path.chmod(0o755)


@pytest.fixture
def config(monkeypatch):
    """The configuration of a command line, read as training reads it, without training."""
    from jaxgpt.commands import train
    from jaxgpt.parallel import processes

    monkeypatch.setattr(processes.cluster, "find", lambda parallel: None)
    read = []
    monkeypatch.setattr(train, "train", read.append)

    def of(words: list[str]):
        assert cli.main(words) == 0
        return read.pop()

    return of


def test_the_pods_of_the_job_set_find_each_other(tmp_path, config):
    whole = yaml.safe_load((ROOT / "scripts/jobset.yaml").read_text())
    assert (whole["apiVersion"], whole["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = whole["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    program(tmp_path, "python", 'printf "%s\\n" "$@"')
    (script,) = container["args"]
    assert script.startswith("exec .venv/bin/python run.py ")
    variable, patience = container["env"]
    assert (patience["name"], patience["value"].isdecimal()) == (meeting.SECONDS_VARIABLE, True)
    done = subprocess.run(
        [*container["command"], script.replace(".venv/bin/python", str(tmp_path / "python"))],
        env=os.environ | {variable["name"]: "3"},
        capture_output=True,
        text=True,
        check=True,
    )
    _, *words = done.stdout.splitlines()
    parallel = config(words).parallel
    assert parallel.process == 3
    assert parallel.processes == spec["completions"] == spec["parallelism"]
    host, port = parallel.coordinator.split(":")
    subdomain = whole["spec"]["network"]["subdomain"]
    assert host == f"{whole['metadata']['name']}-{job['name']}-0-0.{subdomain}"
    assert int(port) == container["ports"][0]["containerPort"]
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [UserError.status]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert config(words).run.folder in {mount["mountPath"] for mount in container["volumeMounts"]}


@pytest.mark.parametrize("status", [0, 1, 2, 143])
def test_the_slurm_script_is_requeued_where_there_was_no_time_left(tmp_path, status, config):
    program(tmp_path, "srun", f'printf "%s\\n" "$@" > {tmp_path}/srun.txt\nexit {status}')
    program(tmp_path, "scontrol", f'echo "$@" > {tmp_path}/scontrol.txt')
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17", "JAXGPT_FOLDER": str(ROOT)}
    options = ["--config", "gpt2_124m", "--run.note", "two words"]
    assert subprocess.run([ROOT / "scripts/slurm.sh", *options], env=environment, check=False).returncode == status
    said = (tmp_path / "srun.txt").read_text().splitlines()
    program_name = said.index("run.py")
    assert said[program_name - 1] == ".venv/bin/python"
    read = config(said[program_name + 1 :])
    assert (read.run.name, read.run.note, read.run.resume) == ("gpt2_124m", "two words", "auto")
    requeued = tmp_path / "scontrol.txt"
    assert (requeued.read_text() == "requeue 17\n") if status == 143 else not requeued.exists()
