"""Compiling the training step for a machine that is not there (paper §2.7's 1,024 GPUs, a pod).

TPU programs are made by libtpu (`pip install -e '.[aot]'`), NVIDIA programs by JAX's CUDA plugin
(`pip install -e '.[cuda]'`). Neither needs a device, and JAX may run on the CPU beside it. A TPU
program that does not fit into memory is an error of the compiler; an NVIDIA one is compiled all the
same, and compared with the chip here. What only a device shows is not seen: speed, tuned matrix
products, and whether cuDNN takes a shape.
"""

import collections
import copy
import dataclasses
import itertools
import math
import os
import re
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import P
from jax.experimental import topologies
from jax.sharding import NamedSharding

from baichuan_jax.config import BATCH_AXES, TENSOR_AXIS, Config
from baichuan_jax.parallel import flags, memory
from baichuan_jax.parallel.chips import GIB, GPU_MEMORY_FRACTION, Chip
from baichuan_jax.parallel.layout import Job, Layout
from baichuan_jax.parallel.mesh import check_fit, make_mesh
from baichuan_jax.parallel.program import (
    Collective,
    Program,
    full_logits,
    overlapped_share,
    square_attention,
)
from baichuan_jax.parallel.topology import Topology, show
from baichuan_jax.parallel.traffic import traffic
from baichuan_jax.training import optimizer
from baichuan_jax.training import step as step_module

# libtpu's names of the chips that it calls otherwise.
_TPU_NAMES = {"v7x": "tpu7x"}


@dataclasses.dataclass(frozen=True)
class _Gpu:
    """What NVIDIA's compiler asks of a GPU: from data sheets and the CUDA C programming guide."""

    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    lanes: int  # float32 units of each
    shared: int  # bytes of shared memory of each; a block may have 1 KiB less
    cache: int  # bytes of L2 cache
    gigahertz: float
    links: int  # NVLinks


_GPUS = {
    "a100": _Gpu((8, 0), 108, 64, 164 << 10, 40 << 20, 1.41, 12),
    "a800": _Gpu((8, 0), 108, 64, 164 << 10, 40 << 20, 1.41, 8),
    "h100": _Gpu((9, 0), 132, 128, 228 << 10, 50 << 20, 1.98, 18),
    "h200": _Gpu((9, 0), 132, 128, 228 << 10, 50 << 20, 1.98, 18),
    "b200": _Gpu((10, 0), 148, 128, 228 << 10, 126 << 20, 1.965, 18),
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A training step, compiled for a topology.

    Attributes:
      seconds: that compiling took.
      peak: bytes of a device's memory, at the worst moment; of a TPU program that does not fit,
        what the compiler would have needed.
      arguments: bytes of it that weights, optimizer state and the batch take.
      fits: whether `peak` is within the chip's memory.
      choice: of the compiler's flags.
      text: the program, empty where a TPU's compiler gave up.
      error: the compiler's words in that case.
    """

    mesh: jax.sharding.Mesh
    seconds: float
    peak: float
    arguments: float
    fits: bool
    choice: flags.Choice
    text: str
    error: str = ""


def devices(topology: Topology) -> list[jax.Device]:
    """Devices to compile for; nothing can be put on them.

    Raises:
      ValueError: libtpu or the CUDA plugin is not installed, or does not know the chip; names the
        extra, or the chips that it knows.
    """
    return _tpus(topology) if topology.platform == "tpu" else _gpus(topology)


def _tpus(topology: Topology) -> list[jax.Device]:
    quiet = {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes on this machine may compile
        "TPU_SKIP_MDS_QUERY": "1",  # it would ask Google Cloud what machine this is
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # of this machine: any will do, but one must be
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    chip, shape = topology.chip.name, topology.shape
    name = f"{_TPU_NAMES.get(chip, chip)}:{'x'.join(map(str, shape))}"
    options = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if chip == "v4":  # both cores of a chip are one device, as they are by default at run time
        options |= {"chip_config_name": "megacore", "chips_per_host_bounds": [2, 2, 1]}
        options |= {"wrap": [True] * 3} if min(shape) >= 4 else {}
    elif shape == (1, 1):
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        return topologies.get_topology_desc(name, "tpu", **options).devices
    except RuntimeError as error:
        if "not installed" in str(error):
            raise ValueError(
                f"{topology.name}: programs for TPUs are made by libtpu, which is not installed:"
                " pip install -e '.[aot]'"
            ) from error
        raise ValueError(f"{topology.name}: libtpu says {error}") from error


def _gpus(topology: Topology) -> list[jax.Device]:
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # of a driver's version
    chip = topology.chip
    if chip.name not in _GPUS:
        raise ValueError(
            f"{topology.name}: what NVIDIA's compiler must know of a {chip.name} is not known here;"
            f" it is of {', '.join(_GPUS)}."
        )
    nodes, gpus = topology.shape
    try:
        return topologies.get_topology_desc(
            platform="cuda", target_config=_target(chip), topology=f"1x{nodes}x{gpus}"
        ).devices
    except NotImplementedError as error:
        raise ValueError(
            f"{topology.name}: programs for NVIDIA's GPUs are made by JAX's CUDA plugin, which is"
            " not installed: pip install -e '.[cuda]'"
        ) from error


def _target(chip: Chip) -> str:
    """The chip as XLA's `GpuTargetConfigProto`, in text form."""
    gpu = _GPUS[chip.name]
    major, minor = gpu.capability
    # Hopper and later have instructions of their own (wgmma), which run on no other generation.
    features = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    return f"""
        platform_name: "CUDA"
        device_description_str: "{chip.kinds[0]}"
        dnn_version_info {{ major: 9 minor: 10 }}
        gpu_device_info {{
          name: "{chip.kinds[0]}"
          cuda_compute_capability {{ major: {major} minor: {minor} {features} }}
          core_count: {gpu.cores}
          fpus_per_core: {gpu.lanes}
          clock_rate_ghz: {gpu.gigahertz}
          memory_bandwidth: {int(chip.bandwidth)}
          device_memory_size: {int(chip.memory / GPU_MEMORY_FRACTION)}
          l2_cache_size: {gpu.cache}
          shared_memory_per_core: {gpu.shared}
          shared_memory_per_block_optin: {gpu.shared - 1024}
          shared_memory_per_block: {48 << 10}
          device_interconnect_info {{ active_links: {gpu.links} }}
          threads_per_warp: 32
          threads_per_block_limit: 1024
          threads_per_core_limit: 2048
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          runtime_version: "12.8.0" driver_version: "13.0.0" compile_time_toolkit_version: "12.8.0"
          dnn_version: "9.10.0"
        }}"""


def compile_step(config: Config, topology: Topology) -> Compiled:
    """Compiles the training step of a run for a machine, as the loop would on it.

    Raises:
      ValueError: the mesh or the batch does not fit the machine, or the compiler for it is not
        installed; says what would be right.
    """
    training = config.training
    mesh = make_mesh(config.mesh, devices(topology))
    check_fit(mesh, config.model, training.batch_size // training.micro_batches)
    choice = flags.for_training(mesh)
    tx = optimizer.adamw(config.optimizer, training.num_steps)
    loss = step_module.pretraining_loss(config.model, training)
    state = step_module.abstract_state(config, tx, mesh)
    rows = NamedSharding(mesh, P(BATCH_AXES, None))
    shape = (training.batch_size, config.data.sequence_length)
    names = ("tokens_BT", "positions_BT", "segments_BT", "targets_BT")
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows) for name in names}
    batch["mask_BT"] = jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=rows)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    with jax.set_mesh(mesh):
        start = time.monotonic()
        lowered = step_module.compiled_step(config, loss, tx, choice.options).lower(
            state, number, batch
        )
        try:
            program = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            seconds, needed = time.monotonic() - start, _needed(str(error))
            return Compiled(mesh, seconds, needed, 0, False, choice, "", str(error))
    held = program.memory_analysis()
    return Compiled(
        mesh,
        time.monotonic() - start,
        peak=held.peak_memory_in_bytes,
        arguments=held.argument_size_in_bytes,
        fits=held.peak_memory_in_bytes <= topology.chip.memory,
        choice=choice,
        text=program.as_text(),
    )


def lines(config: Config, topology: Topology, compiled: Compiled) -> Iterator[str]:
    """What the compiler made, beside what the plan says of the same config."""
    job, layout = Job.of(config), Layout.of(config, topology.num_devices, topology.granules)
    planned, limit = float(memory.memory(job, layout, topology.chip).peak), topology.chip.memory
    mesh = dict(compiled.mesh.shape)
    yield f"{topology.name}, {show(layout.mesh)}: compiled in {compiled.seconds:.1f} s"
    yield from (f"  {line}" for line in compiled.choice.lines())
    yield (
        f"memory of a device: {compiled.peak / GIB:.2f} GiB by the compiler,"
        f" {planned / GIB:.2f} GiB by the plan ({planned / compiled.peak - 1:+.1%}); it has"
        f" {limit / GIB:.2f} GiB: {'fits' if compiled.fits else 'DOES NOT FIT'}"
    )
    if compiled.error:
        yield compiled.error.splitlines()[0]
        return
    yield f"of it {compiled.arguments / GIB:.2f} GiB are weights, optimizer state and the batch"
    program = Program(compiled.text)
    if topology.platform == "gpu" and program.collectives:
        yield from _traffic(program.collectives, traffic(job, layout), mesh)
    else:
        counts = collections.Counter()
        for one in program.collectives:
            counts[one.kind] += one.times
        shown = ", ".join(f"{times} × {kind}" for kind, times in counts.most_common())
        yield f"collectives: {shown or 'none'}"
    yield from _shapes(program, config, topology, mesh)


def _traffic(
    collectives: tuple[Collective, ...],
    formula: dict[tuple[str, str, str], float],
    mesh: dict[str, int],
) -> Iterator[str]:
    """Bytes by kind and mesh axes, the compiler's and the formula's, and what overlaps."""
    groups = collections.defaultdict(list)
    for collective in collectives:
        groups[" × ".join(collective.axes(mesh)), collective.kind].append(collective)
    expected = collections.Counter()
    for (_, axis, kind), moved in formula.items():
        expected[axis, kind] += moved
    yield f"{'collective':18} {'over':16} {'compiler':>11} {'formula':>11}  overlap  MB × times"
    for axes, kind in sorted(groups.keys() | expected.keys()):
        found = groups[axes, kind]
        sizes = collections.Counter()
        for one in sorted(found, key=lambda one: -one.total):
            sizes[f"{one.bytes / 1e6:.3g}"] += one.times
        parts = [f"{size} × {times}" for size, times in sizes.items()]
        parts = parts[:4] + ["…"] * (len(parts) > 4)
        total = sum(one.total for one in found)
        share = f"{overlapped_share(found):.1%}" if total else "-"
        yield (
            f"{kind:18} {axes:16} {total / 1e9:8.3f} GB {expected[axes, kind] / 1e9:8.3f} GB"
            f"  {share:>7}  {', '.join(parts)}"
        )
    weights = [one for one in collectives if TENSOR_AXIS not in one.axes(mesh)]
    shares = [
        f"{overlapped_share(some):.1%} of {what}"
        for some, what in ((weights, "the bytes of weights and gradients"), (collectives, "all"))
        if sum(one.total for one in some)
    ]
    yield f"overlap with matrix products: {', '.join(shares) or 'nothing is moved'}"


def _shapes(
    program: Program, config: Config, topology: Topology, mesh: dict[str, int]
) -> Iterator[str]:
    """Buffers that must not be: of full logits, and of T × T.

    Where a number of tokens is also a width of the model they cannot be told from weights; the step
    is then compiled once more, with rows of another length.
    """
    found = _forbidden(program, config, mesh)
    if any(found.values()) and not _apart(config, mesh):
        other = _with_other_rows(config, mesh)
        if not other:
            yield (
                f"buffers of {' and '.join(found)}: cannot be told from weights; another"
                " config.data.sequence_length shows them"
            )
            return
        yield (
            f"rows of {config.data.sequence_length:,} tokens look like weights: compiles once more,"
            f" with rows of {other.data.sequence_length:,}"
        )
        found = _forbidden(Program(compile_step(other, topology).text), other, mesh)
    for what, buffers in found.items():
        yield f"buffers of {what}: {', '.join(buffers) or 'none'}"


def _forbidden(program: Program, config: Config, mesh: dict[str, int]) -> dict[str, list[str]]:
    time, tokens = config.data.sequence_length, _tokens(config, mesh)
    vocabulary, tensor = config.model.padded_vocab_size, mesh[TENSOR_AXIS]
    return {
        "full logits": full_logits(program, tokens, vocabulary, tensor),
        "T × T": square_attention(program, time),
    }


def _tokens(config: Config, mesh: dict[str, int]) -> int:
    """Of a micro-batch, on a device and those that share its rows over `tensor`."""
    rows = config.training.batch_size // config.training.micro_batches
    return rows // math.prod(mesh[axis] for axis in BATCH_AXES) * config.data.sequence_length


def _apart(config: Config, mesh: dict[str, int]) -> bool:
    """Whether no number of tokens is a width of the model, or a part of one on the mesh."""
    parts = {
        math.prod(sizes) for n in range(4) for sizes in itertools.combinations(mesh.values(), n)
    }
    model = config.model
    widths = {size / n for size in (model.hidden_size, model.intermediate_size) for n in parts}
    return not widths & {config.data.sequence_length, _tokens(config, mesh)}


def _with_other_rows(config: Config, mesh: dict[str, int]) -> Config | None:
    """The config with shorter rows, whose tokens are no width; None where none were found."""
    other = copy.deepcopy(config)
    for eighths in (6, 7, 5):
        other.data.sequence_length = config.data.sequence_length * eighths // 8
        if _apart(other, mesh):
            return other
    return None


def _needed(error: str) -> float:
    """Bytes that a program would take, from libtpu's `… (17.78G) exceeds available HBM …`."""
    found = re.search(r"([\d.]+)([KMGT])\)? exceeds|Used ([\d.]+)([KMGT]) of", error)
    if not found:
        return float("nan")
    number, unit = found[1] or found[3], found[2] or found[4]
    return float(number) * GIB * 1024.0 ** ("KMGT".index(unit) - 2)
