"""Machines by name: chips, how many, and what links them, with the source of every figure."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator as JAX sees it: a GPU, a TPU chip, or a core of a TPU v4 without megacore.

    Attributes:
      name: 'v5p', 'h200', …
      platform: 'tpu' or 'gpu'.
      memory: bytes that a program may use (what the TPU compiler assumes; of a GPU's memory what
        JAX's allocator takes).
      flops: dense bfloat16 peak, FLOP/s.
      bandwidth: of its memory, bytes/s.
      source: where the figures come from.
    """

    name: str
    platform: str
    memory: float
    flops: float
    bandwidth: float
    source: str


@dataclasses.dataclass(frozen=True)
class Ring:
    """One level of links that a mesh axis runs over.

    Attributes:
      size: devices in it.
      bandwidth: bytes/s that a device sends, one way, in a ring over all of its links here.
      latency: seconds of one hop.
      kind: 'NVLink', 'InfiniBand', 'ICI', 'DCN', …
    """

    size: int
    bandwidth: float
    latency: float
    kind: str


@dataclasses.dataclass(frozen=True)
class Topology:
    """A machine: `slices` slices of chips in `shape`.

    Attributes:
      shape: of a TPU slice: chips along each axis of the torus, (16, 16) or (8, 8, 16); of GPUs:
        (nodes, GPUs of a node).
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    # num_devices, name ('v5p:8x8x8,slices=2', 'h200:1x8'), and
    # rings(mesh_shape) -> {'replica': (Ring, …), 'fsdp': (Ring, …), 'tensor': (Ring, …)}:
    # for each mesh axis its levels from the fastest (inner) to the slowest; () where the axis is 1.
