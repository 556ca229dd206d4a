"""This process's place among those that train together, from options or from the cluster's scheduler.

JAX knows how to ask Slurm, Open MPI and Kubernetes. This module decides what JAX leaves open: whether there are several
processes at all, Open MPI 5 (of which JAX either knows nothing or asks mpi4py), and which devices belong to which
process.
"""

import os
import re
import zlib
from typing import NamedTuple

from jax._src import clusters

from jaxgpt import environment
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import quoted, shown
from jaxgpt.options.checks import MOST_PROCESSES, is_address
from jaxgpt.options.config import Parallel

ALONE = "--parallel.processes 1 trains in this process alone"


class Place(NamedTuple):
    coordinator: str  # host:port, where process 0 listens
    processes: int
    process: int
    source: str  # what says so, for messages
    devices: list[int] | None = None  # its machine's device ids that this process takes; None: all that it sees


def find(parallel: Parallel) -> Place | None:
    """Returns this process's place, or None where it trains alone.

    UserError where the cluster says that there are several processes, and not how they find each other.
    """
    if parallel.processes == 1:
        return None
    if parallel.processes:
        return Place(parallel.coordinator, parallel.processes, parallel.process, "options")
    place = _slurm() or _open_mpi(parallel.coordinator) or _kubernetes()
    if place is None or place.processes == 1:
        return None
    place = place._replace(coordinator=parallel.coordinator or place.coordinator)
    _check(place)
    return place


def _check(place: Place) -> None:
    """Raises a UserError where a scheduler's variables, which anybody may set, give no place that there can be."""
    if not 1 <= place.processes <= MOST_PROCESSES or not 0 <= place.process < place.processes:
        raise UserError(
            f"{place.source} says that this is process {place.process} of {place.processes}: there may be up to "
            f"{MOST_PROCESSES}, and they are counted from 0. Mend its variables; {ALONE}"
        )
    if not is_address(place.coordinator):
        raise UserError(
            f"{place.source} gives {quoted(place.coordinator)} as the address of process 0, which is not host:port. "
            f"Give --parallel.coordinator; {ALONE}"
        )


def _slurm() -> Place | None:
    if not clusters.SlurmCluster.is_env_present():  # as in a batch script itself, outside of srun
        return None
    for name in ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID"):
        environment.needed(name)  # JAX's own message doesn't name the variable
    tasks = _per_node(os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = environment.needed("SLURM_NODEID", 0)
    together = tasks[node] if node < len(tasks) else 1
    return _asked(clusters.SlurmCluster, "Slurm", together)


def _per_node(text: str) -> list[int]:
    """Parses Slurm's tasks per node: "2(x3),1" is [2, 2, 2, 1]."""
    found = re.findall(r"(?<!\d)([0-9]{1,6})(?!\d)(?:\(x([0-9]{1,6})\))?", text)
    return [int(tasks) for tasks, nodes in found for _ in range(int(nodes or 1))]


def _open_mpi(coordinator: str) -> Place | None:
    """Returns the place that Open MPI's variables give, or None where there are none.

    JAX knows the variables of versions before 5. For later versions, newer ones of JAX ask mpi4py and older ones know
    nothing: there the variables are read here, which needs no package and is the same under all versions of JAX.
    """
    if "OMPI_COMM_WORLD_SIZE" not in os.environ:
        return None
    count, number, together, local = (
        environment.needed(f"OMPI_COMM_WORLD_{name}") for name in ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK")
    )
    major = re.match("[0-9]{1,9}", os.environ.get("OMPI_VERSION", ""))  # of a version such as 5.0.7
    if "OMPI_MCA_orte_hnp_uri" in os.environ and (major is None or int(major[0]) < 5):
        return _asked(clusters.OmpiCluster, "Open MPI", together)
    if together < count and not coordinator:
        raise UserError(
            f"this Open MPI started {count} processes on several machines and doesn't say on which: give all of them "
            f"--parallel.coordinator HOST:PORT, with the machine of process 0 and a free port there; {ALONE}"
        )
    port = 49152 + zlib.crc32(os.environ.get("PMIX_NAMESPACE", "").encode(errors="surrogateescape")) % 8192
    return Place(coordinator or f"127.0.0.1:{port}", count, number, "Open MPI", _share(local, together))


def _kubernetes() -> Place | None:
    """Returns the place of a pod of an indexed Job. Needs Kubernetes's own client, which may not be installed."""
    if not {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= os.environ.keys():
        return None
    try:
        import kubernetes  # noqa: F401  # type: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            "this pod is one of an indexed Job, and the package that would ask Kubernetes for the others is missing: "
            f"make env EXTRAS=kubernetes, or give --parallel.coordinator, .processes and .process; {ALONE}"
        ) from None
    return _asked(clusters.K8sCluster, "Kubernetes", 1)


def _asked(cluster: type[clusters.ClusterEnv], name: str, together: int) -> Place:
    """Returns the place that JAX's own detection of a cluster finds. UserError where the detection fails.

    `together` is the number of the job's processes on this machine.
    """
    try:
        if not cluster.is_env_present():
            raise RuntimeError("its variables are missing")
        count = cluster.get_process_count()
        port = os.environ.get("JAX_COORDINATOR_PORT")
        address = "" if count == 1 else cluster.get_coordinator_address(60, port)
        local = cluster.get_local_process_id()
        return Place(address, count, cluster.get_process_id(), name, _share(local or 0, together))
    except Exception as error:  # of many types: what a cluster's own client raises
        message = shown(str(error).strip() or type(error).__name__)
        raise UserError(
            f"{name} doesn't say how this job's processes find each other: {message}. Give --parallel.coordinator, "
            f".processes and .process; {ALONE}"
        ) from None


def _share(number: int, together: int) -> list[int] | None:
    """Returns process `number`'s share of the GPUs that the `together` processes of a machine see; None for all.

    A process alone on its machine drives all of them. Where the scheduler has given each process its own, there is
    nothing to divide. Where it doesn't say how many there are, each process takes one.
    """
    if together == 1:
        return None
    if number >= together:
        raise UserError(f"this process is number {number} of {together} on its machine, by the scheduler's variables")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [number]
    count = len([name for name in visible.split(",") if name.strip()])
    if count < together:
        return None
    return list(range(number * count // together, (number + 1) * count // together))
