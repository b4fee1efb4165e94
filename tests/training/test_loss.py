"""The chunked loss beside autodiff of the plain formula, on one device and on eight."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.sharding import NamedSharding

from baichuan_jax.config import BATCH_AXES, TENSOR_AXIS, MeshConfig
from baichuan_jax.model.transformer import norm_head
from baichuan_jax.parallel.mesh import make_mesh
from baichuan_jax.training.loss import next_token_loss

B, T, D, V, ROWS = 4, 10, 16, 90, 128


def example(seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((B, T, D)).astype(np.float32)
    head = rng.standard_normal((ROWS, D)).astype(np.float32)
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    mask = rng.random((B, T)) < 0.7
    return hidden, head, targets, mask


def plain(hidden, head, targets, mask, norm, max_z_weight):
    """Cross-entropy and max-z as the paper writes them, with all logits at once."""
    head = head[:V]
    if norm:
        head = head / jnp.linalg.norm(head, axis=1, keepdims=True)
    z = hidden @ head.T
    target = jnp.take_along_axis(z, targets[..., None], axis=-1)[..., 0]
    cross_entropy = jax.nn.logsumexp(z, axis=-1) - target
    return jnp.sum(jnp.where(mask, cross_entropy + max_z_weight * z.max(-1) ** 2, 0.0))


def ours(hidden, head, targets, mask, norm, max_z_weight, chunk):
    head = norm_head(head) if norm else head
    return next_token_loss(
        *(hidden, head.astype(hidden.dtype), targets, mask),
        vocab_size=V,
        max_z_weight=max_z_weight,
        chunk=chunk,
    )


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("max_z_weight", [0.0, 2e-4, 0.3])
@pytest.mark.parametrize("chunk", [7, 2_048])
def test_loss_and_gradients_equal_autodiff(norm, max_z_weight, chunk):
    hidden, head, targets, mask = example()
    want, (want_hidden, want_head) = jax.value_and_grad(plain, argnums=(0, 1))(
        hidden, head, targets, mask, norm, max_z_weight
    )
    scalar = lambda *a: ours(*a, norm, max_z_weight, chunk)[0]  # noqa: E731
    got, (got_hidden, got_head) = jax.value_and_grad(scalar, argnums=(0, 1))(
        hidden, head, targets, mask
    )
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for a, b in ((got_hidden, want_hidden), (got_head, want_head)):
        np.testing.assert_allclose(a, b, atol=1e-6 * np.abs(b).max())
    # Without differentiation another program runs.
    np.testing.assert_allclose(scalar(hidden, head, targets, mask), want, rtol=1e-6)


def test_equal_maxima_share_the_gradient_as_autodiff_shares_it():
    hidden, head, targets, mask = example(1)
    hidden, head = np.round(4 * hidden) / 4, np.round(4 * head) / 4  # sums without rounding
    head[1] = head[0] = 3 * head[0]
    gradient = jax.grad(lambda h: ours(h, head, targets, mask, False, 0.5, 16)[0])(hidden)
    want = jax.grad(lambda h: plain(h, head, targets, mask, False, 0.5))(hidden)
    np.testing.assert_allclose(gradient, want, atol=1e-6 * np.abs(want).max())


def test_masked_tokens_touch_nothing():
    hidden, head, targets, mask = example(2)
    loss, count, sums = ours(hidden, head, targets, mask, True, 2e-4, 16)
    assert count == mask.sum()
    other_hidden, other_targets = hidden.copy(), targets.copy()
    other_hidden[~mask] = 9.0
    other_targets[~mask] = 0
    again = ours(other_hidden, head, other_targets, mask, True, 2e-4, 16)
    np.testing.assert_allclose(again[0], loss, rtol=1e-6)
    np.testing.assert_allclose(loss, sums["cross_entropy"] + sums["max_z"], rtol=1e-6)
    gradient = jax.grad(lambda h: ours(h, head, targets, mask, True, 2e-4, 16)[0])(hidden)
    assert not np.asarray(gradient)[~mask].any()


def test_counts_correct_predictions():
    hidden, head, _, mask = example(3)
    best = np.argmax(hidden @ head[:V].T, axis=-1).astype(np.int32)
    assert ours(hidden, head, best, mask, False, 0.0, 16)[2]["correct"] == mask.sum()
    assert ours(hidden, head, (best + 1) % V, mask, False, 0.0, 16)[2]["correct"] == 0


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 1, 8)])
def test_vocabulary_split_over_devices(shape):
    hidden, head, targets, mask = example(4)
    mesh = make_mesh(MeshConfig(*shape))
    specs = (P(BATCH_AXES, None, None), P(TENSOR_AXIS, None), P(BATCH_AXES, None))

    def scalar(hidden, head, targets, mask):
        return ours(hidden, head, targets, mask, True, 2e-4, 3)[0]

    want, want_grads = jax.value_and_grad(scalar, argnums=(0, 1))(hidden, head, targets, mask)
    with jax.set_mesh(mesh):
        inputs = [
            jax.device_put(x, NamedSharding(mesh, spec))
            for x, spec in zip((hidden, head, targets, mask), (*specs, specs[-1]), strict=True)
        ]
        got, grads = jax.jit(jax.value_and_grad(scalar, argnums=(0, 1)))(*inputs)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for a, b in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_bfloat16_is_close_to_float32():
    hidden, head, targets, mask = example(5)
    want = ours(hidden, head, targets, mask, True, 2e-4, 16)[0]
    got = ours(hidden.astype(jnp.bfloat16), head, targets, mask, True, 2e-4, 16)[0]
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=5e-3)


def test_no_buffer_holds_all_logits():
    """The compiled program, forward and backward, has chunks of logits and nothing larger."""
    tokens, vocab, chunk = 1_024, 5_120, 128

    def scalar(hidden, head, targets, mask):
        return next_token_loss(
            *(hidden, norm_head(head), targets, mask),
            vocab_size=vocab,
            max_z_weight=2e-4,
            chunk=chunk,
        )[0]

    shapes = (((2, 512, D), jnp.float32), ((vocab, D), jnp.float32))
    shapes += (((2, 512), jnp.int32), ((2, 512), jnp.bool_))
    inputs = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    text = jax.jit(jax.grad(scalar, argnums=(0, 1))).lower(*inputs).compile().as_text()
    sizes = [
        np.prod([int(n) for n in dims.split(",")])
        for dims in re.findall(r"\w\d+\[([\d,]+)\]", text)
    ]
    assert max(sizes) == chunk * vocab < tokens * vocab
