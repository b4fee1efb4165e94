"""RoPE and ALiBi beside what the paper, the released models and Hugging Face fix."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baichuan_jax.config import ModelConfig
from baichuan_jax.model.position import alibi_slopes, rope, rotate
from baichuan_jax.model.transformer import Attention, Transformer
from tests.goldens import make_rope

GOLDENS = np.load(Path(make_rope.__file__).with_name("rope.npz"))


def turn(head_size: int, **fields):
    return rope(ModelConfig(hidden_size=head_size, num_heads=1, **fields))


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
        turned = (rotate(x, at, turn(128)) for x, at in zip((q, k), positions, strict=True))
        return float(jnp.sum(jnp.multiply(*turned)))

    assert abs(product(5, 2) - product(4_003, 4_000)) < 2e-2
    assert abs(product(5, 2) - product(5, 4)) > 1e-2
    turned = rotate(q, jnp.full((1, 1), 3_000, jnp.int32), turn(128))
    np.testing.assert_allclose(np.linalg.norm(turned), np.linalg.norm(q), rtol=1e-5)


def test_half_rotation_pairs_the_two_halves():
    x = np.zeros((1, 1, 1, 4), np.float32)
    x[..., 0] = 1.0
    turned = np.asarray(rotate(x, jnp.ones((1, 1), jnp.int32), turn(4)))[0, 0, 0]
    np.testing.assert_allclose(turned, [np.cos(1), 0, np.sin(1), 0], atol=1e-6)


def test_positions_beyond_256_stay_apart_in_bfloat16():
    x = jnp.ones((1, 2, 1, 8), jnp.bfloat16)
    turned = rotate(x, jnp.array([[300, 301]], jnp.int32), turn(8))
    assert turned.dtype == jnp.bfloat16
    assert not np.array_equal(turned[0, 0], turned[0, 1])


def found(case: ModelConfig) -> np.ndarray:
    angles = rope(case)
    return np.append(angles.frequencies, angles.attention_factor)


@pytest.mark.parametrize("name", make_rope.CASES)
def test_frequencies_are_those_of_transformers(name):
    # Theirs are powers in float32.
    np.testing.assert_allclose(found(make_rope.CASES[name]), GOLDENS[name], rtol=1e-6)


@pytest.mark.oracle
@pytest.mark.parametrize("name", make_rope.CASES)
def test_frequencies_are_those_of_transformers_live(name):
    theirs = make_rope.rope_of_transformers(make_rope.CASES[name])
    np.testing.assert_allclose(found(make_rope.CASES[name]), theirs, rtol=1e-6)


def test_what_each_scaling_does_to_the_fastest_and_the_slowest_pair():
    plain, options = np.array(turn(128).frequencies), {"rope_factor": 8.0}
    for scaling, fastest, slowest in (("linear", 8, 8), ("ntk", 1, 8), ("yarn", 1, 8)):
        divided = plain / turn(128, rope_scaling=scaling, **options).frequencies
        np.testing.assert_allclose(divided[[0, -1]], [fastest, slowest], rtol=1e-12)
        assert np.all(np.diff(divided) >= -1e-9)
    # 4,096 positions are 32 turns and more up to pair 20, one turn and less from pair 45 on.
    divided = plain / turn(128, rope_scaling="yarn", **options).frequencies
    assert np.all(np.flatnonzero((divided > 1) & (divided < 7.999)) == np.arange(21, 46))


def test_a_scaled_model_reads_its_positions_so():
    """Linear scaling is the same model at positions between the whole numbers."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 6, 2, 16)).astype(np.float32)
    at = jnp.arange(6, dtype=jnp.int32)[None]
    linear = turn(16, rope_scaling="linear", rope_factor=4.0)
    np.testing.assert_allclose(
        rotate(x, 4 * at, linear), rotate(x, at, turn(16)), rtol=1e-5, atol=1e-5
    )
    yarn = turn(16, rope_scaling="yarn", rope_factor=4.0)
    longer = np.linalg.norm(rotate(x, at, yarn)) / np.linalg.norm(x)
    np.testing.assert_allclose(longer, 0.1 * np.log(4) + 1, rtol=1e-5)


@pytest.mark.parametrize("scaling", ["linear", "ntk", "yarn"])
def test_attention_takes_the_scaling_of_its_config(scaling):
    config = ModelConfig(128, 32, 48, 2, 2)
    scaled = dataclasses.replace(config, rope_scaling=scaling, rope_factor=4.0)
    at = jnp.arange(12, dtype=jnp.int32)[None]
    outputs = {}
    for name, c in (("plain", config), ("scaled", scaled)):
        model = jax.jit(lambda key, c=c: Transformer(key, c))(jax.random.key(0))
        outputs[name] = model(at, at, jnp.ones_like(at), dtype=jnp.float32)
    np.testing.assert_array_equal(outputs["plain"][:, 0], outputs["scaled"][:, 0])
    assert np.abs(outputs["plain"][:, -1] - outputs["scaled"][:, -1]).max() > 1e-4
    assert Attention(jax.random.key(0), scaled).rope == rope(scaled)
