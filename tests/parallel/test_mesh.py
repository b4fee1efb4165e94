"""Mesh shapes and the errors of those that do not fit."""

import jax
import pytest

from baichuan_jax.config import MeshConfig, ModelConfig
from baichuan_jax.parallel.mesh import check_fit, make_mesh, mesh_shape


def test_minus_one_takes_what_is_left():
    assert mesh_shape(MeshConfig(2, -1, 2), 16) == (2, 4, 2)
    assert mesh_shape(MeshConfig(), 1) == (1, 1, 1)
    assert dict(make_mesh(MeshConfig(-1, 2, 2)).shape) == {"replica": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    "config", [MeshConfig(3, -1, 1), MeshConfig(2, 2, 1), MeshConfig(16, 1, 1)]
)
def test_a_mesh_that_does_not_fit_is_refused(config):
    with pytest.raises(ValueError, match=r"does not fit 8 devices.*product must be 8"):
        make_mesh(config, jax.devices()[:8])


@pytest.mark.parametrize("config", [MeshConfig(-1, -1, 1), MeshConfig(0, -1, 1)])
def test_sizes_are_positive_or_one_is_free(config):
    with pytest.raises(ValueError, match="one at most may be -1"):
        mesh_shape(config, 8)


def test_what_tensor_does_not_divide_is_named():
    mesh = make_mesh(MeshConfig(1, 1, 8))
    with pytest.raises(ValueError, match=r"tensor=8 must divide model.num_heads=12"):
        check_fit(mesh, ModelConfig(num_heads=12, hidden_size=96), rows=8)


def test_a_batch_that_does_not_divide_is_named():
    mesh = make_mesh(MeshConfig(4, 2, 1))
    with pytest.raises(ValueError, match=r"12 rows must be a multiple of replica × fsdp = 8"):
        check_fit(mesh, ModelConfig(), rows=12)
    check_fit(mesh, ModelConfig(), rows=16)
