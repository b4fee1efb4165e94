"""Where stored weights are split."""

import jax
from jax import P

from baichuan_jax.config import MeshConfig, ModelConfig
from baichuan_jax.model.transformer import Transformer
from baichuan_jax.parallel.mesh import make_mesh
from baichuan_jax.parallel.zero import shardings, stored_spec


def test_fsdp_takes_the_largest_free_dimension_that_divides():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    assert stored_spec(P(None, "tensor"), (512, 64), mesh) == P("fsdp", "tensor")
    assert stored_spec(P(None, None, "tensor", None), (64, 3, 8, 128), mesh) == P(
        None, None, "tensor", "fsdp"
    )
    assert stored_spec(P(None, None), (7, 64), mesh) == P(None, "fsdp")


def test_stacked_layers_gains_and_odd_shapes_stay_whole():
    mesh = make_mesh(MeshConfig(1, 8, 1))
    assert stored_spec(P("tensor", None), (32, 16, 64), mesh) == P(None, "tensor", "fsdp")
    assert stored_spec(P(None), (32, 64), mesh) == P(None, None)
    assert stored_spec(P(None, None), (7, 9), mesh) == P(None, None)


def test_query_key_value_are_split_by_heads_each_for_itself():
    mesh = make_mesh(MeshConfig(1, 4, 2))
    config = ModelConfig(128, 64, 128, 2, 8)
    model = jax.eval_shape(lambda key: Transformer(key, config), jax.random.key(0))
    stored = shardings(model, mesh)
    sharding = jax.tree.leaves(stored.layers.attention.qkv)[0]
    assert sharding.spec == P(None, "fsdp", None, "tensor", None)
    assert sharding.shard_shape((2, 64, 3, 8, 8)) == (2, 16, 3, 4, 8)
