"""Bytes of a device's memory that a training step takes, by kind, at its worst moment.

Five moments can be the worst one; their terms are what XLA's programs hold then:

- 'loss': all saved activations, a chunk of logits, the gradient of the whole head in float32;
- 'between' the passes: the same activations and gradient, stacks that are laid out anew for the
  backward pass, and the zeros that it starts from;
- 'backward': the layers' gradients as far as they are stored, and what one layer works on: its
  gathered weights, its activations again, and their gradients;
- 'replicated': the same when only the replicated layers are left;
- 'update': gradients beside weights and moments.

Saved activations and stacks of gradients are whole from the first layer to the last: a loop over
layers neither grows nor frees them. The two platforms' compilers differ in what they schedule
early and what they copy; where they do, it is said. `experiments.benchmark --what=memory` sets the
sum beside what the compilers say.
"""

import dataclasses

import numpy as np

from baichuan_jax.config import listed, saved_names
from baichuan_jax.parallel.chips import Chip
from baichuan_jax.parallel.layout import Job, Layout, sizes

KINDS = {
    "weights": "float32 master weights",
    "optimizer": "AdamW's two moments",
    "held": "weights in the compute dtype, between layers",
    "gradients": "as they are stored, or add up",
    "activations": "saved for the backward pass",
    "ends": "head, embedding, their gradients, logits",
    "layer": "one layer's gathered weights, activations, gradients",
    "copies": "stacks that the compiler lays out anew",
}
MOMENTS = ("loss", "between", "backward", "replicated", "update")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Every number may be an array where the layout's layers are arrays.

    Attributes:
      moments: bytes by kind at each moment.
      host: bytes of offloaded activations in the host's memory, for each device.
    """

    moments: dict[str, dict[str, float]]
    host: float

    @property
    def peak(self):
        """Bytes at the worst moment."""
        totals = [sum(kinds.values()) for kinds in self.moments.values()]
        return np.maximum.reduce(np.broadcast_arrays(*totals))

    @property
    def worst(self) -> str:
        """The moment of the peak."""
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))


def memory(job: Job, layout: Layout, chip: Chip) -> Memory:
    """What a step takes on each device."""
    size, K, gpu = sizes(job.model, layout.mesh), layout.micro_batches, chip.platform == "gpu"
    model, tensor = job.shape, layout.mesh[2]
    D, F, L = model.hidden_size, model.intermediate_size, model.num_layers
    n = layout.tokens(job) / tensor  # a device's share of the activations of so many tokens
    matrices = tuple(size.layer.values())
    stored, shard, whole = (
        sum(getattr(matrix, stage) for matrix in matrices) for stage in ("stored", "shard", "whole")
    )
    replicated, hierarchical, full = layout.layers

    numbers = size.embedding.stored + size.head.stored + L * stored + size.gains
    state = {"weights": 4 * numbers, "optimizer": 8 * numbers}

    # Held between layers; gradients of several micro-batches add up in the same places.
    layers_held = replicated * whole + hierarchical * shard
    ends_held = 0
    if K > 1:
        ends_held = size.embedding.held(layout.embedding) + size.head.held(layout.head)
    held = job.compute * (layers_held + ends_held)

    saved = saved_names(layout.remat)
    offload = listed(layout.offload)
    if saved is None:  # the layer as XLA computes it; a part of it in float32
        kept = (16 * D + 6 * F) * job.compute
    else:
        kept = sum(job.activation(name) for name in {"input", *saved} - set(offload))
    kept = L * kept * n
    host = L * sum(job.activation(name) for name in offload) * n

    # Stacks of gradients that the loop over layers leaves, of one micro-batch, and their sums;
    # apart those of replicated layers, which are the first, and the last in the backward pass.
    if K == 1:
        sums, stacks, own = 0.0, 4 * L * stored, 0.0
    else:
        ends_summed = sum(
            job.gradient * matrix.held(placement) or 4 * matrix.stored
            for matrix, placement in (
                (size.embedding, layout.embedding),
                (size.head, layout.head),
            )
        )
        sums = job.gradient * layers_held + 4 * full * stored + ends_summed
        stacks = job.compute * hierarchical * shard + 4 * full * stored
        own = job.compute * replicated * whole

    # Gradients of the whole head and embedding in float32, before they are reduced over devices;
    # logits in float32 and their gradient, and a mask of the targets.
    head, embedding = 4 * size.head.whole, 4 * size.embedding.whole
    logits = min(layout.tokens(job), job.loss_chunk) * model.padded_vocab_size / tensor
    loss = job.compute * size.head.whole + (4 + job.compute + 1) * logits
    gathered = job.compute * whole
    reduced = 4 * max(matrix.whole for matrix in matrices)
    copies = masters = zeros = turning = twice = 0.0
    if gpu:
        layer = (7 * F + 11 * D) * job.compute * n
        # What is gathered along another dimension than the first is laid out anew: as it is
        # stored, once more where it is held, and when it is reduced. So are saved q, k and v where
        # attention goes by blocks, which have heads before tokens.
        turned = [matrix for matrix in matrices if matrix.turned]
        masters = 4 * L * sum(matrix.stored for matrix in turned)
        by_blocks = not chip.fused_attention and "qkv" in (saved or ())
        copies = masters + by_blocks * job.activation("qkv") * L * n
    else:
        layer = (2 * F + 13 * D) * job.compute * n
        if layout.mesh[0] > 1:
            loss += job.compute * size.head.whole  # gathered in two stages
    if gpu and tensor == 1:  # where XLA pipelines collectives (`flags.py`)
        # A layer's gathers begin in the layer before, its scatters end in the one after.
        gathered *= 1.2
        reduced += 4 * whole
        # Zeros are made early: those of the embedding's gradient before the passes, and in a loop
        # over micro-batches, of which the first or last is taken apart, twice, but for those of
        # ends that are gathered in it.
        zeros = embedding
        if K > 1:
            stacks = 2 * stacks
        if K > 2:
            twice = kept
            zeros = embedding * (1 if layout.embedding == "full" else 2)
            head = head * (1 if layout.head == "full" else 2)
        if K == 1:
            copies = copies + job.compute * sum(matrix.whole for matrix in turned) * replicated
        turning = 4 * size.head.whole if size.head.turned else 0.0
    if tensor > 1:  # what products gather, and their sums before they are scattered
        layer += 3 * D * job.compute * layout.tokens(job)
    working = gathered + reduced + layer
    end = head + zeros + (turning if ends_held else 0.0)
    others = replicated < L  # whose backward pass comes before that of the replicated layers
    summed = sums + stacks + np.where(others, 0, own)
    every = kept + twice
    moments = {
        "loss": {
            "held": held,
            "gradients": sums,
            "activations": every,
            "ends": head + zeros + max(loss, turning + head / 2),
        },
        "between": {
            "held": held,
            "gradients": summed,
            "activations": every,
            "ends": head + zeros + job.compute * size.head.whole,
            "copies": copies,
        },
        "backward": {
            "held": held,
            "gradients": summed,
            "activations": every,
            "ends": end,
            "layer": working,
            "copies": masters,
        },
        "replicated": {
            "held": held,
            "gradients": sums + stacks + own,
            "activations": kept * replicated / L + twice,
            "ends": end,
            "layer": working,
            "copies": masters,
        },
        "update": {
            "gradients": sums + 4 * numbers,
            "ends": 4 * (size.head.whole + size.embedding.whole),
        },
    }
    return Memory({name: state | kinds for name, kinds in moments.items()}, host)
