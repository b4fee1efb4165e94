"""Quantised models: memory, meshes, checkpoints."""

import functools
import gc
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

from baichuan_jax.config import BATCH_AXES, Config, MeshConfig, ModelConfig
from baichuan_jax.convert import folder as folder_module
from baichuan_jax.inference import quantize as quantize_module
from baichuan_jax.inference import weights
from baichuan_jax.inference.quantize import (
    abstract,
    check_save,
    is_quantized,
    memory,
    quantize,
    restore_quantized,
    save_quantized,
)
from baichuan_jax.model.quantized import KINDS, Quantized
from baichuan_jax.model.transformer import Transformer, norm_head
from baichuan_jax.parallel.mesh import make_mesh
from baichuan_jax.training import manifest
from baichuan_jax.training.checkpoint import CheckpointError, Checkpoints, by_name

CONFIG = ModelConfig(
    vocab_size=300, hidden_size=64, intermediate_size=176, num_layers=3, num_heads=4
)


def make_model(config: ModelConfig = CONFIG, dtype=jnp.bfloat16) -> Transformer:
    """A model with a stack of layers, filled by NumPy: nothing to compile."""
    rng = np.random.default_rng(1)
    model = jax.eval_shape(lambda key: Transformer(key, config), jax.random.key(1))
    return jax.tree.map(lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape), dtype), model)


def unstacked(model: Transformer) -> Transformer:
    stack = jax.tree.map(np.asarray, model.layers)
    layers = range(stack.mlp_norm.gain.shape[0])
    model.layers = tuple(jax.tree.map(lambda x, i=i: jnp.asarray(x[i]), stack) for i in layers)
    return model


full = jax.jit(lambda weight: weight.dequantize(jnp.float32))


@functools.partial(jax.jit, static_argnums=1)
def forward(model, dtype, tokens, positions, segments):
    if not isinstance(model.layers, tuple):
        return model(tokens, positions, segments, dtype=dtype)
    x = model.embed(tokens, dtype)
    for layer in model.layers:
        x, _ = layer(x, positions, segments)
    return model.norm(x)


def hidden(model: Transformer, dtype=jnp.float32) -> np.ndarray:
    """After all layers, for stacks and for tuples of blocks."""
    tokens = np.random.default_rng(0).integers(0, 300, (8, 24)).astype(np.int32)
    positions = np.broadcast_to(np.arange(24, dtype=np.int32), tokens.shape)
    inputs = (tokens, positions, np.ones_like(tokens))
    if not jax.sharding.get_abstract_mesh().empty:
        inputs = jax.device_put(inputs, P(BATCH_AXES, None))
    return np.asarray(forward(model, dtype, *inputs), np.float32)


def relative_error(actual, expected) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_computes_as_with_the_dequantised_weights(kind):
    exact, plain = (unstacked(make_model(dtype=jnp.float32)) for _ in range(2))
    stack = quantize(make_model(dtype=jnp.float32), kind)
    blocks = quantize(unstacked(make_model(dtype=jnp.float32)), kind)
    for there, here in zip(plain.layers, blocks.layers, strict=True):
        for part, name in (
            ("attention", "qkv"),
            ("attention", "out"),
            ("mlp", "gate_up"),
            ("mlp", "down"),
        ):
            weight = full(getattr(getattr(here, part), name))
            param = getattr(getattr(there, part), name)
            assert relative_error(weight, param[...]) < {"int8": 0.01}.get(kind, 0.13)
            setattr(getattr(there, part), name, param.replace(weight))
    expected = hidden(plain)
    np.testing.assert_allclose(hidden(blocks), expected, atol=1e-4)
    np.testing.assert_allclose(hidden(stack), expected, atol=1e-4)
    assert relative_error(expected, hidden(exact)) > {"int8": 1e-3}.get(kind, 1e-2)
    for name in ("embedding", "head"):
        np.testing.assert_array_equal(getattr(blocks, name)[...], getattr(exact, name)[...])


@pytest.mark.parametrize(("mesh", "kind"), [((1, 2, 4), "nf4"), ((2, 2, 2), "int8")])
def test_model_on_a_mesh(mesh, kind):
    config = ModelConfig(300, 256, 512, 2, 4)
    expected = hidden(quantize(make_model(config), kind))
    with jax.set_mesh(make_mesh(MeshConfig(*mesh))):
        model = quantize(unstacked(make_model(config)), kind)
        np.testing.assert_allclose(hidden(model), expected, atol=1e-4)


def test_full_precision_is_freed_layer_by_layer(monkeypatch):
    model = unstacked(make_model(dtype=jnp.float32))
    layer = memory(model)["linears"] / CONFIG.num_layers
    held = []
    one = quantize_module._quantize_weight

    def watch(weight, *options):
        result = one(weight, *options)
        gc.collect()
        held.append(sum(x.nbytes for x in jax.live_arrays()))
        return result

    gc.collect()
    before = sum(x.nbytes for x in jax.live_arrays())
    monkeypatch.setattr(quantize_module, "_quantize_weight", watch)
    quantize(model, "nf4")
    assert max(held) < before + layer
    assert held[-1] < before - (CONFIG.num_layers - 1) * layer * 0.8


def test_refuses_by_name():
    with pytest.raises(ValueError, match="quantize='fp4' must be one of 'int8', 'nf4', 'int4'"):
        quantize(make_model(), "fp4")
    with pytest.raises(ValueError, match=r"layers.attention.qkv has dtype int32"):
        quantize(make_model(dtype=jnp.int32), "int8")
    with pytest.raises(ValueError, match=r"layers.0.attention.qkv is quantised already, as nf4"):
        quantize(quantize(unstacked(make_model()), "nf4"), "int8")
    for bad in (np.nan, -np.inf, 3e38):
        model = unstacked(make_model())
        down = model.layers[1].mlp.down
        model.layers[1].mlp.down = down.replace(down[...].at[3, 5].set(bad))
        with pytest.raises(ValueError, match=r"layers.1.mlp.down holds NaN, infinity"):
            quantize(model, "int4")
    with jax.set_mesh(make_mesh(MeshConfig(1, 2, 4))):
        model = unstacked(make_model())
        with pytest.raises(
            ValueError, match=r"layers.0.attention.out: config.mesh.tensor=4 splits"
        ):
            quantize(model, "nf4")
        assert not isinstance(model.layers[0].attention.qkv, Quantized)


@pytest.mark.parametrize("kind", ["", *KINDS])
def test_memory_is_what_the_arrays_take(kind):
    model = unstacked(make_model())
    model = quantize(model, kind) if kind else model
    sizes = memory(model)
    assert sizes == memory(abstract(CONFIG, kind))
    assert sizes["total"] == sum(x.nbytes for x in jax.tree.leaves(model))
    assert sizes["embedding"] == sizes["head"] == 384 * 64 * 2
    weights, channels, D, F = 3 * (4 * 64 * 64 + 3 * 64 * 176), 4 * 64 + 2 * 176 + 64, 64, 176
    blocks = 3 * (4 * D + 2 * F + 3 * D)  # of `down`, 176 inputs are three blocks
    expected = {
        "": 2 * weights,
        "int8": weights + 4 * 3 * channels,
        "nf4": weights // 2 + 4 * blocks,
        "int4": weights // 2 + 4 * blocks,
    }
    assert sizes["linears"] == expected[kind]


# Checkpoints.


def folder(tmp_path: Path, model: Transformer, **options) -> Path:
    source = tmp_path / "source"
    source.mkdir(exist_ok=True)
    (source / "tokenizer.model").write_bytes(b"pieces")
    (source / "generation_config.json").write_text('{"top_k": 5}')
    save_quantized(model, Config(model=CONFIG), tmp_path / "to", source=source, **options)
    return tmp_path / "to"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stacked", [False, True])
def test_round_trip(tmp_path, kind, stacked):
    model = make_model() if stacked else unstacked(make_model())
    model = quantize(model, kind)
    raw = np.asarray(model.head[...], np.float32)
    path = folder(tmp_path, model, step=7, tokens=1_000)
    assert manifest.read(path / "checkpoints" / "00000007")[0] == 1_000
    assert model.norm_head and np.array_equal(model.head[...], raw)  # the caller's is as it was
    assert is_quantized(path) == is_quantized(path, 7) == kind and is_quantized(path, 8) == ""
    assert (path / "tokenizer.model").read_bytes() == b"pieces"
    assert (path / "generation_config.json").exists() and (path / "config.json").exists()
    back = restore_quantized(path)
    assert back.norm_head is False and len(back.layers) == 3
    assert back.layers[2].mlp.down.kind == kind and back.layers[2].mlp.down.spec == P(
        "tensor", None
    )
    expected = by_name(model if not stacked else quantize(unstacked(make_model()), kind))
    head = norm_head(expected.pop("head").astype(jnp.float32)).astype(jnp.bfloat16)
    found = by_name(back)
    np.testing.assert_array_equal(found.pop("head"), head)
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert array.dtype == expected[name].dtype, name
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    logits = back.logits(jnp.ones((1, 1, 64), jnp.bfloat16))
    assert relative_error(logits[..., :300], model.logits(jnp.ones((1, 1, 64)))[..., :300]) < 0.01


def test_restores_onto_a_mesh_in_another_dtype(tmp_path):
    path = folder(tmp_path, quantize(make_model(), "nf4"))
    expected = hidden(restore_quantized(path, dtype=jnp.float32))
    assert restore_quantized(path, dtype=jnp.float32).embedding[...].dtype == jnp.float32
    with jax.set_mesh(make_mesh(MeshConfig(2, 4, 1))):
        np.testing.assert_allclose(
            hidden(restore_quantized(path, dtype=jnp.float32)), expected, atol=1e-4
        )
    splits = pytest.raises(ValueError, match=r"layers.0.attention.out: config.mesh.tensor=2 splits")
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))), splits:
        restore_quantized(path)


def test_a_model_saved_from_a_mesh(tmp_path):
    expected = by_name(quantize(unstacked(make_model()), "int8"))
    with jax.set_mesh(make_mesh(MeshConfig(1, 2, 4))):
        path = folder(tmp_path, quantize(unstacked(make_model()), "int8"))
        on_mesh = restore_quantized(path)
        assert on_mesh.layers[0].mlp.down.values.sharding.spec == P("tensor", None)
    found = by_name(restore_quantized(path))
    for name in ("layers.0.mlp.down.values", "layers.2.attention.qkv.scales"):
        np.testing.assert_array_equal(found[name], expected[name])


def test_what_is_not_quantised(tmp_path):
    assert is_quantized(tmp_path) == ""
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(3, {"model": make_model()}, {"row": 1}, 0)
    assert is_quantized(tmp_path) == ""
    with pytest.raises(ValueError, match="is not quantised"):
        restore_quantized(tmp_path)
    with pytest.raises(ValueError, match="is not quantised"):
        folder(tmp_path, make_model())


def test_a_saved_model_is_that_which_is_quantised_on_the_fly(tmp_path):
    trained = by_name(make_model(dtype=jnp.float32))

    def serve(kind):
        def read(name, start, stop):
            return trained[name][start:stop]

        return weights.serve(CONFIG, read, jnp.bfloat16, kind)

    served = by_name(serve("nf4"))
    path = folder(tmp_path, serve("nf4"))
    for back in (restore_quantized(path), restore_quantized(path, dtype=jnp.bfloat16)):
        found = by_name(back)
        assert found.keys() == served.keys()
        assert found["layers.1.mlp_norm.gain"].dtype == found["norm.gain"].dtype == jnp.float32
        for name, x in found.items():
            assert x.dtype == served[name].dtype, name
            assert np.asarray(x).tobytes() == np.asarray(served[name]).tobytes(), name


def test_targets_are_refused_before_quantising(tmp_path, monkeypatch):
    config = Config(model=CONFIG)
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")

    def refused(error, match, to=tmp_path / "to", source=tmp_path):
        with pytest.raises(error, match=match):
            check_save(config, "nf4", to, source=source)

    check_save(config, "nf4", tmp_path / "to", source=tmp_path)
    assert not (tmp_path / "to").exists()
    refused(ValueError, "no tokenizer to save", source=None)
    refused(ValueError, "gs://bucket/run: should be on a local disk", to="gs://bucket/run")
    refused(FileExistsError, "is there already", to=tmp_path)
    refused(OSError, r"tokenizer.model", to=tmp_path / "tokenizer.model" / "to")
    with monkeypatch.context() as patch:
        patch.setattr(folder_module.os, "access", lambda *_: False)
        refused(PermissionError, r"cannot be written to, and \S+/to is to be made")
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    needed = f"{memory(quantize(make_model(), 'nf4'))['total']:,}"
    refused(OSError, f"needs about {needed} bytes, and the disk has 1,000 free")


def test_saving_leaves_nothing_half_written(tmp_path, monkeypatch):
    model = quantize(make_model(), "int8")
    with pytest.raises(ValueError, match="no tokenizer to save"):
        save_quantized(model, Config(model=CONFIG), tmp_path / "to", source=tmp_path)
    assert not (tmp_path / "to").exists()

    def fail(*_, **__):
        raise CheckpointError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", fail)
        with pytest.raises(CheckpointError):
            folder(tmp_path, model)
        assert not (tmp_path / "to").exists()
        (tmp_path / "to").mkdir()
        with pytest.raises(CheckpointError):
            folder(tmp_path, model)
        assert not any((tmp_path / "to").iterdir())
        assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "to"]
    path = folder(tmp_path, model)
    with pytest.raises(FileExistsError, match="to is there already"):
        folder(tmp_path, model)
    assert is_quantized(path) == "int8"


def test_damage_is_found(tmp_path):
    path = folder(tmp_path, quantize(make_model(), "nf4"))
    largest = max((path / "checkpoints").rglob("*"), key=lambda p: p.is_file() * p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(CheckpointError, match="was changed"):
        restore_quantized(path)
