"""Where parameters and optimizer state live between uses (paper §2.7).

The model says how a weight is split over `tensor` while it is computed with. Here one
more dimension is split over `fsdp` while it is stored, so that weights, gradients and
optimizer state of ZeRO-3 are each held once per `replica`. Before a layer uses a
weight, `jax.reshard` gathers it; the transpose of that reduces and scatters its
gradient.
"""

import jax
from flax import nnx
from jax import P
from jax.sharding import NamedSharding

FSDP_AXIS = "fsdp"


def stored_spec(spec: P, shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> P:
    """The spec a weight is stored with: `fsdp` joins the largest dimension that it divides.

    Norm gains (one dimension) stay whole, and so does a matrix no dimension of which
    divides. `shape` may have more dimensions in front (stacked layers), which stay whole.
    """
    stacked = len(shape) - len(spec)
    full = [None] * stacked + list(spec)
    size = mesh.shape[FSDP_AXIS]
    candidates = [
        (shape[axis], -axis)
        for axis in range(stacked, len(shape))
        if full[axis] is None and shape[axis] % size == 0
    ]
    if len(spec) > 1 and candidates:
        full[-max(candidates)[1]] = FSDP_AXIS
    return P(*full)


def shardings(model: nnx.Module, mesh: jax.sharding.Mesh) -> nnx.Module:
    """The model's tree with a `NamedSharding` in place of each array."""

    def one(param: nnx.Param) -> nnx.Param:
        spec = stored_spec(param.spec, param.shape, mesh)
        return param.replace(NamedSharding(mesh, spec))

    return jax.tree.map(one, model, is_leaf=lambda x: isinstance(x, nnx.Variable))
