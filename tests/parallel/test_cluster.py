"""A process's place among the others, from options, Slurm, Open MPI and Kubernetes."""

import sys
import types

import pytest

from jaxgpt.errors import UserError
from jaxgpt.options import checks
from jaxgpt.options.config import Config, Parallel
from jaxgpt.parallel import cluster
from jaxgpt.parallel.cluster import Place

SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "gpu[07-08,11]",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x3)",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
URI = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1", "HOSTNAME": "localhost"}


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    for name in [
        *SLURM,
        *OPEN_MPI,
        *URI,
        *POD,
        "CUDA_VISIBLE_DEVICES",
        "JAX_COORDINATOR_PORT",
        "PMIX_NAMESPACE",
        "OMPI_VERSION",
    ]:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def variables(monkeypatch):
    def put(*tables: dict[str, str], **more: str) -> None:
        for table in (*tables, more):
            for name, value in table.items():
                monkeypatch.setenv(name, value)

    return put


def test_alone_where_nothing_says_otherwise():
    assert cluster.find(Parallel()) is None


def test_options_say_all():
    assert cluster.find(Parallel(processes=3, process=1, coordinator="a:1")) == Place("a:1", 3, 1, "options")


def test_slurm(variables):
    """The port is the job's number, in a range of 4096 from 61440 on."""
    variables(SLURM)
    assert cluster.find(Parallel()) == Place("gpu07:61441", 3, 2, "Slurm", None)


def test_one_process_may_be_asked_for_anywhere(variables):
    variables(SLURM)
    assert cluster.find(Parallel(processes=1)) is None


def test_one_task_is_alone(variables):
    variables(SLURM, SLURM_NTASKS="1", SLURM_PROCID="0")
    assert cluster.find(Parallel()) is None


def test_a_batch_script_itself_is_alone(variables):
    variables({name: value for name, value in SLURM.items() if "STEP" not in name})
    assert cluster.find(Parallel()) is None


@pytest.mark.parametrize(
    ("visible", "devices"), [(None, [1]), ("0,1", [1]), ("4,5,6,7", [2, 3]), ("0", None), ("", None)]
)
def test_several_tasks_on_a_node_share_its_devices(variables, visible, devices):
    """Each task gets as many; it takes all it sees where the scheduler has given each its own."""
    variables(SLURM, SLURM_STEP_TASKS_PER_NODE="1,2", SLURM_NODEID="1", SLURM_LOCALID="1")
    if visible is not None:
        variables(CUDA_VISIBLE_DEVICES=visible)
    place = cluster.find(Parallel())
    assert place is not None
    assert place.devices == devices


def test_open_mpi_4(variables):
    variables(OPEN_MPI, URI)
    place = cluster.find(Parallel())
    assert place is not None
    assert place[1:] == (4, 3, "Open MPI", [1])
    assert place.coordinator.startswith("10.96.0.1:")


@pytest.mark.parametrize("more", [{}, {"OMPI_VERSION": "5.0.7"}, {"OMPI_VERSION": "5.0.7"} | URI])
def test_open_mpi_5_on_one_machine(variables, more):
    """All processes of a job take the same port, and another job another one. None of it needs mpi4py."""
    variables(OPEN_MPI, more, OMPI_COMM_WORLD_LOCAL_SIZE="4", PMIX_NAMESPACE="prterun-a-1@1")
    place = cluster.find(Parallel())
    assert place is not None
    assert place[1:] == (4, 3, "Open MPI", [1])
    variables(OMPI_COMM_WORLD_RANK="0")
    first = cluster.find(Parallel())
    variables(PMIX_NAMESPACE="prterun-a-2@1")
    other_job = cluster.find(Parallel())
    assert first is not None
    assert other_job is not None
    assert first.coordinator == place.coordinator != other_job.coordinator


def test_open_mpi_5_on_several_machines_needs_the_coordinator(variables):
    variables(OPEN_MPI)
    with pytest.raises(UserError, match=r"started 4 processes on several machines .* --parallel.coordinator HOST:PORT"):
        cluster.find(Parallel())
    assert cluster.find(Parallel(coordinator="a:1")) == Place("a:1", 4, 3, "Open MPI", [1])


@pytest.mark.parametrize("value", ["", "four", "-1", "٣", "9" * 5000])
def test_open_mpi_with_a_count_that_is_none(variables, value):
    variables(OPEN_MPI, OMPI_COMM_WORLD_LOCAL_SIZE=value)
    with pytest.raises(UserError, match=r"OMPI_COMM_WORLD_LOCAL_SIZE is .*, and must be a whole number") as caught:
        cluster.find(Parallel())
    assert len(str(caught.value)) < 400


class Api:
    """Kubernetes' answers about a JobSet's pod number 1 of 4."""

    def __init__(self):
        labels = {"jobset.sigs.k8s.io/jobset-name": "jaxgpt"}
        owner = types.SimpleNamespace(controller=True, kind="Job")
        self.pod = types.SimpleNamespace(
            metadata=types.SimpleNamespace(labels={"job-name": "localhost"}, owner_references=[owner], name="p"),
            spec=types.SimpleNamespace(subdomain="jaxgpt"),
        )
        self.job = types.SimpleNamespace(
            metadata=types.SimpleNamespace(name="jaxgpt-train-0", labels=labels),
            spec=types.SimpleNamespace(parallelism=4),
        )

    def list_namespaced_pod(self, **_):
        return types.SimpleNamespace(items=[self.pod])

    def read_namespaced_job(self, **_):
        return self.job


def test_kubernetes(variables, monkeypatch):
    """JAX's own detection, with a stub for the client that asks the cluster."""
    client = types.SimpleNamespace(
        CoreV1Api=Api, BatchV1Api=Api, exceptions=types.SimpleNamespace(ApiException=ValueError)
    )
    stub = types.SimpleNamespace(client=client, config=types.SimpleNamespace(load_incluster_config=lambda: None))
    monkeypatch.setitem(sys.modules, "kubernetes", stub)
    monkeypatch.setattr(cluster.clusters.K8sCluster, "_namespace", lambda: "default")
    monkeypatch.setattr("socket.gethostbyname", lambda name: "10.0.0.7")
    variables(POD)
    assert cluster.find(Parallel()) == Place("jaxgpt-train-0-0.jaxgpt:55527", 4, 1, "Kubernetes", None)


def test_a_pod_without_the_client_is_told_what_to_do(variables, monkeypatch):
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    variables(POD)
    with pytest.raises(UserError, match=r"make env EXTRAS=kubernetes, or give .* --parallel.processes 1 trains"):
        cluster.find(Parallel())


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (Parallel(processes=2, coordinator="a:1"), "--parallel.process is -1, and must be from 0 to 1"),
        (Parallel(processes=2, process=2, coordinator="a:1"), "--parallel.process is 2, and must be from 0 to 1"),
        (Parallel(processes=2, process=1), "--parallel.coordinator is empty, and must be host:port"),
        (Parallel(processes=2, process=1, coordinator="a"), "--parallel.coordinator is a, and must be host:port"),
        (Parallel(coordinator="a:65536"), "--parallel.coordinator is a:65536, and must be host:port"),
        (Parallel(process=0), "--parallel.process is 0, and must be left away"),
        (Parallel(processes=-1), "--parallel.processes is -1, and must be 0 or more"),
    ],
)
def test_options_that_do_not_belong_together(parallel, message):
    with pytest.raises(UserError, match=message):
        checks.check(Config(parallel=parallel))


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"SLURM_PROCID": "x"}, "SLURM_PROCID is 'x'"),
        ({"SLURM_NTASKS": "-4"}, "SLURM_NTASKS is '-4'"),
        ({"SLURM_LOCALID": "1_0"}, "SLURM_LOCALID is '1_0'"),
        ({"SLURM_PROCID": "3"}, "process 3 of 3"),
        ({"SLURM_NTASKS": "0"}, "process 2 of 0"),
        ({"SLURM_NTASKS": "99999999999999"}, "up to 65536"),
        ({"SLURM_STEP_NODELIST": ""}, "':61441' as the address"),
        ({"JAX_COORDINATOR_PORT": "x"}, "'gpu07:x' as the address"),
    ],
)
def test_slurm_with_a_place_that_there_cannot_be(variables, changed, match):
    """The process is not waited for, and no memory is taken for so many."""
    variables(SLURM, changed)
    with pytest.raises(UserError, match=match):
        cluster.find(Parallel())


def test_open_mpi_with_a_place_that_there_cannot_be(variables):
    variables(OPEN_MPI, OMPI_COMM_WORLD_LOCAL_SIZE="0", CUDA_VISIBLE_DEVICES="0,1")
    with pytest.raises(UserError, match="number 1 of 0 on its machine"):
        cluster.find(Parallel(coordinator="a:1"))
    variables(OMPI_COMM_WORLD_LOCAL_SIZE="2", OMPI_COMM_WORLD_RANK="4")
    with pytest.raises(UserError, match="process 4 of 4"):
        cluster.find(Parallel(coordinator="a:1"))


def test_more_processes_than_there_can_be():
    with pytest.raises(UserError, match=r"--parallel.processes is 2147483647, and must be at most 65536"):
        checks.check_processes(Parallel(processes=2**31 - 1, process=0, coordinator="a:1"))
