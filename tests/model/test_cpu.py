import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baichuan_jax.model import cpu

# equation, shape of x, shape of w: the projections of a block
PROJECTIONS = [
    ("btd,df->btf", (2, 6, 16), (16, 24)),
    ("btd,dnhk->btnhk", (2, 6, 16), (16, 3, 4, 4)),
    ("bthk,hkd->btd", (2, 6, 4, 4), (4, 4, 16)),
]


def _gradients(multiply, x, w, cotangent):
    y, pull = jax.vjp(multiply, x, w)
    return y, *pull(cotangent)


def _inputs(equation, x_shape, w_shape, dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], x_shape, dtype)
    w = jax.random.normal(keys[1], w_shape, dtype)
    y = jax.eval_shape(lambda x, w: jnp.einsum(equation, x, w), x, w)
    return x, w, jax.random.normal(keys[2], y.shape, dtype)


@pytest.mark.parametrize("equation, x_shape, w_shape", PROJECTIONS)
def test_float32_equals_autodiff(equation, x_shape, w_shape):
    inputs = _inputs(equation, x_shape, w_shape, jnp.float32)
    got = jax.jit(lambda *a: _gradients(lambda x, w: cpu.projection(equation, x, w), *a))(*inputs)
    want = _gradients(lambda x, w: jnp.einsum(equation, x, w), *inputs)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("equation, x_shape, w_shape", PROJECTIONS)
def test_bfloat16_rounds_once(equation, x_shape, w_shape):
    inputs = _inputs(equation, x_shape, w_shape, jnp.bfloat16)
    got = jax.jit(lambda *a: _gradients(lambda x, w: cpu.projection(equation, x, w), *a))(*inputs)
    exact = [a.astype(jnp.float32) for a in inputs]
    want = _gradients(lambda x, w: jnp.einsum(equation, x, w), *exact)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == jnp.bfloat16
        # half a unit in the last of bfloat16's eight bits, and float32's order of summation
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=2**-8, atol=1e-5)


def test_a_float32_master_weight_gets_an_unrounded_gradient():
    equation = "btd,df->btf"
    x, w, cotangent = _inputs(equation, (2, 6, 16), (16, 24), jnp.bfloat16)
    master = w.astype(jnp.float32)
    y, dx, dw = _gradients(lambda x, w: cpu.projection(equation, x, w), x, master, cotangent)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    want = jnp.einsum("btd,btf->df", x.astype(jnp.float32), cotangent.astype(jnp.float32))
    np.testing.assert_allclose(dw, want, rtol=1e-6, atol=1e-5)


def test_on_an_explicit_mesh_gradients_are_sharded_like_their_operands():
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8")
    mesh = jax.make_mesh(
        (2, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Explicit,) * 2
    )
    equation = "btf,fd->btd"  # sums over the sharded F: the case that needs out_sharding
    x, w, cotangent = _inputs(equation, (4, 6, 24), (24, 16), jnp.float32)
    want = _gradients(lambda x, w: jnp.einsum(equation, x, w), x, w, cotangent)
    with jax.set_mesh(mesh):
        y_spec = jax.P("fsdp", None, None)
        x, w, cotangent = (
            jax.device_put(a, jax.NamedSharding(mesh, spec))
            for a, spec in (
                (x, jax.P("fsdp", None, "tensor")),
                (w, jax.P("tensor", None)),
                (cotangent, y_spec),
            )
        )
        multiply = lambda x, w: cpu.projection(equation, x, w, y_spec)  # noqa: E731
        got = jax.jit(lambda *a: _gradients(multiply, *a))(x, w, cotangent)
    for a, b, like in zip(got, want, (cotangent, x, w), strict=True):
        assert a.sharding.is_equivalent_to(like.sharding, a.ndim)
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-5)
