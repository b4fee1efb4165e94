"""Each kernel that a CPU can run, the TPU's interpreted, beside the dense float64 reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baichuan_jax.model.kernels import blockwise, splash
from baichuan_jax.model.position import alibi_slopes
from tests.model.kernels import dense

B, T, H, K = 2, 200, 2, 128  # of which 1/√K is no power of two
NAMES = ("output", "dq", "dk", "dv")
KERNELS = {
    "blockwise": blockwise.attention,
    "splash": functools.partial(splash.attention, interpret=True),
}
each_kernel = pytest.mark.parametrize("kernel", KERNELS)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK", 64)


def inputs(dtype):
    rng = np.random.default_rng(0)
    qkvd = rng.standard_normal((4, B, T, H, K))
    return [jnp.asarray(x, dtype) for x in qkvd], *dense.packed(B, T, rng)


def biased(position):
    return alibi_slopes(H) if position == "alibi" else np.zeros(H, np.float32)


def run(kernel, position, dtype):
    (q, k, v, d_out), positions, segments = inputs(dtype)
    slopes = biased(position) if position == "alibi" else None
    apply = functools.partial(
        KERNELS[kernel], positions_BT=positions, segments_BT=segments, slopes_H=slopes
    )
    out, transpose = jax.vjp(apply, q, k, v)
    assert not np.asarray(out)[segments == 0].any()
    return out, *transpose(d_out)


def exact(position, dtype):
    """The reference on the same rounded numbers."""
    (q, k, v, d_out), positions, segments = inputs(dtype)
    where = (positions, positions, segments, segments)
    return dense.attention(q, k, v, *where, biased(position), d_out)


def plain(position, dtype):
    """What a user would write: whole logits in float32, probabilities rounded to `dtype`."""
    (q, k, v, d_out), positions, segments = inputs(dtype)
    distance = positions[:, None] - positions[:, :, None]
    bias = jnp.asarray(biased(position)[:, None, None] * distance[:, None], jnp.float32)
    seen = (segments[:, None] == segments[:, :, None]) & (distance <= 0)
    attend = functools.partial(jax.nn.dot_product_attention, bias=bias, mask=seen[:, None])
    out, transpose = jax.vjp(attend, q, k, v)
    real = (segments > 0)[..., None, None]
    gradients = transpose(jnp.where(real, d_out, 0).astype(dtype))
    return [jnp.where(real, x, 0) for x in (out, *gradients)]


@each_kernel
@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_float32_matches_the_dense_formula(kernel, position):
    # Larger logits, in extra columns, cost digits.
    limit = 1e-4 if (kernel, position) == ("splash", "alibi") else 1e-5
    results = run(kernel, position, jnp.float32), exact(position, jnp.float32)
    for name, got, want in zip(NAMES, *results, strict=True):
        np.testing.assert_allclose(got, want, atol=limit, err_msg=name)


@each_kernel
@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_bfloat16_is_as_good_as_plain_attention(kernel, position):
    results = [f(position, jnp.bfloat16) for f in (functools.partial(run, kernel), plain, exact)]
    for name, limit, *arrays in zip(NAMES, (1.0, 1.5, 1.5, 1.5), *results, strict=True):
        got, usual, want = (np.asarray(x, np.float64) for x in arrays)
        error, usual_error = (np.sqrt(np.mean((x - want) ** 2)) for x in (got, usual))
        assert error <= limit * usual_error, (name, error, usual_error)


def test_what_a_rematerialised_layer_saves_has_its_name():
    """Output and log-sum-exp: or the backward pass would attend once more."""
    x = jax.ShapeDtypeStruct((1, 128, 1, 64), jnp.float32)
    where = jax.ShapeDtypeStruct((1, 128), jnp.int32)

    def total(q, positions, segments):
        out = splash.attention(q, q, q, positions, segments, None, interpret=True)
        return jnp.sin(out).sum()  # whose gradient wants the output

    def results(policy):
        """Outputs and log-sum-exps that are used, in both passes."""
        program = jax.make_jaxpr(jax.grad(jax.checkpoint(total, policy=policy)))(x, where, where)
        return str(program).count(f"name={splash.SAVED}]")

    policies = jax.checkpoint_policies
    assert results(policies.save_only_these_names(splash.SAVED)) == 2  # of the forward pass
    assert results(policies.nothing_saveable) == 3  # its output, and both once more
