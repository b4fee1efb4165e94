"""Attention of 32,768 tokens, forward and backward, compiled for machines that are not here."""

import jax
import jax.numpy as jnp
import pytest

from baichuan_jax.model.attention import Packed, attention
from baichuan_jax.model.position import alibi_slopes
from baichuan_jax.parallel import topology
from baichuan_jax.training import ahead

pytestmark = pytest.mark.aot
T, K = 32_768, 128
KERNELS = {"tpu": "splash_mha", "gpu": "__cudnn$fmhaSoftmaxBackward"}


@pytest.mark.parametrize(("position", "heads"), [("rope", 32), ("alibi", 40)])
@pytest.mark.parametrize("machine", ["v5e:1x1", "v5p:2x2x1", "v6e:1x1", "h200:1x1"])
def test_no_buffer_of_all_pairs(machine, position, heads):
    device = ahead.devices(topology.parse(machine))[0]
    mesh = jax.sharding.Mesh([device], ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    here = jax.sharding.NamedSharding(mesh, jax.P("data"))
    x = jax.ShapeDtypeStruct((1, T, heads, K), jnp.bfloat16, sharding=here)
    where = jax.ShapeDtypeStruct((1, T), jnp.int32, sharding=here)

    def total(q, k, v, positions, segments):
        slopes = jnp.asarray(alibi_slopes(heads)) if position == "alibi" else None
        out = attention(q, k, v, positions, Packed(segments), slopes)
        return jnp.square(out.astype(jnp.float32)).sum()

    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
        compiled = gradient.lower(x, x, x, where, where).compile()
    text = compiled.as_text()
    assert KERNELS[device.platform] in text
    assert f"{T},{T}" not in text
    # Not even those of one head in float32 would have room.
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * T * T
