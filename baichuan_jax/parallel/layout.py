"""What the planner decides about a run, and the sizes that this gives each device (paper §2.7).

A `Job` is what is trained and does not depend on the machine. A `Layout` is everything that does:
mesh shape, micro-batches, rematerialisation, and where each group of layers is held. `Sizes` are
the parameters of a device in the stages of `parallel.zero`, counted on the model itself, so that
dimensions that do not divide are counted as they are stored.
"""

import dataclasses
import functools
import math

import jax
import numpy as np

from baichuan_jax.config import PLACEMENTS, Config, ModelConfig
from baichuan_jax.model.transformer import Transformer
from baichuan_jax.parallel import zero
from baichuan_jax.parallel.mesh import mesh_shape
from baichuan_jax.parallel.topology import AXES, MeshShape

_BYTES = {"bfloat16": 2, "float32": 4}

# Fields of a config that a layout stands for.
FIELDS = (
    *(f"mesh.{axis}" for axis in AXES),
    *("training.micro_batches", "training.remat", "training.offload"),
    *("zero.embedding", "zero.replicated_layers", "zero.full_layers", "zero.head"),
)


@dataclasses.dataclass(frozen=True)
class Job:
    """What is trained.

    Attributes:
      model: fields of `ModelConfig` in their order, which a cache can take.
      rows: of one optimizer step over all devices, of `time` tokens each.
      loss_chunk: tokens whose logits exist at one time on a device.
      compute: bytes of a number of the forward and backward pass.
      gradient: bytes of a number in which gradients add up and are reduced.
    """

    model: tuple
    rows: int
    time: int
    loss_chunk: int
    compute: int = 2
    gradient: int = 4

    @classmethod
    def of(cls, config: Config) -> "Job":
        training = config.training
        return cls(
            dataclasses.astuple(config.model),
            training.batch_size,
            config.data.sequence_length,
            training.loss_chunk,
            _BYTES[training.compute_dtype],
            _BYTES[config.zero.gradient_dtype],
        )

    @functools.cached_property
    def shape(self) -> ModelConfig:
        return ModelConfig(*self.model)

    def activation(self, name: str) -> int:
        """Bytes of a token of a named activation (config.ACTIVATIONS) of one layer, all of it."""
        D, F = self.shape.hidden_size, self.shape.intermediate_size
        numbers = {"input": D, "qkv": 3 * D, "attention": D, "attention_out": D, "gate_up": 2 * F}
        return numbers[name] * self.compute

    @property
    def tokens(self) -> int:
        """Of one optimizer step."""
        return self.rows * self.time


@dataclasses.dataclass(frozen=True)
class Layout:
    """How it is trained on a machine.

    Attributes:
      mesh: sizes of (replica, fsdp, tensor).
      micro_batches: of one optimizer step.
      remat, offload: as in `TrainingConfig`.
      embedding, head: one of PLACEMENTS.
      layers: how many are replicated, hierarchical, full, in this order. Each may be an array, of
        which every element is a layout of its own.
    """

    mesh: MeshShape
    micro_batches: int
    remat: str
    offload: str
    embedding: str
    layers: tuple
    head: str

    @classmethod
    def of(cls, config: Config, num_devices: int, granules: int = 1) -> "Layout":
        """The layout that a config asks for.

        Args:
          granules: nodes or slices of the machine, for the message.

        Raises:
          ValueError: its mesh does not fit so many devices; names some that do.
        """
        zero_config, layers = config.zero, config.model.num_layers
        first, last = zero_config.replicated_layers, zero_config.full_layers
        return cls(
            mesh_shape(config.mesh, num_devices, granules),
            config.training.micro_batches,
            config.training.remat,
            config.training.offload,
            zero_config.embedding,
            (first, layers - first - last, last),
            zero_config.head,
        )

    @property
    def settings(self) -> dict[str, int | str]:
        """The layout as fields of a config: FIELDS, in their order."""
        first, _, last = map(int, self.layers)
        zero_fields = (self.embedding, first, last, self.head)
        values = (*self.mesh, self.micro_batches, self.remat, self.offload, *zero_fields)
        return dict(zip(FIELDS, values, strict=True))

    def apply(self, config: Config) -> None:
        """Writes the layout into a config."""
        for field, value in self.settings.items():
            section, name = field.split(".")
            setattr(getattr(config, section), name, value)

    def take(self, index) -> "Layout":
        """Of an array of layouts some, or one."""
        layers = tuple(count[index] for count in self.layers)
        one = np.ndim(index) == 0
        return dataclasses.replace(self, layers=tuple(map(int, layers)) if one else layers)

    def rows(self, job: Job) -> int:
        """Of one micro-batch, for each device and those that share its rows over `tensor`."""
        replica, fsdp, _ = self.mesh
        return job.rows // self.micro_batches // (replica * fsdp)

    def tokens(self, job: Job) -> int:
        """In these rows."""
        return self.rows(job) * job.time


@dataclasses.dataclass(frozen=True)
class Matrix:
    """Numbers of one matrix that a device has, stage by stage (see `zero.Route`).

    Attributes:
      stored: of the master weight.
      shard: after the gather over `replica`.
      whole: after that over `fsdp`, too: what it computes with.
      copies: devices along (`replica`, `fsdp`) that store the same numbers, because no dimension
        could be divided over them: 1 unless sizes are odd.
      turned: whether it is another dimension than the first that (`replica`, `fsdp`) divide. A
        gather then lays its pieces beside each other, and XLA turns them.
    """

    stored: int
    shard: int
    whole: int
    copies: tuple[int, int]
    turned: bool

    def held(self, placement: str) -> int:
        """Numbers that are held between layers in this placement."""
        return (self.whole, self.shard, 0)[PLACEMENTS.index(placement)]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The model on one device: matrices of the embedding, of one layer by name, of the head."""

    embedding: Matrix
    layer: dict[str, Matrix]
    head: Matrix
    gains: int  # of all norms; whole on every device

    def total(self, stage: str, num_layers: int) -> int:
        """Numbers of all matrices: 'stored', 'shard' or 'whole'."""
        layer = sum(getattr(matrix, stage) for matrix in self.layer.values())
        ends = getattr(self.embedding, stage) + getattr(self.head, stage)
        return ends + num_layers * layer


@functools.cache
def sizes(model: tuple, mesh_shape: MeshShape) -> Sizes:
    """The sizes of `Job.model` on a mesh, by the specs of `parallel.zero`; nothing is allocated."""
    mesh = jax.sharding.AbstractMesh(mesh_shape, AXES)
    shapes = _abstract(model)

    def matrix(param) -> Matrix:
        spec, shape = param.spec, param.shape[param.ndim - len(param.spec) :]
        stored = zero.stored_spec(spec, shape, mesh)
        axes = [name for entry in stored for name in zero.axes_of(entry)]

        def count(without: tuple[str, ...]) -> int:
            parts = math.prod(mesh.shape[axis] for axis in axes if axis not in without)
            return math.prod(shape) // parts

        copies = tuple(1 if axis in axes else mesh.shape[axis] for axis in AXES[:2])
        divided = set(AXES[:2]) & set(axes)
        turned = bool(divided) and not divided & set(zero.axes_of(stored[0]))
        return Matrix(count(()), count(AXES[:1]), count(AXES[:2]), copies, turned)

    layers = shapes.layers
    layer = {
        "qkv": layers.attention.qkv,
        "out": layers.attention.out,
        "gate_up": layers.mlp.gate_up,
        "down": layers.mlp.down,
    }
    gains = (shapes.norm.gain, layers.attention_norm.gain, layers.mlp_norm.gain)
    return Sizes(
        matrix(shapes.embedding),
        {name: matrix(param) for name, param in layer.items()},
        matrix(shapes.head),
        sum(gain.size for gain in gains),
    )


@functools.cache
def _abstract(model: tuple) -> Transformer:
    config = ModelConfig(*model)
    return jax.eval_shape(lambda: Transformer(jax.random.key(0), config))
