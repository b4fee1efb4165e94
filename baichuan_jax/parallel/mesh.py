"""The device mesh (paper §2.7): tensor parallel inside a machine, ZeRO across machines."""

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType

from baichuan_jax.config import BATCH_AXES, TENSOR_AXIS, MeshConfig, ModelConfig

AXES = (*BATCH_AXES, TENSOR_AXIS)


def start_processes(coordinator: str, num_processes: int, process_id: int) -> None:
    """Joins this process to the others of a multi-host run, before JAX sees a device.

    Args:
      coordinator: `HOST:PORT` of process 0; 'auto' on TPU pods, Slurm and other clusters
        that JAX detects by itself; '' for a single process.
      num_processes, process_id: only needed with an explicit coordinator.
    """
    if coordinator == "auto":
        jax.distributed.initialize()
    elif coordinator:
        jax.distributed.initialize(coordinator, num_processes, process_id)


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, int, int]:
    """Sizes of (replica, fsdp, tensor) with -1 filled in.

    Raises:
      ValueError: where the sizes do not multiply to the number of devices.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    shown = " × ".join(f"config.mesh.{axis}={size}" for axis, size in sizes.items())
    free = [axis for axis, size in sizes.items() if size == -1]
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"{shown}: sizes are positive, and one at most may be -1.")
    if num_devices % known or (not free and known != num_devices):
        raise ValueError(
            f"{shown} does not fit {num_devices} devices: the product must be {num_devices}"
            " (one size may be -1 to take what is left)."
        )
    return tuple(num_devices // known if axis in free else sizes[axis] for axis in AXES)


def make_mesh(config: MeshConfig, devices=None) -> jax.sharding.Mesh:
    """A mesh whose last axis has the fastest links; `replica` crosses slices or hosts.

    Raises:
      ValueError: where the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config, len(devices))
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(slices) > 1:
        if shape[0] % len(slices):
            raise ValueError(
                f"config.mesh.replica={shape[0]} must be a multiple of the {len(slices)} slices:"
                " only `replica` may cross them."
            )
        inside = (shape[0] // len(slices), *shape[1:])
        grid = mesh_utils.create_hybrid_device_mesh(
            inside, (len(slices), 1, 1), devices, allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def check_fit(mesh: jax.sharding.Mesh, model: ModelConfig, rows: int) -> None:
    """Refuses a model or a batch that the mesh cannot split evenly.

    Args:
      rows: rows of one micro-batch over all devices.

    Raises:
      ValueError: names the field and what would divide it.
    """
    tensor = mesh.shape[TENSOR_AXIS]
    for name in ("num_heads", "intermediate_size", "hidden_size", "padded_vocab_size"):
        if getattr(model, name) % tensor:
            raise ValueError(
                f"config.mesh.tensor={tensor} must divide model.{name}={getattr(model, name)}."
            )
    shards = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
    if rows % shards:
        raise ValueError(
            f"config.training.batch_size / micro_batches = {rows} rows must be a multiple of"
            f" replica × fsdp = {shards} devices."
        )
