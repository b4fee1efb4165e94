"""The device mesh (paper §2.7): tensor parallel inside a machine, ZeRO across machines.

Devices are grouped by what slower links lie between: slices of TPUs, hosts of others. The outer
mesh axes take the groups, so that `replica` crosses them, `fsdp` only where the mesh says so, and
`tensor`, the last axis, gets the nearest devices. Hosts of one network switch stand side by side:
each host tells its own in BAICHUAN_JAX_SWITCH (any name; of 'spine2.leaf5' the spine comes first),
or Slurm's topology plugin does.
"""

import os
import socket

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType

from baichuan_jax.config import BATCH_AXES, TENSOR_AXIS, MeshConfig, ModelConfig
from baichuan_jax.parallel.topology import AXES, MeshShape, nearest, split

Hosts = dict[int, tuple[str, str]]  # process: its switch, its host


def start_processes(coordinator: str, num_processes: int, process_id: int) -> None:
    """Joins this process to the others of a multi-host run, before JAX sees a device.

    Slurm and Open MPI give a process the GPU of its number on the host; a process that has the host
    to itself gets all. Elsewhere it gets those in JAX_LOCAL_DEVICE_IDS (`0,1`), or all.

    Args:
      coordinator: `HOST:PORT` of process 0; 'auto' on TPU pods, Slurm and other clusters
        that JAX detects by itself; '' for a single process.
      num_processes, process_id: only needed with an explicit coordinator.

    Raises:
      ValueError: 'auto' where no cluster is detected.
    """
    local = [] if _has_the_host() and "JAX_LOCAL_DEVICE_IDS" not in os.environ else None
    if coordinator == "auto":
        try:
            jax.distributed.initialize(local_device_ids=local)
        except ValueError as error:
            raise ValueError(
                f"--coordinator=auto: JAX detects no cluster here ({error}) It knows TPU VMs,"
                " Slurm, Open MPI, and Kubernetes beside the package `kubernetes`; elsewhere, give"
                " --coordinator=HOST:PORT, --num_processes=N and --process_id=I."
            ) from error
    elif coordinator:
        jax.distributed.initialize(coordinator, num_processes, process_id, local)


def _has_the_host() -> bool:
    """Whether Slurm or Open MPI started one process for each host: JAX would hide all GPUs but
    the first from it, unless it is given an empty list."""
    slurm = [os.environ.get(name) for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_NODES")]
    return os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1" or (
        None not in slurm and slurm[0] == slurm[1]
    )


def mesh_shape(config: MeshConfig, num_devices: int, granules: int = 1) -> MeshShape:
    """Sizes of (replica, fsdp, tensor) with -1 filled in.

    Args:
      granules: hosts or slices, for the message.

    Raises:
      ValueError: where the sizes do not multiply to the number of devices; names some that do.
    """
    sizes = tuple(getattr(config, axis) for axis in AXES)
    shown = " × ".join(f"config.mesh.{axis}={n}" for axis, n in zip(AXES, sizes, strict=True))
    free = sizes.count(-1)
    known = int(np.prod([size for size in sizes if size != -1]))
    if free > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"{shown}: sizes are positive, and one at most may be -1.")
    if num_devices % known or (not free and known != num_devices):
        raise ValueError(
            f"{shown} does not fit {num_devices} devices: the product must be {num_devices}"
            " (one size may be -1 to take what is left);"
            f" {nearest(sizes, num_devices, granules)}"
        )
    return tuple(num_devices // known if size == -1 else size for size in sizes)


def make_mesh(config: MeshConfig, devices=None) -> jax.sharding.Mesh:
    """A mesh whose last axis has the fastest links; `replica` crosses slices or hosts.

    Args:
      devices: those of this run, in any order, or of an ahead-of-time topology; all by default.

    Raises:
      ValueError: where the sizes do not multiply to the number of devices, cut hosts or slices in
        pieces, or these do not have equal numbers of devices; names the nearest that fit.
    """
    devices = jax.devices() if devices is None else devices
    groups = granules(devices, _hosts(devices))
    grid = arrange(mesh_shape(config, len(devices), len(groups)), groups)
    return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def granules(devices, hosts: Hosts) -> list[list]:
    """Devices grouped by the slice (TPU) or the host that they are of, hosts by switch.

    Args:
      devices: in any order; the result is the same.
      hosts: of the processes; one that is not in it is a host of its own, as in ahead-of-time
        topologies. (At run time a GPU's `slice_index` need not be its host.)

    Raises:
      ValueError: names the groups where they do not have equal numbers of devices.
    """
    groups = {}
    for device in sorted(devices, key=lambda device: (device.process_index, device.id)):
        if device.platform == "tpu":
            key = ("", f"slice {getattr(device, 'slice_index', 0)}")
        else:
            key = hosts.get(device.process_index, ("", f"process {device.process_index}"))
        groups.setdefault(key, []).append(device)
    sizes = {name: len(group) for (_, name), group in groups.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            "Hosts or slices must have equal numbers of devices; they have "
            + ", ".join(f"{name} {size}" for name, size in sizes.items())
            + "."
        )
    # Stable: hosts of one switch keep the order of their processes.
    return [groups[key] for key in sorted(groups, key=lambda key: key[0])]


def arrange(shape: MeshShape, groups: list[list]) -> np.ndarray:
    """Devices as the grid of a mesh: a box of it from each group, as `split` says.

    JAX's `create_hybrid_device_mesh` does the same, but knows slices or processes only, and a host
    may have several processes.

    Raises:
      ValueError: the mesh cuts groups in pieces.
    """
    inner, outer = split(shape, len(groups))
    boxes = [
        mesh_utils.create_device_mesh(inner, group, allow_split_physical_axes=True)
        for group in groups
    ]
    grid = np.array(boxes, object).reshape(*outer, *inner)
    return grid.transpose(0, 3, 1, 4, 2, 5).reshape(shape)


def _hosts(devices) -> Hosts:
    """The switch and the host of every process of this run, which tell each other; nothing where
    one process has all of `devices`, or they know their slices."""
    processes = {device.process_index for device in devices}
    if jax.process_count() == 1 or len(processes) == 1 or jax.default_backend() == "tpu":
        return {}
    slurm = os.environ.get("SLURM_TOPOLOGY_ADDR", "").rpartition(".")[0]  # spine.leaf.node
    switch = os.environ.get("BAICHUAN_JAX_SWITCH", slurm)
    names = f"{switch}\0{socket.gethostname()}".encode()[-512:].ljust(512, b"\0")
    told = multihost_utils.process_allgather(np.frombuffer(names, np.uint8))
    return {
        process: tuple(row.tobytes().decode(errors="replace").split("\0")[:2])
        for process, row in enumerate(np.asarray(told, np.uint8))
    }


def indivisible(model: ModelConfig, tensor: int) -> str:
    """What of a model `tensor` devices cannot split evenly, as a sentence; or nothing."""
    for name in ("num_heads", "intermediate_size", "hidden_size", "padded_vocab_size"):
        if getattr(model, name) % tensor:
            return f"config.mesh.tensor={tensor} must divide model.{name}={getattr(model, name)}."
    return ""


def check_fit(mesh: jax.sharding.Mesh, model: ModelConfig, rows: int) -> None:
    """Refuses a model or a batch that the mesh cannot split evenly.

    Args:
      rows: rows of one micro-batch over all devices.

    Raises:
      ValueError: names the field and what would divide it.
    """
    if reason := indivisible(model, mesh.shape[TENSOR_AXIS]):
        raise ValueError(reason)
    shards = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
    if rows % shards:
        raise ValueError(
            f"config.training.batch_size / micro_batches = {rows} rows must be a multiple of"
            f" replica × fsdp = {shards} devices, such as {-(-rows // shards) * shards}: with fewer"
            " micro-batches, a larger batch or more of config.mesh.tensor."
            " `python -m experiments.plan --apply=FILE.py` writes a recipe for a machine."
        )
