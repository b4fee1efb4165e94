"""The training step: exact accumulation, every mesh layout, AdamW, and NaN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import P
from jax.sharding import NamedSharding

from baichuan_jax.config import BATCH_AXES, Config, MeshConfig, ModelConfig
from baichuan_jax.parallel.mesh import make_mesh
from baichuan_jax.training import optimizer, step

B, T = 8, 24


def small_config(position="rope"):
    config = Config()
    config.model = ModelConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_layers=2,
        num_heads=8,
        position=position,
    )
    config.training.compute_dtype = "float32"
    config.training.num_steps = 20
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 4
    return config


def batch_of(index):
    """Two packed documents a row and token counts that differ between the rows."""
    rng = np.random.default_rng(index)
    tokens = rng.integers(0, 30, (B, T + 1)).astype(np.int32)
    cut = int(rng.integers(5, T))
    positions = np.tile(np.concatenate([np.arange(cut), np.arange(T - cut)]), (B, 1))
    return {
        "tokens_BT": tokens[:, :T],
        "targets_BT": tokens[:, 1:],
        "positions_BT": positions.astype(np.int32),
        "segments_BT": np.tile(1 + (np.arange(T) >= cut), (B, 1)).astype(np.int32),
        "mask_BT": rng.random((B, T)) < rng.random((B, 1)),
    }


def run(config, shape=(1, 1, 1), micro_batches=1, steps=20, edit=None):
    """Trains on a mesh; returns the losses, the last metrics and the state."""
    mesh = make_mesh(MeshConfig(*shape), jax.devices()[: np.prod(shape)])
    tx = optimizer.adamw(config.optimizer, config.training.num_steps)
    state = step.create_state(step.create_model(config.model, 0, mesh), tx, mesh)
    if edit:
        edit(state.model)
    loss = step.pretraining_loss(config.model, config.training)
    config.training.micro_batches = micro_batches
    train = step.compiled_step(config, loss, tx)
    sharding = NamedSharding(mesh, P(BATCH_AXES, None))
    losses = []
    with jax.set_mesh(mesh):
        for index in range(steps):
            batch = jax.device_put(batch_of(index), sharding)
            state, metrics = train(state, index + 1, batch)
            losses.append(float(metrics["loss"] / metrics["tokens"]))
    return np.array(losses), metrics, state


LAYOUTS = {
    "rope": [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (4, 1, 2)],
    "alibi": [(2, 2, 2)],
}


@pytest.mark.parametrize("position", LAYOUTS)
def test_every_layout_gives_the_losses_of_one_device(position):
    config = small_config(position)
    want, _, _ = run(config)
    assert want[-1] < want[0] - 1
    for shape in LAYOUTS[position]:
        got, _, _ = run(config, shape)
        np.testing.assert_allclose(got, want, atol=1e-5, err_msg=f"mesh {shape}")


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 1)])
def test_accumulation_is_exact_for_unequal_token_counts(shape):
    config = small_config()
    want, _, _ = run(config, steps=5)
    got, _, _ = run(config, shape, micro_batches=4, steps=5)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_state_is_stored_where_it_is_said_to_be():
    config = small_config()
    mesh = make_mesh(MeshConfig(2, 2, 2))
    tx = optimizer.adamw(config.optimizer, 20)
    state = step.create_state(step.create_model(config.model, 0, mesh), tx, mesh)
    abstract = step.abstract_state(config, tx, mesh)
    for have, said in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert (have.shape, have.dtype) == (said.shape, said.dtype)
        assert have.sharding.is_equivalent_to(said.sharding, have.ndim)
    qkv = state.opt_state[0].mu.layers.attention.qkv[...]
    assert qkv.sharding.spec == P(None, ("fsdp", "replica"), None, "tensor", None)


def test_initial_weights_are_the_same_on_every_mesh():
    config = small_config().model
    one = step.create_model(config, 3, make_mesh(MeshConfig(), jax.devices()[:1]))
    eight = step.create_model(config, 3, make_mesh(MeshConfig(2, 2, 2)))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_array_equal(a, b)


def test_update_is_adamw_by_the_book():
    """One step beside AdamW and clipping written out in float64."""
    config = small_config()
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    model = step.create_model(config.model, 0, mesh)
    loss = step.pretraining_loss(config.model, config.training)
    with jax.set_mesh(mesh):
        grads, _, _ = jax.jit(lambda m, b: step.gradients(loss, m, b))(
            model, jax.device_put(batch_of(0), NamedSharding(mesh, P(BATCH_AXES, None)))
        )
    _, metrics, state = run(config, steps=1)
    settings = config.optimizer
    rate = settings.learning_rate / settings.warmup_steps
    g64 = [np.asarray(g, np.float64) for g in jax.tree.leaves(grads)]
    norm = np.sqrt(sum((g**2).sum() for g in g64))
    np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-5)
    decayed = jax.tree.leaves(optimizer.is_matrix(model))
    triples = zip(jax.tree.leaves(model), g64, decayed, jax.tree.leaves(state.model), strict=True)
    for before, g, decay, after in triples:
        g = g * min(1.0, settings.clip_norm / norm)
        update = g / (np.abs(g) + settings.epsilon)  # bias correction makes the first step m/√v
        want = before - rate * (update + settings.weight_decay * decay * np.asarray(before))
        np.testing.assert_allclose(after, want, atol=2e-5)


def test_weight_decay_spares_the_norm_gains():
    model = step.create_model(small_config().model, 0, make_mesh(MeshConfig(1, 1, 8)))
    matrices = optimizer.is_matrix(model)
    assert jax.tree.leaves((matrices.embedding, matrices.head, matrices.layers.mlp)) == [True] * 4
    gains = (matrices.norm, matrices.layers.attention_norm, matrices.layers.mlp_norm)
    assert jax.tree.leaves(gains) == [False] * 3


def test_schedule_follows_the_paper():
    config = Config()
    rate = optimizer.schedule(config.optimizer, 10_000)
    assert rate(0) == pytest.approx(2e-4 / 2_000)
    assert rate(1_999) == pytest.approx(2e-4)
    middle = 2e-5 + (2e-4 - 2e-5) * 0.5
    assert rate(5_999) == pytest.approx(middle, rel=1e-3)
    assert rate(9_999) == pytest.approx(2e-5, rel=1e-3)


def poison(name, layer):
    def edit(model):
        stack = getattr(model.layers.mlp, name)
        stack[...] = stack[...].at[layer].set(jnp.nan)

    return edit


def test_a_bad_step_changes_nothing_and_names_the_weight():
    config = small_config()
    losses, _, state = run(config, steps=2, edit=poison("down", 1))
    assert np.isnan(losses).all() and state.step == 0
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    loss = step.pretraining_loss(config.model, config.training)
    with jax.set_mesh(mesh):
        batch = jax.device_put(batch_of(0), NamedSharding(mesh, P(BATCH_AXES, None)))
        said = step.first_nonfinite(loss, state.model, batch)
    assert said == "weight layer 1: layers.mlp.down"


def test_no_step_after_a_bad_one_changes_anything():
    """The loop reads a step's results when the next one is already under way."""
    config = small_config()
    _, _, good = run(config, steps=2)
    plain = step.pretraining_loss(config.model, config.training)

    def loss(module, batch):
        total, count, sums = plain(module, batch)
        third = jnp.all(batch["targets_BT"] == batch_of(2)["targets_BT"])
        return jnp.where(third, jnp.nan, 1.0) * total, count, sums

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "pretraining_loss", lambda *_: loss)
        losses, _, state = run(config, steps=4)
    assert np.isfinite(losses).tolist() == [True, True, False, True]
    for a, b in zip(jax.tree.leaves(good), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_names_the_first_bad_gradient():
    config = small_config()
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    model = step.create_model(config.model, 0, mesh)

    @jax.custom_vjp
    def broken(x):
        return x

    broken.defvjp(lambda x: (x, None), lambda _, g: (g * jnp.inf,))
    plain = step.pretraining_loss(config.model, config.training)

    def loss(module, batch):
        down = module.layers.mlp.down
        module.layers.mlp.down = down.replace(
            jnp.concatenate([broken(down[...][:1]), down[...][1:]])
        )
        return plain(module, batch)

    with jax.set_mesh(mesh):
        batch = jax.device_put(batch_of(0), NamedSharding(mesh, P(BATCH_AXES, None)))
        said = step.first_nonfinite(loss, model, batch)
    assert said == "gradient of layer 0: layers.mlp.down"


def test_clipping_equals_optax():
    rng = np.random.default_rng(0)
    tree = {"a": jnp.array(rng.standard_normal(5)), "b": jnp.array(rng.standard_normal((2, 3)))}
    for limit in (0.5, 100.0):
        got = optimizer.clip(tree, optax.tree.norm(tree), limit)
        transform = optax.clip_by_global_norm(limit)
        want, _ = transform.update(tree, transform.init(tree))
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), got, want)
