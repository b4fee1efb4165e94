"""A quantised weight: its errors, NF4 beside bitsandbytes, meshes, temporary memory."""

import contextlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

from baichuan_jax.config import BATCH_AXES, MeshConfig
from baichuan_jax.model.quantized import KINDS, quantize_array
from baichuan_jax.model.transformer import einsum
from baichuan_jax.parallel.mesh import make_mesh
from tests.goldens import make_nf4

WHOLE = P(None, None)
run = jax.jit(quantize_array, static_argnums=(1, 2, 3))
full = jax.jit(lambda weight, dtype: weight.dequantize(dtype), static_argnums=1)


def relative_error(actual, expected) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("kind", "least", "most"),
    [
        ("int8", 0.004, 0.01),
        ("nf4", 0.08, 0.1),
        ("int4", 0.09, 0.13),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_error_on_normal_weights(kind, least, most, dtype):
    weight = jnp.asarray(np.random.default_rng(0).standard_normal((256, 3, 40)), dtype)
    small = run(weight, 1, kind, P(None, None, None))
    assert least < relative_error(full(small, jnp.float32), weight) < most


def test_integers_are_those_of_float64():
    weight = np.random.default_rng(1).standard_normal((192, 5)).astype(np.float32)
    exact = weight.astype(np.float64)
    int8 = run(weight, 1, "int8", WHOLE)
    top = np.abs(exact).max(0)
    np.testing.assert_allclose(int8.scales[0], top / 127, rtol=1e-6)
    np.testing.assert_array_equal(int8.values, np.round(exact * 127 / top))
    int4 = run(weight, 1, "int4", WHOLE)
    blocks = exact.reshape(3, 64, 5)
    top = np.abs(blocks).max(1)
    np.testing.assert_allclose(int4.scales, top / 7, rtol=1e-6)
    codes = np.stack([int4.values >> 4, int4.values & 15], 1).reshape(192, 5)
    np.testing.assert_array_equal(codes, np.round(blocks * 7 / top[:, None]).reshape(192, 5) + 8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_inputs", [1, 2, 37, 64, 65, 130])
def test_each_channel_and_block_stands_for_itself(kind, num_inputs):
    weight = np.random.default_rng(2).standard_normal((num_inputs, 3)).astype(np.float32)
    small = full(run(weight, 1, kind, WHOLE), jnp.float32)
    changed = weight.copy()
    changed[:, 0] *= 1e6
    changed[64:, 1] *= 1e-6
    result = full(run(changed, 1, kind, WHOLE), jnp.float32)
    assert result.shape == weight.shape
    np.testing.assert_array_equal(result[:, 2], small[:, 2])
    if kind != "int8":
        np.testing.assert_array_equal(result[:64, 1], small[:64, 1])
    # The largest of a block comes back, each number within half a step.
    for start in range(0, num_inputs, num_inputs if kind == "int8" else 64):
        block = weight[start:][: num_inputs if kind == "int8" else 64]
        top = np.abs(block).max(0)
        step = {"int8": 1 / 127, "int4": 1 / 7, "nf4": 1 - 0.6961928}[kind]
        off = np.abs(np.asarray(small)[start : start + len(block)] - block)
        assert np.all(off <= top * step / 2 * 1.0001)


def test_input_dimensions_are_one_axis():
    weight = np.random.default_rng(3).standard_normal((8, 16, 5)).astype(np.float32)
    for kind in KINDS:
        small = run(weight, 2, kind, P(None, None, None))
        flat = run(weight.reshape(128, 5), 1, kind, WHOLE)
        np.testing.assert_array_equal(small.values, flat.values)
        back = full(small, jnp.float32)
        np.testing.assert_array_equal(back, full(flat, jnp.float32).reshape(8, 16, 5))


def test_zeros_stay_zeros():
    for kind in KINDS:
        small = run(jnp.zeros((128, 4), jnp.bfloat16), 1, kind, WHOLE)
        assert not np.any(full(small, jnp.float32)) and not np.any(small.scales)


@pytest.mark.parametrize("name", make_nf4.weights())
def test_nf4_equals_bitsandbytes(name):
    golden = np.load(Path(make_nf4.__file__).with_name("nf4.npz"))
    check_nf4(name, {key: golden[key] for key in golden})


@pytest.mark.oracle
@pytest.mark.parametrize("name", make_nf4.weights())
def test_nf4_equals_bitsandbytes_live(name):
    check_nf4(name, make_nf4.quantized())


def check_nf4(name, golden):
    weight = make_nf4.weights()[name]
    small = run(jnp.asarray(weight.T), 1, "nf4", WHOLE)
    np.testing.assert_array_equal(np.asarray(small.values).T, golden[f"{name}.codes"])
    np.testing.assert_array_equal(np.asarray(small.scales).T, golden[f"{name}.scales"])
    values = golden[f"{name}.values"]
    np.testing.assert_array_equal(np.asarray(full(small, jnp.float32)).T, values)
    rounded = values.astype(jnp.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(full(small, jnp.bfloat16), np.float32).T, rounded)


MATRICES = {  # shape, input dimensions, spec, equation, spec of the operand and of the result
    "qkv": ((64, 3, 8, 8), 1, P(None, None, "tensor", None), "btd,dchk->btchk",
            P(BATCH_AXES), P(BATCH_AXES, None, None, "tensor", None)),
    "out": ((8, 64, 32), 2, P("tensor", None, None), "bthk,hkd->btd",
            P(BATCH_AXES, None, "tensor"), P(BATCH_AXES, None, None)),
    "down": ((512, 24), 1, P("tensor", None), "btf,fd->btd",
             P(BATCH_AXES, None, "tensor"), P(BATCH_AXES, None, None)),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mesh", [(1, 1, 8), (2, 2, 2)])
@pytest.mark.parametrize("name", MATRICES)
def test_on_a_mesh(name, mesh, kind):
    shape, num_inputs, spec, equation, x_spec, y_spec = MATRICES[name]
    rng = np.random.default_rng(4)
    weight = rng.standard_normal(shape).astype(np.float32)
    x = rng.standard_normal((4, 2, *shape[:num_inputs])).astype(np.float32)
    single = run(weight, num_inputs, kind, spec)
    expected = np.einsum(equation, x, np.asarray(full(single, jnp.float32)))

    @jax.jit
    def multiply(x, weight):
        w = weight.dequantize(jnp.float32, after=x)
        return einsum(equation, x, w, y_spec), w

    with jax.set_mesh(make_mesh(MeshConfig(*mesh))):
        small = run(weight, num_inputs, kind, spec)
        y, w = multiply(jax.device_put(x, x_spec), small)
        assert w.sharding.spec == spec
        # Each device holds its part only.
        parts = mesh[2]
        assert small.values.addressable_shards[0].data.size * parts == small.values.size
        shared = kind == "int8" and spec[0] == "tensor"
        held = small.scales.addressable_shards[0].data.size
        assert held * (1 if shared else parts) == small.scales.size
    np.testing.assert_array_equal(small.values, single.values)
    np.testing.assert_array_equal(small.scales, single.scales)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-4)


def test_a_mesh_must_not_split_a_block():
    weight = jnp.ones((8 * 72, 4))
    with jax.set_mesh(make_mesh(MeshConfig(1, 1, 8))):
        assert run(weight, 1, "int8", P("tensor", None)).values.shape == (576, 4)
        for kind in ("nf4", "int4"):
            with pytest.raises(ValueError, match="tensor=8 splits its 576 inputs inside a block"):
                run(weight, 1, kind, P("tensor", None))


@pytest.mark.parametrize("devices", [0, 1, 8])  # 0: without a mesh
@pytest.mark.parametrize(("kind", "loop"), [("int8", False), ("nf4", True), ("int4", True)])
def test_one_layer_at_a_time_is_dequantised(kind, loop, devices):
    num_layers, size = 6, 512
    mesh = make_mesh(MeshConfig(1, 1, devices), jax.devices()[:devices]) if devices else None

    def layers(x, weights, tied):
        for weight in weights:
            w = weight.dequantize(x.dtype, after=x if tied else None)
            x = jnp.tanh(einsum("btd,df->btf", x, w, P(BATCH_AXES, None, None)))
        return x

    def decode(x, weights, tied):
        def step(carry):
            return carry[0] + 1, layers(carry[1], weights, tied)

        return jax.lax.while_loop(lambda carry: carry[0] < 4, step, (0, x))[1]

    def temporary(tied) -> float:
        """Bytes on a device, in layers of full precision."""
        function = jax.jit(decode if loop else layers, static_argnums=2)
        x = jnp.ones((1, 1, size))
        x = x if mesh is None else jax.device_put(x, P(BATCH_AXES, None, None))
        weight = run(jnp.eye(size) * 0.5, 1, kind, P("tensor", None))
        compiled = function.lower(x, [weight] * num_layers, tied).compile()
        used = compiled.memory_analysis().temp_size_in_bytes
        return used / (4 * size * size / max(devices, 1))

    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        assert temporary(tied=True) < 2
        # What it is there for; when this fails, XLA has become wiser and `after` may go.
        assert temporary(tied=False) > num_layers - 1


def test_activations_without_a_number_leave_the_weight_alone():
    small = run(jnp.eye(64), 1, "nf4", WHOLE)
    for value in (jnp.nan, jnp.inf, -jnp.inf, 0.0):
        after = jnp.full((2, 3), value)
        result = jax.jit(lambda w, after: w.dequantize(jnp.float32, after))(small, after)
        np.testing.assert_array_equal(result, np.eye(64))
