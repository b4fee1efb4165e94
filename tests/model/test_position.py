"""RoPE and ALiBi beside what the paper and the released models fix."""

import jax.numpy as jnp
import numpy as np

from baichuan_jax.model.position import alibi_slopes, rotate


def test_slopes_of_the_13b():
    slopes = alibi_slopes(40)
    np.testing.assert_allclose(slopes[:32], 2.0 ** (-0.25 * np.arange(1, 33)), rtol=1e-6)
    steep = [0.917004, 0.771105, 0.648420, 0.545254, 0.458502, 0.385553, 0.324210, 0.272627]
    np.testing.assert_allclose(slopes[32:], steep, atol=1e-6)


def test_slopes_of_a_power_of_two():
    np.testing.assert_allclose(alibi_slopes(8), 2.0 ** -np.arange(1.0, 9), rtol=1e-6)


def test_rotation_depends_on_distance_alone_and_keeps_lengths():
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 1, 1, 128)).astype(np.float32)

    def product(i, j):
        positions = [jnp.full((1, 1), n, jnp.int32) for n in (i, j)]
        return float(jnp.sum(rotate(q, positions[0], 1e4) * rotate(k, positions[1], 1e4)))

    assert abs(product(5, 2) - product(4_003, 4_000)) < 2e-2
    assert abs(product(5, 2) - product(5, 4)) > 1e-2
    turned = rotate(q, jnp.full((1, 1), 3_000, jnp.int32), 1e4)
    np.testing.assert_allclose(np.linalg.norm(turned), np.linalg.norm(q), rtol=1e-5)


def test_half_rotation_pairs_the_two_halves():
    x = np.zeros((1, 1, 1, 4), np.float32)
    x[..., 0] = 1.0
    turned = np.asarray(rotate(x, jnp.ones((1, 1), jnp.int32), 1e4))[0, 0, 0]
    np.testing.assert_allclose(turned, [np.cos(1), 0, np.sin(1), 0], atol=1e-6)


def test_positions_beyond_256_stay_apart_in_bfloat16():
    x = jnp.ones((1, 2, 1, 8), jnp.bfloat16)
    turned = rotate(x, jnp.array([[300, 301]], jnp.int32), 1e4)
    assert turned.dtype == jnp.bfloat16
    assert not np.array_equal(turned[0, 0], turned[0, 1])
