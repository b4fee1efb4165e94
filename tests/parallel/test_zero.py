"""Where weights are stored and held, and that it changes neither loss nor gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.sharding import NamedSharding

from baichuan_jax.config import BATCH_AXES, Config, MeshConfig, ModelConfig, ZeroConfig
from baichuan_jax.model.transformer import Transformer
from baichuan_jax.parallel.mesh import make_mesh
from baichuan_jax.parallel.zero import Placement, layer_groups, shardings, stored_spec
from baichuan_jax.training import step


def test_both_axes_join_the_largest_free_dimension_that_they_divide():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    both = ("fsdp", "replica")
    assert stored_spec(P(None, "tensor"), (512, 64), mesh) == P(both, "tensor")
    assert stored_spec(P(None, None, "tensor", None), (64, 3, 8, 128), mesh) == P(
        None, None, "tensor", both
    )
    assert stored_spec(P(None, None), (7, 64), mesh) == P(None, both)
    assert stored_spec(P("tensor", None), (32, 16, 64), mesh) == P(None, "tensor", both)


def test_what_does_not_divide_goes_elsewhere_or_stays_in_copies():
    mesh = make_mesh(MeshConfig(2, 4, 1))
    both = ("fsdp", "replica")
    assert stored_spec(P(None, "tensor"), (100, 64), mesh) == P(None, ("tensor", *both))
    assert stored_spec(P(None, None), (12, 6), mesh) == P("fsdp", "replica")
    assert stored_spec(P(None, None), (12, 7), mesh) == P("fsdp", None)
    assert stored_spec(P(None, None), (6, 7), mesh) == P("replica", None)
    assert stored_spec(P(None, None), (7, 9), mesh) == P(None, None)
    assert stored_spec(P(None), (32, 64), mesh) == P(None, None)  # gains of stacked layers


def test_one_thousand_devices_divide_both_models():
    mesh = jax.sharding.AbstractMesh((128, 8, 1), ("replica", "fsdp", "tensor"))
    for D, F, H, L in ((4_096, 11_008, 32, 2), (5_120, 13_696, 40, 2)):
        config = ModelConfig(125_696, D, F, L, H)
        model = jax.eval_shape(lambda key: Transformer(key, config), jax.random.key(0))  # noqa: B023
        stored = jax.tree.leaves(shardings(model, mesh))
        for x, sharding in zip(jax.tree.leaves(model), stored, strict=True):
            if x.size > L * D:
                assert np.prod(sharding.shard_shape(x.shape)) * 1_024 == x.size


def test_layers_are_replicated_first_and_full_last():
    config = ZeroConfig(replicated_layers=3, full_layers=2)
    assert layer_groups(config, 9) == [("replicated", 3), ("hierarchical", 4), ("full", 2)]
    assert layer_groups(config, 5) == [("replicated", 3), ("full", 2)]
    assert layer_groups(ZeroConfig(), 5) == [("hierarchical", 5)]


@functools.cache
def example():
    """A config, float32 weights, a batch and, without a mesh, its gradients."""
    config = Config(ModelConfig(250, 64, 96, 3, 8))
    config.training.compute_dtype = "float32"
    rng = np.random.default_rng(0)
    rows, time = 16, 16
    tokens = rng.integers(0, 250, (rows, time + 1)).astype(np.int32)
    batch = {
        "tokens_BT": tokens[:, :-1],
        "positions_BT": np.broadcast_to(np.arange(time, dtype=np.int32), (rows, time)),
        "segments_BT": np.ones((rows, time), np.int32),
        "targets_BT": tokens[:, 1:],
        "mask_BT": rng.random((rows, time)) < 0.9,
    }
    model = Transformer(jax.random.key(0), config.model)
    loss = step.pretraining_loss(config.model, config.training)
    return config, model, batch, jax.jit(lambda m, b: step.gradients(loss, m, b))(model, batch)


def on_mesh(shape, zero: ZeroConfig, micro_batches: int, remat: str = "full"):
    config, model, batch, want = example()
    config.training.remat = remat
    mesh = make_mesh(MeshConfig(*shape))
    stored = jax.device_put(model, shardings(model, mesh))
    rows = NamedSharding(mesh, P(BATCH_AXES, None))
    batch = {name: jax.device_put(x, rows) for name, x in batch.items()}
    loss = step.pretraining_loss(config.model, config.training)
    placement = Placement(zero, jnp.dtype("float32"))
    with jax.set_mesh(mesh):
        run = jax.jit(lambda m, b: step.gradients(loss, m, b, micro_batches, placement))
        got = run(stored, batch)
    return stored, got, want


PLACED = {
    "hierarchical": ZeroConfig(),
    "replicated": ZeroConfig(3, 0, "replicated", "replicated"),
    "full": ZeroConfig(0, 3, "full", "full"),
    "hybrid": ZeroConfig(1, 1, "replicated", "full"),
}


@pytest.mark.parametrize(
    ("placed", "micro_batches"),
    [("replicated", 1), ("hybrid", 1), ("replicated", 2), ("hierarchical", 2), ("full", 2)],
)
def test_placements_change_nothing(placed, micro_batches):
    check(*on_mesh((2, 2, 2), PLACED[placed], micro_batches))


@pytest.mark.parametrize("shape", [(2, 4, 1), (1, 2, 4)])
def test_meshes_change_nothing(shape):
    check(*on_mesh(shape, PLACED["hybrid"], 2))


@pytest.mark.parametrize("remat", ["none", "attention,gate_up"])
def test_remat_policies_change_nothing(remat):
    check(*on_mesh((2, 4, 1), PLACED["hybrid"], 1, remat))


def check(stored, got, want):
    grads, count, sums = got
    want_grads, want_count, want_sums = want
    assert count == want_count
    np.testing.assert_allclose(sums["loss"], want_sums["loss"], rtol=1e-5)
    leaves = zip(*map(jax.tree.leaves, (grads, want_grads, stored)), strict=True)
    for got, want, weight in leaves:
        assert got.sharding == weight.sharding
        np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))
