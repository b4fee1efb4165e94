"""The compiler flags of training, per platform: all of them, in this one place.

They go with the training step as its compiler options, not with the process: other programs
(decoding, evaluation) keep XLA's defaults, and an unknown one can be found out before it does harm,
while in XLA_FLAGS it would abort the process. What a user sets in XLA_FLAGS or LIBTPU_INIT_ARGS
stands.

NVIDIA, by the share of collective bytes that overlap a matrix product in the compiled step of the
13B (`experiments/LOG.md`), on eight H200 with jaxlib 0.10.2: XLA's defaults 55 %; with pipelining
75 %; besides, with more than one collective under way and no barrier in the layers' checkpoint
(`prevent_cse=False`) 97 %. On 1,024 H100 that is 93 %, and 98 % with a cost model that knows the
network; on 1,024 A800 67 %, and 98 % with the cost model that XLA has for GPUs before Hopper. Left
out because it was worse: thresholds of 1 GB for combining collectives (58 %: a layer's gathers
become one, which nothing of that layer can hide), unrolling the loop over layers (82 %), double
buffering of it (1 GiB for 1 %), and `jax_optimization_level=O1`, which aborts in jaxlib 0.10.2 on
loops inside a layer.

TPU: the sets of MaxText that concern gathers and scatters in the layers' loop. They compile on
every generation and have not been timed by this project; libtpu 0.0.42 makes the same program of
the 13B on v5e:16x16 without them.

Before JAX starts, `prepare_process` and `describe_network` set what can only be set then.
"""

import dataclasses
import importlib.util
import os
import pathlib
import re

import jax
import numpy as np
from absl import logging
from jax import P
from jax.sharding import Mesh, NamedSharding

from baichuan_jax.config import TENSOR_AXIS
from baichuan_jax.parallel.chips import GPU_MEMORY_FRACTION, of_kind

Value = bool | int | str


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag of XLA or libtpu, what it is for, and the same of older versions."""

    name: str
    value: Value
    why: str
    older: "Flag | None" = None

    @property
    def all(self) -> tuple["Flag", ...]:
        """It and its older forms, the newest first."""
        return (self, *(self.older.all if self.older else ()))


def _pipeline(kind: str, why: str) -> Flag:
    older = Flag(f"xla_gpu_enable_pipelined_{kind}", True, why)  # jaxlib 0.10
    return Flag(f"xla_gpu_pipeline_{kind}", "COLLECTIVE_PIPELINING_MODE_ON", why, older)


_GPU = (
    Flag("xla_gpu_enable_latency_hiding_scheduler", True, "starts collectives early, ends late"),
    Flag(
        *("xla_gpu_experimental_parallel_collective_overlap_limit", 8),
        "a collective may start before the one before it has ended",
    ),
    Flag(
        *("xla_gpu_memory_limit_slop_factor", round(100 * GPU_MEMORY_FRACTION / 0.8)),
        "percent of 80 % of the memory: a schedule that takes more gives up hiding collectives",
    ),
)
# What the scheduler's cost model takes a network for; only XLA_FLAGS can say it, and jaxlib 0.10 to
# 0.12 know it. Without it the scatters of one stage wait for those of the other: 51 % instead of
# 96 % of the bytes overlap on 1,024 H100 where the layers' products are saved.
_NETWORK = "xla_gpu_analytical_latency_estimator_options"
_NETWORK_OPTIONS = "nccl_op_launch_us=10,chunk_prep_us=1,rtt_us=5,chunk_size_bytes=4194304"
# Not with tensor parallelism: XLA would move gathers of recomputed activations, too, and attend
# twice for it (and scatter a fifth more over `tensor`).
_GPU_PIPELINING = (
    _pipeline("all_gather", "a layer's gathers run in the layer before"),
    _pipeline("reduce_scatter", "its scatters in the layer after"),
    _pipeline("all_reduce", "the same where gradients are not divided"),
)
_TPU = (
    Flag("xla_tpu_enable_async_collective_fusion", True, "gathers run in steps beside products"),
    Flag("xla_tpu_enable_async_collective_fusion_fuse_all_gather", True, "those of weights, too"),
    Flag("xla_tpu_enable_async_collective_fusion_multiple_steps", True, "over several products"),
    Flag("xla_tpu_overlap_compute_collective_tc", True, "products and collectives share the core"),
    Flag("xla_enable_async_all_gather", True, "gathers have a start and an end"),
    Flag("xla_tpu_enable_data_parallel_all_reduce_opt", True, "gradients reduce as they arise"),
    Flag("xla_tpu_data_parallel_opt_different_sized_ops", True, "of whatever size they are"),
    Flag("xla_tpu_use_minor_sharding_for_major_trivial_input", True, "layouts that scatter fast"),
    Flag("xla_tpu_relayout_group_size_threshold_for_reduce_scatter", 1, "for groups of any size"),
    Flag("xla_tpu_assign_all_reduce_scatter_layout", True, "scatters choose the layout"),
    Flag(
        *("xla_jf_spmd_threshold_for_windowed_einsum_mib", 1_000_000),
        "gathers stay whole instead of becoming many small steps inside a product",
    ),
)
# Hopper and Blackwell have a better one by default. Later versions abort with it, and need it less.
_AMPERE = Flag("xla_gpu_enable_analytical_latency_estimator", True, "a cost model of this GPU")


@dataclasses.dataclass(frozen=True)
class Choice:
    """What is used of the flags for a device.

    Attributes:
      flags: what to compile with.
      users: names that the user has set.
      unknown: names that this compiler does not have.
    """

    flags: tuple[Flag, ...] = ()
    users: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    @property
    def options(self) -> dict[str, Value]:
        """For `jax.jit(compiler_options=…)`."""
        return {flag.name: flag.value for flag in self.flags}

    def lines(self) -> list[str]:
        """To print: what is set and why, and what was left out."""
        return [
            *(f"{flag.name}={flag.value}: {flag.why}" for flag in self.flags),
            *(f"{name}: as you set it" for name in self.users),
            *(f"{name}: left out, this compiler has no such flag" for name in self.unknown),
        ]


def for_training(mesh: Mesh) -> Choice:
    """The flags for a training step on a mesh, checked with its compiler; a second at most.

    The devices may be those of a topology (`training.ahead`). On a CPU there are none, and
    nothing is done.
    """
    device = next(one for one in mesh.devices.flat if one.process_index == jax.process_index())
    set_by_user = _set_by_user()
    used, users, unknown = [], [], []
    for flag in for_device(device.platform, device.device_kind, mesh.shape[TENSOR_AXIS]):
        theirs = [one.name for one in flag.all if one.name in set_by_user]
        known = [] if theirs else [one for one in flag.all if _accepts(one, device)]
        used += known[:1]
        users += theirs
        unknown += [] if theirs or known else [flag.name]
    return Choice(tuple(used), tuple(users), tuple(unknown))


def for_device(platform: str, kind: str, tensor: int = 1) -> tuple[Flag, ...]:
    """The flags for a training step on such a device; none for a CPU (see `model/cpu.py`)."""
    if platform != "gpu":
        return _TPU if platform == "tpu" else ()
    ampere = re.search("A100|A800", kind) and jax.__version_info__ < (0, 11)
    return (*_GPU, *(_GPU_PIPELINING if tensor == 1 else ()), *((_AMPERE,) if ampere else ()))


def _accepts(flag: Flag, device: jax.Device) -> bool:
    """Whether the device's compiler knows it, by compiling next to nothing with it."""
    alone = Mesh(np.array([device]), ("alone",))
    scalar = jax.ShapeDtypeStruct((), "float32", sharding=NamedSharding(alone, P()))
    try:
        with jax.set_mesh(alone):
            program = jax.jit(lambda x: x).lower(scalar)
        program.compile(compiler_options={flag.name: flag.value})
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" in str(error):
            return False
        raise
    return True


def _set_by_user() -> set[str]:
    """Names of the flags in XLA_FLAGS (or in the file that it names) and LIBTPU_INIT_ARGS."""
    text = os.environ.get("XLA_FLAGS", "")
    if text and not text.lstrip().startswith("-") and os.path.isfile(text):
        text = pathlib.Path(text).read_text(encoding="utf-8")
    text += " " + os.environ.get("LIBTPU_INIT_ARGS", "")
    return set(re.findall(r"--?(\w+)", text))


def prepare_process() -> None:
    """Environment for training on NVIDIA's GPUs; before JAX starts. What the user has set stands.

    Does nothing without JAX's CUDA plugin.
    """
    if not importlib.util.find_spec("jax_plugins"):
        return
    paths = pathlib.Path("/proc/driver/nvidia/gpus").glob("*/information")
    models = re.findall(r"Model:\s*(.*\S)", "".join(path.read_text() for path in paths))
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": str(GPU_MEMORY_FRACTION)}
    if any(re.search("A100|A800|H100|H200", model) for model in models):
        # One queue of work: collectives start in the order of the schedule. Not for Blackwell.
        environment["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    for name, value in environment.items():
        logging.info("%s=%s", name, os.environ.setdefault(name, value))
    chip = of_kind(models[0]) if models else None
    describe_network(len(models) or 8, chip.across.bandwidth if chip else 50e9)


def describe_network(gpus: int, bandwidth: float) -> None:
    """Tells XLA's cost model of NVIDIA's GPUs the network; before JAX starts.

    Does nothing without JAX's CUDA plugin, or where the user has told it.

    Args:
      gpus: of a node.
      bandwidth: bytes/s that one of them has to other nodes, one way.
    """
    given = os.environ.get("XLA_FLAGS", "")
    is_file = given and not given.lstrip().startswith("-")
    known = importlib.util.find_spec("jax_plugins") and jax.__version_info__ < (0, 13)
    if known and not is_file and _NETWORK not in _set_by_user():
        speed = f"gpus_per_node={gpus},nic_speed_gbps={8e-9 * bandwidth:g}"
        flag = f"--{_NETWORK}={speed},{_NETWORK_OPTIONS}"
        os.environ["XLA_FLAGS"] = f"{given} {flag}".strip()
        logging.info("XLA_FLAGS: %s", flag)
