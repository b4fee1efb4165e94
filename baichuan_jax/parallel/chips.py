"""Chips by name, with the source of every figure; `topology.py` makes machines of them."""

import dataclasses
import itertools
import math

# What JAX takes of a GPU's memory: XLA_PYTHON_CLIENT_MEM_FRACTION in experiments/launch/.
GPU_MEMORY_FRACTION = 0.93

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Link:
    """What devices are linked by.

    Attributes:
      kind: 'NVLink', 'InfiniBand', 'ICI', 'DCN', …
      bandwidth: bytes/s one way, of what the field of `Chip` says.
      latency: seconds of one hop.
    """

    kind: str
    bandwidth: float
    latency: float


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator as JAX sees it: a GPU, a TPU chip, or one of the two devices of a v7x.

    Attributes:
      name: 'v5p', 'h200', …
      platform: 'tpu' or 'gpu'.
      memory: bytes that a program may use (what the TPU compiler assumes; of a GPU's memory what
        JAX's allocator takes).
      flops: dense bfloat16 peak, FLOP/s.
      bandwidth: of its memory, bytes/s.
      source: where the figures come from.
      inside: of a GPU all its links to the others of its node; of a TPU chip one of its ICI links.
      across: what a device has to reach other nodes or slices.
      kinds: JAX's `device_kind`s with this peak, at run time.
      cores: that `flops` is of; JAX makes each a device of a v4 without megacore.
      fused_attention: whether attention has a kernel there (`model.attention`); else it goes
        through blocks in XLA.
      per_chip: devices of a chip, which share its ICI links.
      between: links these devices; None where there is one.
    """

    name: str
    platform: str
    memory: float
    flops: float
    bandwidth: float
    source: str
    inside: Link
    across: Link
    kinds: tuple[str, ...] = ()
    cores: int = 1
    fused_attention: bool = True
    per_chip: int = 1
    between: Link | None = None


def _gpu(
    name: str,
    *kinds: str,
    gib: float,
    teraflops: float,
    gb_per_s: float,
    nvlink: float,
    gigabits: float,
    note: str = "as in a DGX",
    **more,
) -> Chip:
    return Chip(
        name=name,
        platform="gpu",
        memory=gib * GIB * GPU_MEMORY_FRACTION,
        flops=teraflops * 1e12,
        bandwidth=gb_per_s * 1e9,
        source=(
            f"NVIDIA's data sheet; memory is {GPU_MEMORY_FRACTION:.0%} of the {gib} GiB that CUDA"
            f" reports; a {gigabits} Gb/s InfiniBand adapter for each GPU, {note}; latencies are"
            " assumed"
        ),
        inside=Link("NVLink", nvlink * 1e9, 2e-6),
        across=Link("InfiniBand", gigabits / 8 * 1e9, 10e-6),
        kinds=kinds,
        **more,
    )


def _tpu(
    name: str,
    *kinds: str,
    gib: float,
    teraflops: float,
    gb_per_s: float,
    ici: float,
    dcn: float,
    page: str = "",
    **more,
) -> Chip:
    return Chip(
        name=name,
        platform="tpu",
        memory=gib * GIB,
        flops=teraflops * 1e12,
        bandwidth=gb_per_s * 1e9,
        source=(
            f"cloud.google.com/tpu/docs/{page or name}; memory is what libtpu 0.0.42's compiler"
            " assumes; links by jax-ml.github.io/scaling-book/tpus; latencies are assumed"
        ),
        inside=Link("ICI", ici * 1e9, 1e-6),
        across=Link("DCN", dcn * 1e9, 50e-6),
        kinds=kinds,
        **more,
    )


_CHIPS = (
    _gpu(
        "a100",
        *("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-40GB"),
        *("NVIDIA A100 80GB PCIe", "NVIDIA A100-PCIE-40GB"),
        **{"gib": 79.1, "teraflops": 312, "gb_per_s": 2039, "nvlink": 300, "gigabits": 200},
        fused_attention=False,
    ),
    _gpu(
        "h100",
        "NVIDIA H100 80GB HBM3",
        **{"gib": 79.1, "teraflops": 989, "gb_per_s": 3350, "nvlink": 450, "gigabits": 400},
    ),
    _gpu(
        "h200",
        "NVIDIA H200",
        **{"gib": 139.7, "teraflops": 989, "gb_per_s": 4800, "nvlink": 450, "gigabits": 400},
    ),
    _gpu(
        "b200",
        "NVIDIA B200",
        **{"gib": 178.3, "teraflops": 2250, "gb_per_s": 7700, "nvlink": 900, "gigabits": 400},
    ),
    _gpu(
        "a800",
        *("NVIDIA A800-SXM4-80GB", "NVIDIA A800 80GB PCIe"),
        **{"gib": 79.1, "teraflops": 312, "gb_per_s": 2039, "nvlink": 200, "gigabits": 200},
        note="which is an assumption (the paper does not describe its network)",
        fused_attention=False,
    ),
    _tpu(
        "v4",
        "TPU v4",
        **{"gib": 30.75, "teraflops": 275, "gb_per_s": 1200, "ici": 45, "dcn": 6.25},
        cores=2,
    ),
    _tpu(
        "v5e",
        "TPU v5 lite",
        **{"gib": 15.75, "teraflops": 197, "gb_per_s": 819, "ici": 45, "dcn": 3.125},
    ),
    _tpu(
        "v5p",
        "TPU v5",
        **{"gib": 95.74, "teraflops": 459, "gb_per_s": 2765, "ici": 90, "dcn": 6.25},
        cores=2,
    ),
    _tpu(
        "v6e",
        "TPU v6 lite",
        **{"gib": 31.25, "teraflops": 918, "gb_per_s": 1638, "ici": 90, "dcn": 12.5},
    ),
    _tpu(
        "v7x",
        "TPU7x",
        **{"gib": 94.75, "teraflops": 2307 / 2, "gb_per_s": 7380 / 2, "ici": 90, "dcn": 12.5 / 2},
        page="tpu7x",
        per_chip=2,
        between=Link("die-to-die", 540e9, 1e-6),  # six ICI links
    ),
)

# The largest slice of those whose torus has three axes, in chips; v5e and v6e have 16 × 16.
_LARGEST = {"v4": 4096, "v5p": 6144, "v7x": 9216}


def known() -> tuple[Chip, ...]:
    """Every chip that has a name here."""
    return _CHIPS


def of_kind(device_kind: str) -> Chip | None:
    """The chip that JAX calls so at run time, None where it is not known."""
    return next((chip for chip in _CHIPS if device_kind in chip.kinds), None)


def slice_shapes(chip: Chip) -> list[tuple[int, ...]]:
    """The shapes that slices of a TPU come in, in chips along each axis of the torus."""
    if chip.name not in _LARGEST:
        return [(1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)]
    largest = _LARGEST[chip.name]
    edges = range(4, largest // 16 + 1, 4)
    cubes = itertools.combinations_with_replacement(edges, 3)
    small = [(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)]
    return small + [shape for shape in cubes if math.prod(shape) <= largest]


def describe_shapes(chip: Chip) -> str:
    """What a chip's machines look like, in a line."""
    if chip.platform == "gpu":
        return "nodes × GPUs of a node, 8 at most"
    if chip.name in _LARGEST:
        return (
            "2x2x1, 2x2x2, 2x2x4, 2x4x4, and multiples of 4 in ascending order up to"
            f" {_LARGEST[chip.name]:,} chips"
        )
    return ", ".join("x".join(map(str, shape)) for shape in slice_shapes(chip))
